"""Filtered ranks of all sub-models in one scan over the entities, and what is made of them.

For a query, an entity's rank in sub-model i is 1 + how many other entities score better + half of those that
score the same (the realistic, or mean, rank). Known answers other than the target do not count (filtered).
Nothing of size queries x entities x sub-models outlives one chunk of entities.
"""

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medscale.errors import NonFiniteError
from medscale.graph.known_triples import KnownTriples
from medscale.graph.side import Side
from medscale.model.layout import Layout
from medscale.model.prefix import PrefixScan, prefix_scan
from medscale.seed import generator

__all__ = [
    "EntityRows",
    "Ranks",
    "ability_retention",
    "count_halves",
    "rank_all",
    "records_of",
    "relation_records",
    "sample_triples",
]

#: queries scored together
_QUERIES = 1024
#: triples ranked in one pass over the entities
_PASS = 4 * _QUERIES


@dataclass(frozen=True)
class Ranks:
    """float64[n, T] per side: the filtered rank of each triple's head and tail in every sub-model."""

    dims: tuple[int, ...]
    head: NDArray[np.float64]
    tail: NDArray[np.float64]

    @classmethod
    def of_halves(cls, dims: tuple[int, ...], halves_2nT: NDArray[np.int64]) -> "Ranks":
        """Return the ranks that `count_halves` over all entities give."""
        tail, head = 1 + halves_2nT / 2
        return cls(dims, head, tail)

    def of(self, side: str) -> NDArray[np.float64]:
        """Return ranks of one side, or of both ([n, 2 T])."""
        return np.concatenate([self.head, self.tail], 1) if side == "both" else getattr(self, side)


class EntityRows(Protocol):
    """The entity table as ranking reads it: the candidates here, and any row that a query needs.

    Of several holders each has some of the candidates, or all; calls may be collective.
    """

    @property
    def candidates(self) -> range:
        """The entities to rank against."""

    def gather(self, entities: Tensor) -> Tensor:
        """Return rows [U, C] by id [U]."""

    def slice(self, start: int, stop: int) -> Tensor:
        """Return rows [stop - start, C] of candidates."""


def rank_all(
    triples: NDArray[np.int64], rows: EntityRows, relations_RC: Tensor, layout: Layout, known: KnownTriples,
    *, memory_mib: int = 512, kernels: str = "auto", advance: Callable[[int], None] | None = None,
) -> Ranks:  # fmt: skip
    """Return the ranks of int64 [T, 3] triples among all entities; `advance` hears how many triples are ranked."""
    assert rows.candidates == range(layout.num_entities), "some candidates only: add up what all count"
    halves_2nT = count_halves(
        triples, rows, relations_RC, layout, known, memory_mib=memory_mib, kernels=kernels, advance=advance
    )
    return Ranks.of_halves(layout.dims, halves_2nT)


