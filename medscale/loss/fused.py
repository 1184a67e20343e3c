"""The binary loss of scored pairs and corruptions through the kernels of a device, as nodes of autograd."""

import importlib
from typing import Any, cast

import torch
from torch import Tensor

from medscale.loss.negatives import BinaryConstants, CorruptionTerms
from medscale.loss.positives import PositiveTerms, positive_terms
from medscale.model.kernels.levels import Levels
from medscale.model.kernels.library import library
from medscale.model.rows import Rows
from medscale.workers import Workers

__all__ = ["Kernels"]


class Kernels:
    """What a device has compiled: C++ on CPUs, Triton on GPUs."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        if not on_gpu:
            library()  # without a compiler a job ends now, not at its first step
        self.pairs: Any = importlib.import_module(
            "medscale.model.kernels." + ("triton_scores" if on_gpu else "cpu_pairs")
        )
        self.corruptions: Any = importlib.import_module(
            "medscale.loss." + ("triton_corruptions" if on_gpu else "cpu_corruptions")
        )
        #: on a GPU there is the plain one alone
        self.positives: Any = None if on_gpu else importlib.import_module("medscale.loss.cpu_positives")
        #: on a GPU torch's own log-softmax is as good
        self.softmax: Any = None if on_gpu else importlib.import_module("medscale.loss.cpu_softmax")

    def positive_terms(
        self, constants: BinaryConstants, w1: Tensor, scores_nR: Tensor, hard_weights_n: Tensor,
        mutual_weights_n: Tensor, workers: Workers,
    ) -> PositiveTerms:  # fmt: skip
        """Return the losses of scored positives and their derivatives, the fast way where there is one."""
        fast = self.positives
        if fast is not None and fast.applies(constants, w1.item()):
            terms: PositiveTerms = fast.positive_terms(
                constants, w1.item(), scores_nR, hard_weights_n, mutual_weights_n, workers
            )
            return terms
        return positive_terms(constants, w1, scores_nR, hard_weights_n, mutual_weights_n, workers)

    def positive_loss(
        self, levels: Levels, constants: BinaryConstants, query_RC: Tensor, target_RC: Tensor, scale_RC: Tensor | None,
        w1: Tensor, hard_weights_n: Tensor, mutual_weights_n: Tensor, workers: Workers,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return (sum_i hard_weights_i hard_i + mutual_weights_i mutual_i, hard [n], mutual [n]), as below."""
        return cast(
            tuple[Tensor, Tensor, Tensor],
            _PositiveLoss.apply(  # type: ignore[no-untyped-call]
                self, (levels, constants, workers), query_RC, target_RC, scale_RC, w1, hard_weights_n, mutual_weights_n
            ),
        )

    def corruption_loss(
        self, levels: Levels, constants: BinaryConstants, query_XPC: Tensor, rows: Rows, candidates_XK: Tensor,
        keep_XPK: Tensor, scale_XPC: Tensor | None, w2: Tensor, hard_weights_n: Tensor, mutual_weights_n: Tensor,
        workers: Workers, *, losses: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return (sum_i hard_weights_i hard_i + mutual_weights_i mutual_i, hard [n], mutual [n]).

        The first is for backward(), and as it is: its derivatives were taken with the loss. The others are numbers.
        Without `losses` all three may be 0 instead; derivatives are the same.
        """
        arguments = (levels, constants, rows, candidates_XK, keep_XPK, workers, losses)
        return cast(
            tuple[Tensor, Tensor, Tensor],
            _CorruptionLoss.apply(  # type: ignore[no-untyped-call]
                self, arguments, rows.values_UC, query_XPC, scale_XPC, w2, hard_weights_n, mutual_weights_n
            ),
        )


class _PositiveLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, arguments: Any, query_RC: Tensor, target_RC: Tensor, scale_RC: Tensor | None,
        w1: Tensor, hard_weights_n: Tensor, mutual_weights_n: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        levels, constants, workers = arguments
        scores_nR: Tensor = kernels.pairs.pair_scores(levels, query_RC, target_RC, scale_RC)
        terms = kernels.positive_terms(constants, w1, scores_nR, hard_weights_n, mutual_weights_n, workers)
        ctx.kernels, ctx.levels, ctx.terms = kernels, levels, terms
        ctx.save_for_backward(scores_nR, query_RC, target_RC, scale_RC)
        ctx.mark_non_differentiable(terms.hard_n, terms.mutual_n)
        total = (hard_weights_n * terms.hard_n).sum() + (mutual_weights_n * terms.mutual_n).sum()
        return total, terms.hard_n, terms.mutual_n

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        terms, total_gradient = ctx.terms, gradients[0]
        pairs = ctx.kernels.pairs.pair_gradients(ctx.levels, total_gradient * terms.gradient_nR, *ctx.saved_tensors)
        weights = (total_gradient * numbers for numbers in (terms.w1_slope, terms.hard_n, terms.mutual_n))
        return None, None, *pairs, *weights


class _CorruptionLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, arguments: Any, values_UC: Tensor, query_XPC: Tensor, scale_XPC: Tensor | None,
        w2: Tensor, hard_weights_n: Tensor, mutual_weights_n: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        levels, constants, rows, candidates_XK, keep_XPK, workers, losses = arguments
        terms: CorruptionTerms = kernels.corruptions.corruption_terms(
            levels, constants, w2.item(), query_XPC, values_UC, candidates_XK, keep_XPK, scale_XPC, hard_weights_n,
            mutual_weights_n, rows.gathered_UC, workers, losses=losses,
        )  # fmt: skip
        ctx.terms = terms
        ctx.mark_non_differentiable(terms.hard_n, terms.mutual_n)
        total = (hard_weights_n * terms.hard_n).sum() + (mutual_weights_n * terms.mutual_n).sum()
        return total, terms.hard_n, terms.mutual_n

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        terms, total_gradient = ctx.terms, gradients[0]
        # Asking a GPU would wait for it.
        assert total_gradient.is_cuda or total_gradient == 1, "rows have their gradient already"
        return (
            None, None, None, terms.query_gradient_XPC, terms.scale_gradient_XPC, terms.w2_slope, terms.hard_n,
            terms.mutual_n,
        )  # fmt: skip
