"""Crops of a directly trained model, without any more training: Ext, Ext-L, Ext-V and PCA.

The paper arranges the units of the largest directly trained model by importance and keeps the first (section 5.1.4):

    ext      the order that training left (columns mean nothing in particular there)
    ext-l    how much the loss on the validation triples grows when the unit is removed
             (of distances it never does while few positives are called true: any unit less brings them nearer, and
             what stays first is the units that hardly move any triple, which tell entities apart least)
    ext-v    the mean magnitude of its columns over all entities and relations

and, for its applications, projects rows to their principal axes:

    pca      of entities and relations alike: scores add up over units, so the same axes must serve both

One arranged table serves all dims, because the crops of it nest.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from medscale.config import Job
from medscale.errors import ConfigError
from medscale.graph.side import Side
from medscale.loss.bce import logits_of
from medscale.model.embedding import TableRows
from medscale.model.layout import Layout
from medscale.model.scoring import Scorer
from medscale.seed import generator

__all__ = ["METHODS", "Arranged", "Method", "arranged", "unit_losses", "unit_magnitudes"]

Method = Literal["ext", "ext-l", "ext-v", "pca"]
METHODS: tuple[Method, ...] = get_args(Method)

#: negatives of each validation triple and side, for `ext-l`
_NEGATIVES = 64
#: numbers of per-unit sums held at a time
_NUMBERS = 1 << 24


@dataclass(frozen=True)
class Arranged:
    """A model whose columns were put in another order, or projected."""

    rows_EC: Tensor
    relations_RC: Tensor
    layout: Layout

    def cropped(self, dims: tuple[int, ...]) -> "Arranged":
        """Return the model whose sub-models are its first units.

        Raises:
            ConfigError: it has fewer units.

        """
        if dims[-1] > self.layout.dims[-1]:
            raise ConfigError([f"a model of {self.layout.dims[-1]} units has no crop of {dims[-1]}"])
        columns = dims[-1] * self.layout.scorer.unit_columns
        relation_columns = dims[-1] * self.layout.scorer.relation_unit_columns
        layout = replace(self.layout, dims=dims, tiers={}, damping=(1.0,) * (len(dims) - 1), block_units=None)
        return Arranged(self.rows_EC[:, :columns], self.relations_RC[:, :relation_columns], layout)

    def table(self) -> TableRows:
        """Return the rows as ranking reads them."""
        return TableRows([self.rows_EC], self.rows_EC.shape[1])


def arranged(
    method: Method, job: Job, rows_EC: Tensor, relations_RC: Tensor, layout: Layout, validation: NDArray[np.int64]
) -> Arranged:
    """Return a directly trained model with its columns arranged; `validation` is int64 [T, 3], for `ext-l` alone.

    Raises:
        ConfigError: the model was not trained for one dim alone.

    """
    if len(layout.dims) != 1:
        raise ConfigError([f"model.dims: {method} crops a model of one dim; this one has {len(layout.dims)}"])
    if method == "pca":
        return _projected(rows_EC, relations_RC, layout)
    if method == "ext":
        order_U = torch.arange(layout.dims[0])
    elif method == "ext-v":
        order_U = unit_magnitudes(rows_EC, relations_RC, layout.scorer).argsort(descending=True, stable=True)
    else:
        order_U = unit_losses(job, rows_EC, relations_RC, layout, validation).argsort(descending=True, stable=True)
    return Arranged(
        _reordered(rows_EC, order_U, layout.scorer.unit_columns),
        _reordered(relations_RC, order_U, layout.scorer.relation_unit_columns),
        layout,
    )


def _reordered(rows_NC: Tensor, order_U: Tensor, unit_columns: int) -> Tensor:
    units_NUc: Tensor = rows_NC.unflatten(1, (-1, unit_columns))
    return units_NUc[:, order_U].flatten(1)


def unit_magnitudes(rows_EC: Tensor, relations_RC: Tensor, scorer: Scorer) -> Tensor:
    """Return float64 [U]: the mean magnitude of each unit's numbers, over entities and relations together."""
    sums_U, numbers = torch.zeros(1, dtype=torch.float64), 0
    for rows_NC, unit_columns in ((rows_EC, scorer.unit_columns), (relations_RC, scorer.relation_unit_columns)):
        sums_U = sums_U + rows_NC.abs().sum(0, dtype=torch.float64).unflatten(0, (-1, unit_columns)).sum(1)
        numbers += len(rows_NC) * unit_columns
    return sums_U / numbers