@torch.no_grad()
def count_halves(
    triples: NDArray[np.int64], rows: EntityRows, relations_RC: Tensor, layout: Layout, known: KnownTriples,
    *, memory_mib: int = 512, kernels: str = "auto", most: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> NDArray[np.int64]:  # fmt: skip
    """Return int64 [2, n, T]: 2 x (candidates better than the true tail, head) + (candidates as good), per sub-model.

    `triples` is int64[T, 3]; `known` holds the triples that do not count as wrong answers. Counts of disjoint
    candidates add up. Where calls of `rows` are collective, `most` is the number of triples of the worker that has
    most: all make as many calls. `kernels` is the job's `runtime.kernels`.

    Raises:
        NonFiniteError: the model holds numbers that are not finite.

    """
    scan = prefix_scan(layout.scorer, layout.dims, layout.damping, dtype=relations_RC.dtype, device=relations_RC.device)
    most = len(triples) if most is None else most
    step = _entities_per_chunk(scan, min(_QUERIES, most), memory_mib, kernels)
    count = functools.partial(_plain_counts, scan) if kernels == "torch" else _kernel_counts(scan, relations_RC.device)
    halves_2nT = np.zeros((2, len(scan.dims), len(triples)), dtype=np.int64)
    sides: tuple[Side, Side] = ("tail", "head")
    for halves_nT, side in zip(halves_2nT, sides, strict=True):
        for start in range(0, most, _PASS):
            group = slice(start, start + _PASS)
            asked = _asked(triples[group], side, scan, rows, relations_RC, layout, known)
            for first in range(rows.candidates.start, rows.candidates.stop, step):
                entities_NC = rows.slice(first, min(first + step, rows.candidates.stop))
                _require_finite(entities_NC, f"rows {first} to {first + len(entities_NC) - 1} of the entity table")
                for queries in asked:
                    queries.count(count, entities_NC, first)
            for place, queries in enumerate(asked):
                begin = start + place * _QUERIES
                halves_nT[:, begin : begin + _QUERIES] = queries.halves_nQ.cpu().numpy()
            if advance:
                advance(len(triples[group]))
    return halves_2nT


def sample_triples(triples: NDArray[np.int64], number: int | None, seed: int) -> NDArray[np.int64]:
    """Return a seeded sample of int64[T, 3] triples, or all of them."""
    if number is None or number >= len(triples):
        return triples
    return triples[np.sort(generator(seed, "sample").choice(len(triples), number, replace=False))]


@dataclass(frozen=True)
class _Queries:
    """Queries that are scored together, and what has been counted for them."""

    query_QC: Tensor
    scale_QC: Tensor | None
    target_QC: Tensor
    #: pairs (query, entity) that do not count, sorted by entity
    excluded_query_E: NDArray[np.int64]
    excluded_entity_E: NDArray[np.int64]
    #: int64[n, Q]
    halves_nQ: Tensor

    def count(self, kernel: Callable[..., None], entities_NC: Tensor, first: int) -> None:
        """Count entities first .. first + N - 1."""
        begin, end = np.searchsorted(self.excluded_entity_E, [first, first + len(entities_NC)])
        excluded = [
            torch.from_numpy(ids[begin:end]).to(entities_NC.device)
            for ids in (self.excluded_query_E, self.excluded_entity_E)
        ]
        kernel(self.query_QC, self.scale_QC, self.target_QC, entities_NC, first, *excluded, self.halves_nQ)


def _asked(
    triples: NDArray[np.int64], side: Side, scan: PrefixScan, rows: EntityRows, relations_RC: Tensor, layout: Layout,
    known: KnownTriples,
) -> list[_Queries]:  # fmt: skip
    """Return the queries for one side of int64 [T, 3] triples, portion by portion."""
    device = relations_RC.device
    given, target = (0, 2) if side == "tail" else (2, 0)
    ids = torch.from_numpy(np.concatenate([triples[:, given], triples[:, target]])).to(device)
    given_TC, target_TC = rows.gather(ids).chunk(2) if len(triples) else (ids, ids)
    asked = []
    for start in range(0, len(triples), _QUERIES):
        part = slice(start, start + _QUERIES)
        known_ids, relation_ids, target_ids = triples[part, given], triples[part, 1], triples[part, target]
        excluded = _excluded(*known.answers(side, known_ids, relation_ids), target_ids)
        asked_side: Side = side
        if layout.reciprocal and side == "head":
            asked_side, relation_ids = "tail", relation_ids + layout.num_relations
        relation_QR = relations_RC[torch.from_numpy(relation_ids).to(device)]
        query_QC = layout.scorer.query(given_TC[part], relation_QR, asked_side)
        scale_QC = layout.scorer.scale(relation_QR, asked_side) if layout.scorer.scale else None
        _require_finite(query_QC, "queries")
        if scale_QC is not None:
            _require_finite(scale_QC, "relations' factors")
        _require_finite(target_TC[part], "rows of true answers")
        # finite columns may still add up to more than a number can hold
        _require_finite(scan.pair_scores(query_QC, target_TC[part], scale_QC), "scores of true answers")
        halves_nQ = torch.zeros((len(scan.dims), len(query_QC)), dtype=torch.int64, device=device)
        asked.append(_Queries(query_QC, scale_QC, target_TC[part], *excluded, halves_nQ))
    return asked


def _kernel_counts(scan: PrefixScan, device: torch.device) -> Callable[..., None]:
    """Return the ranking kernel of a device."""
    name = "triton_ranks" if device.type == "cuda" else "cpu_ranks"
    return functools.partial(importlib.import_module(f"medscale.model.kernels.{name}").rank_counts, scan.levels)


def _plain_counts(
    scan: PrefixScan, query_QC: Tensor, scale_QC: Tensor | None, target_QC: Tensor, entities_NC: Tensor, first: int,
    excluded_query_E: Tensor, excluded_entity_E: Tensor, halves_nQ: Tensor,
) -> None:  # fmt: skip
    """Add 2 x (how many entities score better than the target) + (how many the same): the kernels' plain twin.

    `entities_NC` are the rows of entities first .. first + N - 1. Excluded pairs (query, entity) do not count.
    """
    target_nQ = _target_scores(scan, query_QC, target_QC, scale_QC)
    excluded_entity_E = excluded_entity_E - first
    for i, scores_QN in enumerate(_chunk_scores(scan, query_QC, entities_NC, scale_QC)):
        target_Q1 = target_nQ[i].unsqueeze(1)
        halves_nQ[i] += (scores_QN > target_Q1).sum(1) + (scores_QN >= target_Q1).sum(1)
        # Taking known answers out again touches a few cells; masking them would touch all.
        excluded_E, against_E = scores_QN[excluded_query_E, excluded_entity_E], target_nQ[i][excluded_query_E]
        halves_E = (excluded_E > against_E).long() + (excluded_E >= against_E).long()
        halves_nQ[i].index_add_(0, excluded_query_E, halves_E, alpha=-1)


def _require_finite(values: Tensor, what: str) -> None:
    """Refuse to rank with NaN, which compares as neither better nor equal and would rank first."""
    if not torch.isfinite(values).all():
        raise NonFiniteError(f"{what} are not finite: this model cannot be ranked; go back to an older checkpoint")


def _chunk_scores(scan: PrefixScan, query_QC: Tensor, entities_NC: Tensor, scale_QC: Tensor | None) -> Iterator[Tensor]:
    """Yield scores [Q, N] of each sub-model, smallest first."""
    if scan.scorer.is_distance:
        scale = None if scale_QC is None else scale_QC.unsqueeze(0)
        yield from scan.scores(query_QC.unsqueeze(0), entities_NC.unsqueeze(0), scale).squeeze(1)
    else:
        for scores_1QN in scan.product_scores(query_QC.unsqueeze(0), entities_NC.unsqueeze(0)):
            yield scores_1QN.squeeze(0)


def _target_scores(scan: PrefixScan, query_QC: Tensor, target_QC: Tensor, scale_QC: Tensor | None) -> Tensor:
    """Return scores [n, Q] of the true answers, by the same arithmetic as all candidates', so that ties are ties.

    Products come out of the same kind of matrix product as the scan's, as its diagonal.
    """
    if scan.scorer.is_distance:
        return scan.pair_scores(query_QC, target_QC, scale_QC)
    return torch.stack([s.diagonal() for s in _chunk_scores(scan, query_QC, target_QC, scale_QC)])


def _excluded(
    offsets: NDArray[np.int64], answers: NDArray[np.int64], target: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (query, entity) pairs that do not count, the targets included, sorted by entity, each once."""
    query = np.concatenate([np.repeat(np.arange(len(target)), np.diff(offsets)), np.arange(len(target))])
    entity = np.concatenate([answers, target])
    pairs = np.unique(np.stack([entity, query]), axis=1)
    return pairs[1], pairs[0]


def _entities_per_chunk(scan: PrefixScan, num_queries: int, memory_mib: int, kernels: str) -> int:
    """Return how many entities keep the chunk's tensors within the memory."""
    num_groups, num_sub_models = scan.group_weights_Gn.shape
    if kernels == "auto":
        # the kernels hold nothing but the entities' columns, as they are and as tiles; what checks them, a third time
        return max(1, memory_mib * 2**20 // (3 * scan.group_weights_Gn.element_size() * scan.num_columns))
    per_pair = num_sub_models + (2 * scan.num_columns + num_groups if scan.scorer.is_distance else 2)
    per_entity = per_pair * num_queries + 2 * scan.num_columns
    # Elementwise distances are fastest while a chunk stays in the caches.
    budget = min(memory_mib, 32) if scan.scorer.is_distance else memory_mib
    return max(1, int(budget * 2**20 / (4 * per_entity)))


def records_of(ranks: Ranks, split: str) -> list[dict[str, Any]]:
    """Return the records of evaluation.json: per dim, the field's protocol for each side, and the paper's.

    Field: reciprocals of both sides' ranks are averaged. Paper: a triple's head and tail ranks are averaged
    first, which never gives more.
    """
    records = []
    averaged = (ranks.head + ranks.tail) / 2
    for i, dim in enumerate(ranks.dims):
        for side in ("both", "head", "tail"):
            records.append(
                {"dim": dim, "split": split, "protocol": "field", "side": side, **_metrics(ranks.of(side)[i])}
            )
        records.append({"dim": dim, "split": split, "protocol": "paper", "side": "both", **_metrics(averaged[i])})
    return records


def _metrics(ranks: NDArray[np.float64]) -> dict[str, float | int]:
    if not len(ranks):
        return {"mrr": 0.0, "hits@1": 0.0, "hits@3": 0.0, "hits@10": 0.0, "mean_rank": 0.0, "num_queries": 0}
    hits = {f"hits@{k}": float((ranks <= k).mean()) for k in (1, 3, 10)}
    return {
        "mrr": float((1 / ranks).mean()),
        **hits,
        "mean_rank": float(ranks.mean()),
        "num_queries": len(ranks),
    }


def relation_records(ranks: Ranks, relations: NDArray[np.int64], names: list[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the field's metrics per relation, side and dim; `relations` is int64[T]."""
    for relation in np.unique(relations):
        mask = relations == relation
        part = Ranks(ranks.dims, ranks.head[:, mask], ranks.tail[:, mask])
        for i, dim in enumerate(ranks.dims):
            for side in ("both", "head", "tail"):
                yield {"relation": names[relation], "dim": dim, "side": side, **_metrics(part.of(side)[i])}


def ability_retention(correct_nQ: NDArray[np.bool_]) -> float:
    """Return the ability retention ratio (section 5.6.3 of the paper), in [0, 1], of sub-models' right answers.

    Of the queries that some sub-model answers among its first ten, the share where every larger one than the
    smallest that does so answers it too.
    """
    somewhere = correct_nQ.any(0)
    kept = np.maximum.accumulate(correct_nQ, 0) == correct_nQ
    return float(kept.all(0)[somewhere].mean()) if somewhere.any() else 0.0
