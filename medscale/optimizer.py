"""Optimizers: fused on the entity blocks, torch.optim on relations and scaling parameters, one schedule."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from medscale.config import OptimizerSection
from medscale.errors import UnsupportedError
from medscale.model.embedding import EntityTable

__all__ = ["Optimizers", "fused_optimizer", "learning_rate_factor"]

#: small enough to leave Adagrad's first steps at full size
_EPS = 1e-10


def fused_optimizer(
    section: OptimizerSection, device: torch.device
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return the class and arguments that select FBGEMM's fused optimizer of the entity blocks.

    Raises:
        UnsupportedError: Adam on a CPU, where FBGEMM does not offer it fused.

    """
    match section.kind:
        case "rowwise_adagrad":
            return RowWiseAdagrad, {"lr": section.lr, "eps": _EPS}
        case "adagrad":
            return torch.optim.Adagrad, {"lr": section.lr, "eps": _EPS}
        case _:
            if device.type != "cuda":
                raise UnsupportedError(
                    "optimizer.kind adam is fused on CUDA only, and this job runs on the CPU; "
                    "use rowwise_adagrad or adagrad"
                )
            return torch.optim.Adam, {"lr": section.lr, "eps": 1e-8}


def learning_rate_factor(section: OptimizerSection, step: int, total_steps: int) -> float:
    """Return what the learning rates of a step (0-based) are multiplied with."""
    warm = min(1.0, (step + 1) / section.warmup_steps) if section.warmup_steps else 1.0
    if section.schedule == "constant":
        return warm
    rest = max(1, total_steps - section.warmup_steps)
    return warm * max(0.0, 1 - max(0, step - section.warmup_steps) / rest)


class Optimizers:
    """All optimizers of a run, driven together."""

    def __init__(
        self,
        section: OptimizerSection,
        table: EntityTable,
        relations: Tensor,
        scaling: Tensor,
        scaling_lr: float,
        frozen_relations: Sequence[int] = (),
        encoder: torch.nn.Module | None = None,
        encoder_rate: float = 0.0,
    ) -> None:
        """Drive the optimizers of the tables, and of an encoder that composes rows instead of the entity table.

        Rows `frozen_relations` of the relation table stay as they are.
        """
        self.section, self.table = section, table
        self.frozen = torch.tensor(frozen_relations, dtype=torch.int64, device=relations.device)
        self.relations, self.scaling = relations, scaling
        layout, factors = table.layout, section.tier_factors
        #: what the learning rate is multiplied with in each column of a relation; None: with 1
        self.factors_C = (
            None
            if set(factors) == {1.0}
            else torch.tensor(layout.of_columns(factors, layout.scorer.relation_unit_columns), device=relations.device)
        )
        rate = section.relation_lr or section.lr
        self.dense = (
            torch.optim.Adam([relations], lr=rate)
            if section.kind == "adam"
            else torch.optim.Adagrad([relations], lr=rate, eps=_EPS)
        )
        self.relation_rate, self.scaling_rate, self.encoder_rate = rate, scaling_lr, encoder_rate
        self.encoder = None if encoder is None else torch.optim.Adagrad(encoder.parameters(), lr=encoder_rate, eps=_EPS)
        self._prime()

    def set_rates(self, factor: float) -> None:
        """Scale the learning rates for the next update."""
        self.table.set_learning_rate(self.section.lr * factor)
        self.dense.param_groups[0]["lr"] = self.relation_rate * factor
        if self.encoder is not None:
            self.encoder.param_groups[0]["lr"] = self.encoder_rate * factor

    def step_dense(self) -> None:
        """Update relations, and w1, w2, w3 where they are trained (plain gradient descent, own rate)."""
        if self.relations.grad is not None and len(self.frozen):
            # Without weight decay or momentum of their own, rows with a gradient of +0 keep every bit.
            self.relations.grad.index_fill_(0, self.frozen, 0.0)
        if self.factors_C is None:
            self.dense.step()
        else:  # torch.optim has one rate per tensor
            before_RC = self.relations.detach().clone()
            self.dense.step()
            self.relations.data.copy_(before_RC.lerp(self.relations.detach(), self.factors_C))
        self.dense.zero_grad(set_to_none=True)
        if self.encoder is not None:
            self.encoder.step()
            self.encoder.zero_grad(set_to_none=True)
        if self.scaling.grad is not None:
            with torch.no_grad():
                self.scaling -= self.scaling_rate * self.scaling.grad
            self.scaling.grad = None

    def dense_state(self) -> dict[str, Tensor]:
        """Return the tensors of the dense optimizer's state; loading writes into them."""
        return dict(self.dense.state[self.relations].items())

    def encoder_state(self) -> dict[str, Tensor]:
        """Return an encoder's parameters and their optimizer's state by number; loading writes into them."""
        if self.encoder is None:
            return {}
        parameters = self.encoder.param_groups[0]["params"]
        state = {f"{i}": parameter.data for i, parameter in enumerate(parameters)}
        return state | {f"{i}.sum": self.encoder.state[parameter]["sum"] for i, parameter in enumerate(parameters)}

    def _prime(self) -> None:
        """Give Adam its state before the first step, so that a checkpoint has something to load into."""
        if self.section.kind == "adam":
            self.dense.state[self.relations] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(self.relations),
                "exp_avg_sq": torch.zeros_like(self.relations),
            }
