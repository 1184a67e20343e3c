"""Scores of all sub-models from one pass over the columns.

A score is a sum over units, so sub-model i's score is a partial sum of the largest one's:

    s_i = B_i + kappa s_(i-1),   B_j = level j's own sum,   kappa = 1 (or the level's damping)

Distances: sums over groups of units (the largest group size that divides every boundary), then one small
product with the constant matrix of group weights kappa^(i - level). Products: one matrix product per level,
each added to the damped sum so far. Every column is read once, whatever the number of sub-models, and autograd
gives the reverse scan, where `med.reach` fades what a sub-model tells the levels below its own. `reference` holds
the plain twin that scores each sub-model on its own.

Shapes: X chunks of P positives (or queries) that share K candidates; C columns; n sub-models. Scores come
sub-model first, [n, X, P, K], so that each sub-model's scores lie together.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medscale.model.kernels.levels import Levels
from medscale.model.scoring import Scorer

__all__ = ["SLICE_NUMBERS", "PrefixScan", "prefix_scan"]

#: differences [x, P, K, C] computed at once, few enough to stay in a core's caches; with recomputation in the
#: backward pass, a step's memory does not grow with its positives either
SLICE_NUMBERS = 1 << 19


@dataclass(frozen=True)
class PrefixScan:
    """The constants of one pass: which sub-models, and how columns and groups weigh in each."""

    scorer: Scorer
    #: units of the sub-models to score, increasing
    dims: tuple[int, ...]
    #: columns up to which sub-models need rows
    num_columns: int
    #: [G, n]: weight of a group of units in a sub-model (0 beyond its end)
    group_weights_Gn: Tensor
    #: [G, n]: the same for derivatives
    returned_weights_Gn: Tensor
    #: [C]: weight of a column in the first of `dims` that holds it
    column_weights_C: Tensor
    #: [n]: weight of the sum so far when the next of `dims` begins
    carry_n: tuple[float, ...]
    #: the same for the kernels: all levels, and which of them complete one of `dims`
    levels: Levels

    def scores(self, query_XPC: Tensor, candidates_XKC: Tensor, scale_XPC: Tensor | None = None) -> Tensor:
        """Return scores [n, X, P, K] of every candidate for every query of its chunk.

        `scale_XPC` is the scorer's factor on the candidates' columns, where it has one. More columns than
        the largest sub-model needs are ignored.
        """
        query_XPC, candidates_XKC = query_XPC[..., : self.num_columns], candidates_XKC[..., : self.num_columns]
        if not self.scorer.is_distance:
            return torch.stack(self.product_scores(query_XPC, candidates_XKC))
        if scale_XPC is None:
            scale_XPC = query_XPC.new_ones((len(query_XPC), 1, 1))
        else:
            scale_XPC = scale_XPC[..., : self.num_columns]
        per_query = max(1, candidates_XKC.shape[1] * query_XPC.shape[2])
        num_queries = query_XPC.shape[1]
        if num_queries * per_query > SLICE_NUMBERS:
            chunks = zip(query_XPC.split(1), candidates_XKC.split(1), scale_XPC.split(1), strict=True)
            return torch.cat([self._chunk_scores(*chunk, max(1, SLICE_NUMBERS // per_query)) for chunk in chunks], 1)
        size = max(1, SLICE_NUMBERS // max(1, num_queries * per_query))
        slices = zip(query_XPC.split(size), candidates_XKC.split(size), scale_XPC.split(size), strict=True)
        return torch.cat([_recomputed(self._distance_scores, *each) for each in slices], 1)

    def _chunk_scores(self, query_1PC: Tensor, candidates_1KC: Tensor, scale_1PC: Tensor, size: int) -> Tensor:
        """Return distance scores [n, 1, P, K] of one chunk, `size` queries at a time."""
        scales = scale_1PC.expand(-1, query_1PC.shape[1], -1).split(size, 1)
        parts = zip(query_1PC.split(size, 1), scales, strict=True)
        return torch.cat([_recomputed(self._distance_scores, q, candidates_1KC, s) for q, s in parts], 2)

    def pair_scores(self, query_RC: Tensor, candidate_RC: Tensor, scale_RC: Tensor | None = None) -> Tensor:
        """Return scores [n, R] of one candidate for each query."""
        scale_R1C = None if scale_RC is None else scale_RC.unsqueeze(1)
        return self.scores(query_RC.unsqueeze(1), candidate_RC.unsqueeze(1), scale_R1C)[:, :, 0, 0]

    def product_scores(self, query_XPC: Tensor, candidates_XKC: Tensor) -> list[Tensor]:
        """Return n score tensors [X, P, K] of a product scorer, smallest sub-model first."""
        assert not self.scorer.is_distance
        weighted_XPC = query_XPC * self.column_weights_C
        sums: list[Tensor] = []
        start = 0
        for dim, carry in zip(self.dims, self.carry_n, strict=True):
            stop = dim * self.scorer.unit_columns
            level_XPc = weighted_XPC[..., start:stop]
            level_XcK = candidates_XKC[..., start:stop].transpose(1, 2)
            if sums:
                below = sums[-1] if self.levels.reach == 1 else sums[-1].detach().lerp(sums[-1], self.levels.reach)
                sums.append(torch.baddbmm(below, level_XPc, level_XcK, beta=carry))
            else:
                sums.append(level_XPc @ level_XcK)
            start = stop
        return sums

    def _distance_scores(self, query_XPC: Tensor, candidates_XKC: Tensor, scale_XPC: Tensor) -> Tensor:
        candidates_XPKC = candidates_XKC.unsqueeze(1)
        if self.scorer.scale is not None:
            candidates_XPKC = candidates_XPKC * scale_XPC.unsqueeze(2)
        difference_XPKC = query_XPC.unsqueeze(2) - candidates_XPKC
        groups_XPKGc = difference_XPKC.unflatten(-1, (self.group_weights_Gn.shape[0], -1))
        match self.scorer.geometry:
            case "l1":
                sums_XPKG = groups_XPKGc.abs().sum(-1)
            case "l2":
                sums_XPKG = groups_XPKGc.square().sum(-1)
            case _:
                sums_XPKG = torch.linalg.vector_norm(groups_XPKGc.unflatten(-1, (-1, 2)), dim=-1).sum(-1)
        if not torch.is_grad_enabled():
            scores_nXPK = self._summed_in_order(sums_XPKG)
            return -_safe_sqrt(scores_nXPK) if self.scorer.geometry == "l2" else -scores_nXPK
        scores_nXPK = torch.einsum("xpkg,gn->nxpk", sums_XPKG, self.returned_weights_Gn)
        if self.levels.reach < 1:
            kept_Gn = self.group_weights_Gn - self.returned_weights_Gn
            scores_nXPK = scores_nXPK + torch.einsum("xpkg,gn->nxpk", sums_XPKG.detach(), kept_Gn)
        return -_safe_sqrt(scores_nXPK) if self.scorer.geometry == "l2" else -scores_nXPK

    def _summed_in_order(self, sums_XPKG: Tensor) -> Tensor:
        """Return [n, X, P, K] of groups' sums, one group after the other.

        When entities are ranked equal ones tie, but how a matrix product rounds a row depends, on some CPUs, on where
        the row lies.
        """
        size = self.dims[-1] // sums_XPKG.shape[-1]
        scores_nXPK = sums_XPKG.new_empty((len(self.dims), *sums_XPKG.shape[:-1]))
        total_XPK, start = torch.zeros_like(sums_XPKG[..., 0]), 0
        for i, (dim, carry) in enumerate(zip(self.dims, self.carry_n, strict=True)):
            own_XPKg = sums_XPKG[..., start : dim // size] * self.group_weights_Gn[start : dim // size, i]
            total_XPK = carry * total_XPK + own_XPKg.cumsum(-1)[..., -1]
            scores_nXPK[i] = total_XPK
            start = dim // size
        return scores_nXPK


def prefix_scan(
    scorer: Scorer,
    dims: Sequence[int],
    damping: Sequence[float] | None = None,
    selected: Sequence[int] | None = None,
    *,
    reach: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PrefixScan:
    """Return the scan over all sub-models of `dims`, or over those at the `selected` positions only.

    `damping` is the kappa of each level above the first (none: 1). Skipping a sub-model changes no score of the
    others: their damping counts the levels of the full list. With a `reach` below 1 none is skipped.
    """
    kappas = [1.0] * (len(dims) - 1) if damping is None else list(damping)
    assert len(kappas) == len(dims) - 1, (len(kappas), len(dims))

    def weight(level: int, sub_model: int) -> float:
        """Return how much a level's own sum counts in a sub-model's score."""
        return math.prod(kappas[level:sub_model])

    positions = list(range(len(dims))) if selected is None else list(selected)
    assert reach == 1 or len(positions) == len(dims), (reach, positions)
    boundaries = [dims[i] for i in positions]
    # levels matter only where they are damped apart; a common divisor keeps groups inside levels
    size = math.gcd(*(dims if min(kappas, default=1) < 1 else boundaries))
    units = range(boundaries[-1])
    level_of = _levels(dims, units)
    weights = [[weight(level_of[u], i) if u < dims[i] else 0.0 for i in positions] for u in units[::size]]
    returned = [
        [w * reach ** (i - level_of[u]) if w else 0.0 for i, w in zip(positions, row, strict=True)]
        for u, row in zip(units[::size], weights, strict=True)
    ]
    holder = [positions[next(p for p, b in enumerate(boundaries) if unit < b)] for unit in units]
    column_weights = [weight(level, i) for level, i in zip(level_of, holder, strict=True)]
    carry = [0.0] + [weight(a, b) for a, b in itertools.pairwise(positions)]
    return PrefixScan(
        scorer=scorer,
        dims=tuple(boundaries),
        num_columns=boundaries[-1] * scorer.unit_columns,
        group_weights_Gn=torch.tensor(weights, dtype=dtype, device=device),
        returned_weights_Gn=torch.tensor(returned, dtype=dtype, device=device),
        column_weights_C=torch.tensor(column_weights, dtype=dtype, device=device).repeat_interleave(
            scorer.unit_columns
        ),
        carry_n=tuple(carry),
        levels=Levels(
            geometry=scorer.geometry,
            ends=tuple(dim * scorer.unit_columns for dim in dims[: positions[-1] + 1]),
            kappas=(1.0, *kappas[: positions[-1]]),
            outputs=tuple(positions.index(i) if i in positions else -1 for i in range(positions[-1] + 1)),
            reach=reach,
        ),
    )


def _levels(dims: Sequence[int], units: range) -> list[int]:
    """Return the level (0-based) of each unit."""
    return [next(i for i, dim in enumerate(dims) if unit < dim) for unit in units]


def _recomputed(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """Call a function so that its intermediate results are computed again in the backward pass, not kept."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return cast(Tensor, checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False))


def _safe_sqrt(squares: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0, as a distance's is chosen to be, instead of infinite."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)