def unit_losses(
    job: Job, rows_EC: Tensor, relations_RC: Tensor, layout: Layout, validation: NDArray[np.int64]
) -> Tensor:
    """Return float64 [U]: the loss of the validation triples without each unit.

    Both sides, each against the same 64 uniform negatives for all units; the loss is the job's kind, unweighted:
    logistic with the job's margin, or the softmax over the true answer and the negatives.
    """
    scorer = layout.scorer
    losses_U, number = torch.zeros(layout.dims[0], dtype=torch.float64), 0
    loss = _loss_of(job, layout)
    draw = generator(job.seed, "removed units")
    step = max(1, _NUMBERS // ((1 + _NEGATIVES) * rows_EC.shape[1]))
    for query_PC, scale_PC, target_P in _queries(rows_EC, relations_RC, layout, validation, step):
        negatives_PK = torch.from_numpy(draw.integers(0, layout.num_entities, (len(target_P), _NEGATIVES)))
        candidates_PKC = rows_EC[torch.cat([target_P[:, None], negatives_PK], 1)]
        if scale_PC is not None:
            candidates_PKC = candidates_PKC * scale_PC[:, None]
        sums_PKU = _unit_sums(scorer, query_PC[:, None], candidates_PKC)
        without_PKU = sums_PKU.sum(2, keepdim=True) - sums_PKU
        losses_U += loss(_scores(scorer, without_PKU)).sum(0, dtype=torch.float64)
        number += len(target_P)
    return losses_U / number


def _queries(
    rows_EC: Tensor, relations_RC: Tensor, layout: Layout, triples: NDArray[np.int64], step: int
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Yield (query [P, C], the scorer's factor on candidates [P, C] if it has one, true answer [P]) of both sides."""
    scorer = layout.scorer
    sides: tuple[Side, ...] = ("tail", "head")
    for side in sides:
        for start in range(0, len(triples), step):
            head_P, relation_P, tail_P = torch.from_numpy(triples[start : start + step]).unbind(1)
            known_P, target_P = (head_P, tail_P) if side == "tail" else (tail_P, head_P)
            asked: Side = side
            if layout.reciprocal and side == "head":
                relation_P, asked = relation_P + layout.num_relations, "tail"
            relation_PC = relations_RC[relation_P]
            scale_PC = None if scorer.scale is None else scorer.scale(relation_PC, asked)
            yield scorer.query(rows_EC[known_P], relation_PC, asked), scale_PC, target_P


def _unit_sums(scorer: Scorer, query_P1C: Tensor, candidates_PKC: Tensor) -> Tensor:
    """Return what each unit adds to a score before the root of L2, [P, K, U]."""
    terms_PKC = query_P1C - candidates_PKC if scorer.is_distance else query_P1C * candidates_PKC
    terms_PKUc: Tensor = terms_PKC.unflatten(-1, (-1, scorer.unit_columns))
    match scorer.geometry:
        case "product":
            sums_PKU: Tensor = terms_PKUc.sum(-1)
        case "l2":
            sums_PKU = -terms_PKUc.square().sum(-1)
        case "l1":
            sums_PKU = -terms_PKUc.abs().sum(-1)
        case _:
            sums_PKU = -torch.linalg.vector_norm(terms_PKUc, dim=-1)
    return sums_PKU


def _scores(scorer: Scorer, sums: Tensor) -> Tensor:
    return -(-sums).clamp(min=0).sqrt() if scorer.geometry == "l2" else sums


def _loss_of(job: Job, layout: Layout) -> Callable[[Tensor], Tensor]:
    """Return the loss of scores [P, 1 + K, U] whose first is the true answer's, as [P, U]."""
    if job.loss.kind == "softmax":
        return lambda scores_PKU: -F.log_softmax(scores_PKU, 1)[:, 0]
    logits = logits_of(job.loss, layout.dims, is_distance=layout.scorer.is_distance, device=torch.device("cpu"))
    margin, temperature = logits.margins.item(), logits.temperatures.item()

    def logistic(scores_PKU: Tensor) -> Tensor:
        logits_PKU = temperature * (margin + scores_PKU)
        return F.softplus(-logits_PKU[:, 0]) + F.softplus(logits_PKU[:, 1:]).mean(1)

    return logistic


def _projected(rows_EC: Tensor, relations_RC: Tensor, layout: Layout) -> Arranged:
    """Return rows on the principal axes of the entities' units, most varied first.

    Translations survive any rotation of the axes: |h + r - t| is the same in all of them for L2; L1 distances are taken
    along the new axes. The other scorers' relations act on each unit by itself, as diagonal matrices, which new axes
    make dense: what is kept is their diagonal there, the nearest relation that acts unit by unit. Units of RotatE and
    ComplEx are complex numbers and have complex axes; both halves of SimplE's share theirs.
    """
    scorer = layout.scorer
    is_complex = scorer.name in ("rotate", "complex")

    def units(rows_NC: Tensor, parts: int) -> Tensor:
        """Return the units of rows [N, parts, U], complex where they are."""
        parts_NUp = rows_NC.double().unflatten(1, (-1, 2 if is_complex else parts))
        return torch.view_as_complex(parts_NUp.contiguous()).unsqueeze(1) if is_complex else parts_NUp.transpose(1, 2)

    entities_EpU = units(rows_EC, scorer.unit_columns)
    centred_NU = (entities_EpU - entities_EpU.mean(0)).flatten(0, 1)
    _, axes_UU = torch.linalg.eigh(centred_NU.mH @ centred_NU)
    # Eigenvectors come by rising variance, and with any sign, or phase.
    axes_UU = axes_UU.flip(1)
    axes_UU = axes_UU / torch.sgn(axes_UU.gather(0, axes_UU.abs().argmax(0, keepdim=True)))
    if scorer.name == "rotate":
        turns_RU = torch.polar(torch.ones_like(relations_RC, dtype=torch.float64), relations_RC.double())
        relations = (turns_RU @ axes_UU.abs().square().to(turns_RU)).angle()
    elif scorer.name == "transe":
        relations = relations_RC.double() @ axes_UU
    else:
        diagonals_RpU = units(relations_RC, scorer.relation_unit_columns)
        relations = _interleaved(diagonals_RpU @ axes_UU.abs().square().to(diagonals_RpU))
    return Arranged(_interleaved(entities_EpU @ axes_UU).float(), relations.float(), layout)


def _interleaved(units_NpU: Tensor) -> Tensor:
    """Return rows [N, U x columns of a unit] of units [N, parts, U], which may be complex."""
    if units_NpU.is_complex():
        return torch.view_as_real(units_NpU.squeeze(1)).flatten(1)
    return units_NpU.transpose(1, 2).flatten(1)
