"""Batches for softmax losses: queries (known entity, relation, side) with all their answers at once.

Grouping the triples of a query into one row of scores gives the same loss as single triples, for a fraction
of the rows. Candidates are all entities, or the batch's own plus a uniform sample of the others, weighted so
that the partition function is estimated without bias.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medscale.batches.order import EpochOrder
from medscale.config import NegativesSection
from medscale.seed import generator
from medscale.workers import ALONE, Workers

__all__ = ["QueryBatch", "QueryBatches", "QueryTable", "Targets", "query_table"]

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class QueryTable:
    """All queries of a graph, both sides, each with at most `max_tails` answers."""

    #: int64[G]
    known_G: Ids
    #: int64[G]: row of the relation table
    relation_G: Ids
    #: bool[G]: the head is asked for, by the scorer's own formula (never with reciprocal relations)
    asks_head_G: NDArray[np.bool_]
    #: int64[G + 1]: where each query's answers begin
    offsets_G: Ids
    #: int64[2 * num_triples]
    answers: Ids


def query_table(triples: Ids, num_relations: int, *, reciprocal: bool, max_tails: int) -> QueryTable:
    """Group int64 [N, 3] triples into queries for their tails and for their heads."""
    heads, relations, tails = triples.T
    asks_head = np.repeat([False, True], len(triples))
    known = np.concatenate([heads, tails])
    # Inverse relations are rows of their own; without them the side keeps the two kinds of query apart.
    relation = np.concatenate([relations, relations + num_relations])
    answers = np.concatenate([tails, heads])
    order = np.lexsort((answers, known, relation))
    known, relation, answers, asks_head = known[order], relation[order], answers[order], asks_head[order]
    starts_query = np.ones(len(known), dtype=bool)
    starts_query[1:] = (known[1:] != known[:-1]) | (relation[1:] != relation[:-1])
    first = np.flatnonzero(starts_query)
    rank = np.arange(len(known)) - np.repeat(first, np.diff(np.append(first, len(known))))
    begins = np.flatnonzero(rank % max_tails == 0)
    if not reciprocal:
        relation = relation % num_relations
        return QueryTable(known[begins], relation[begins], asks_head[begins], np.append(begins, len(known)), answers)
    never = np.zeros(len(begins), dtype=bool)
    return QueryTable(known[begins], relation[begins], never, np.append(begins, len(known)), answers)


@dataclass(frozen=True)
class Targets:
    """Which candidates answer which queries: T pairs, sorted by query."""

    #: int64[T]
    query_T: Tensor
    #: int64[T]: position among the candidates
    candidate_T: Tensor


@dataclass(frozen=True)
class QueryBatch:
    """One step's queries; those that ask for tails come first."""

    #: int64[M]: the candidates, looked up once; the first U are the batch's own
    entities_U: Tensor
    #: int64[Q]: positions among the candidates
    known_Q: Tensor
    #: int64[Q]: rows of the relation table
    relation_Q: Tensor
    #: queries that ask for tails
    num_tail_queries: int
    targets: Targets
    #: float32[M]: log of how many entities a candidate stands for; None: all are there
    bias_M: Tensor | None
    #: queries and answers of all workers; the candidates are those of all
    total_queries: int
    total_targets: int

    @property
    def num_triples(self) -> float:
        """Half the answers of all workers: each triple is asked for from both sides in an epoch."""
        return self.total_targets / 2

    def to(self, device: torch.device) -> "QueryBatch":
        """Return the batch on a device."""
        return QueryBatch(
            self.entities_U.to(device), self.known_Q.to(device), self.relation_Q.to(device), self.num_tail_queries,
            Targets(self.targets.query_T.to(device), self.targets.candidate_T.to(device)),
            None if self.bias_M is None else self.bias_M.to(device), self.total_queries, self.total_targets,
        )  # fmt: skip


@dataclass(frozen=True)
class QueryBatches:
    """All batches of a run, by step."""

    table: QueryTable
    num_entities: int
    section: NegativesSection
    batch_size: int
    seed: int
    #: each gets a share of every batch's queries, and all its candidates
    workers: Workers = ALONE

    @property
    def steps_per_epoch(self) -> int:
        """Steps that visit every query once; the last one may be short."""
        return -(-len(self.table.known_G) // self.batch_size)

    def batch(self, step: int) -> QueryBatch:
        """Return the batch of a step (0-based)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        num_queries = len(self.table.known_G)
        order = EpochOrder(num_queries, self.seed)
        chosen = order.indices(epoch, start, min(start + self.batch_size, num_queries))
        chosen = chosen[np.argsort(self.table.asks_head_G[chosen], kind="stable")]
        total_queries, (counts, answers) = len(chosen), self._answers(chosen)
        candidates, bias = self._candidates(self.table.known_G[chosen], answers, step)
        total_targets = len(answers)
        chosen = chosen[self.workers.share(total_queries)]
        counts, answers = self._answers(chosen)
        position_of = np.argsort(candidates, kind="stable")
        lookup = candidates[position_of]

        def positions(ids: Ids) -> Tensor:
            return torch.from_numpy(position_of[np.searchsorted(lookup, ids)])

        return QueryBatch(
            entities_U=torch.from_numpy(candidates),
            known_Q=positions(self.table.known_G[chosen]),
            relation_Q=torch.from_numpy(self.table.relation_G[chosen]),
            num_tail_queries=int((~self.table.asks_head_G[chosen]).sum()),
            targets=Targets(torch.from_numpy(np.repeat(np.arange(len(chosen)), counts)), positions(answers)),
            bias_M=bias,
            total_queries=total_queries,
            total_targets=total_targets,
        )

    def described(self) -> dict[str, Any]:
        """Return nothing for the run's log: all triples are in memory, and nothing is read."""
        return {}

    def _answers(self, queries: Ids) -> tuple[Ids, Ids]:
        """Return (number of answers of each query, all of them)."""
        counts = self.table.offsets_G[queries + 1] - self.table.offsets_G[queries]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return counts, self.table.answers[np.repeat(self.table.offsets_G[queries], counts) + within]

    def _candidates(self, known: Ids, answers: Ids, step: int) -> tuple[Ids, Tensor | None]:
        if self.section.kind == "all":
            return np.arange(self.num_entities), None
        own = np.unique(np.concatenate([known, answers]))
        outside = self.num_entities - len(own)
        if outside <= self.section.number:
            return np.arange(self.num_entities), None
        sampled = _sample_outside(own, self.num_entities, self.section.number, generator(self.seed, "candidates", step))
        bias = torch.zeros(len(own) + len(sampled))
        bias[len(own) :] = math.log(outside / len(sampled))
        return np.concatenate([own, sampled]), bias


def _sample_outside(own: Ids, num_entities: int, number: int, draws: np.random.Generator) -> Ids:
    """Draw distinct entities uniformly from those not in `own` (sorted)."""
    ranks = draws.choice(num_entities - len(own), size=number, replace=False, shuffle=False)
    # the r-th entity outside `own` is r plus how many of `own` come before it
    return ranks + np.searchsorted(own - np.arange(len(own)), ranks, side="right")
