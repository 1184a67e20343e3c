"""Batches for binary losses: positives, and what each is compared with.

A **corruption** asks chunks of positives for one side and offers each chunk K candidates. Fresh negatives per
positive are chunks of one; shared ones are larger chunks; in-batch ones take a chunk's own targets. Everything
is a pure function of (seed, step): chunks belong to the job, not to a worker.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medscale.batches.partitions import Feed
from medscale.config import NegativesSection
from medscale.graph.known_triples import KnownTriples
from medscale.graph.side import Side
from medscale.seed import generator
from medscale.workers import ALONE, Workers

__all__ = ["Corruption", "CorruptionBatch", "CorruptionBatches"]

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Corruption:
    """X chunks of P positives, and K candidates per chunk for the side asked for.

    Entities are positions in the batch's `entities_U`.
    """

    #: which formula of the scorer asks; reciprocal models always ask for tails, with inverse relations
    side: Side
    #: int64[X, P]: the entity on the other side
    known_XP: Tensor
    #: int64[X, P]: row of the relation table
    relation_XP: Tensor
    #: int64[X, P]: the true answer
    target_XP: Tensor
    #: int64[X, K]
    candidates_XK: Tensor
    #: bool[X, P, K]: False where a candidate is no negative: the target itself, or a known triple if filtered
    keep_XPK: Tensor
    #: positives of all workers; X chunks are this worker's
    total_positives: int

    @property
    def num_positives(self) -> int:
        """X * P."""
        return self.known_XP.numel()


@dataclass(frozen=True)
class CorruptionBatch:
    """One step's triples, their corruptions, and the distinct entities they touch."""

    #: int64[U], sorted: looked up once
    entities_U: Tensor
    corruptions: tuple[Corruption, ...]
    #: training triples in this batch, of all workers
    num_triples: int

    def to(self, device: torch.device) -> "CorruptionBatch":
        """Return the batch on a device."""
        corruptions = []
        for c in self.corruptions:
            moved: dict[str, Any] = {
                name: value.to(device, non_blocking=True)
                for name, value in vars(c).items()
                if isinstance(value, Tensor)
            }
            corruptions.append(replace(c, **moved))
        return CorruptionBatch(self.entities_U.to(device), tuple(corruptions), self.num_triples)


@dataclass(frozen=True)
class CorruptionBatches:
    """All batches of a run, by step."""

    feed: Feed
    num_entities: int
    num_relations: int
    section: NegativesSection
    batch_size: int
    reciprocal: bool
    seed: int
    #: training triples, where the job filters them out of the negatives
    known: KnownTriples | None
    #: each gets a share of every corruption's chunks, which do not depend on how many workers there are
    workers: Workers = ALONE

    @property
    def steps_per_epoch(self) -> int:
        """Steps that visit every triple once; the last one may be short."""
        return -(-len(self.feed.order) // self.batch_size)

    def batch(self, step: int) -> CorruptionBatch:
        """Return the batch of a step (0-based)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        triples = self.feed.triples(epoch, start, min(start + self.batch_size, len(self.feed.order)))
        draws = generator(self.seed, "negatives", step)
        parts = [self._corruption(*part, draws) for part in self._parts(triples, step)]
        return _compact(parts, self.workers, len(triples))

    def described(self) -> dict[str, Any]:
        """Return, for the run's log, what the readers have done."""
        return self.feed.described()

    def _parts(self, triples: Ids, step: int) -> Iterator[tuple[Side, Ids, int]]:
        """Yield (side to replace, triples [X, P, 3], candidates per chunk)."""
        section = self.section
        if section.kind == "per_positive":
            sides: tuple[Side, ...] = ("tail", "head") if section.corrupt == "both" else (section.corrupt,)
            for side in sides:
                yield side, triples[:, None], section.number // len(sides)
            return
        size = section.chunk_size
        whole = len(triples) - len(triples) % size
        chunks = triples[:whole].reshape(-1, size, 3)
        first = step * (self.batch_size // size)
        replaces_tail = np.array([self._side(first + i) == "tail" for i in range(len(chunks))], dtype=bool)
        if replaces_tail.any():
            yield "tail", chunks[replaces_tail], section.number
        if not replaces_tail.all():
            yield "head", chunks[~replaces_tail], section.number
        if whole < len(triples):
            yield self._side(first + len(chunks)), triples[None, whole:], section.number

    def _side(self, chunk: int) -> Side:
        """Return the side that a chunk, counted over the run, replaces."""
        if self.section.corrupt != "both":
            return self.section.corrupt
        return "tail" if chunk % 2 == 0 else "head"

    def _corruption(
        self, side: Side, triples_XP3: Ids, num_candidates: int, draws: np.random.Generator
    ) -> tuple[Side, dict[str, Ids]]:
        heads, relations, tails = (triples_XP3[..., i] for i in range(3))
        known, target = (heads, tails) if side == "tail" else (tails, heads)
        if self.section.kind == "in_batch":
            candidates = target
        else:
            candidates = draws.integers(0, self.num_entities, size=(len(target), num_candidates))
        keep = candidates[:, None, :] != target[..., None]
        if self.known is not None:
            filler = (candidates[:, None, :], known[..., None])
            head, tail = filler if side == "head" else filler[::-1]
            keep &= ~self.known.contains(head, relations[..., None], tail)
        if self.reciprocal and side == "head":
            side, relations = "tail", relations + self.num_relations
        return side, {
            "known_XP": known, "relation_XP": relations, "target_XP": target,
            "candidates_XK": candidates, "keep_XPK": keep,
        }  # fmt: skip


_ENTITY_FIELDS = ("known_XP", "target_XP", "candidates_XK")


def _compact(parts: list[tuple[Side, dict[str, Ids]]], workers: Workers, num_triples: int) -> CorruptionBatch:
    """Keep a worker's share, and replace entity ids by positions among its distinct ones."""
    totals = [fields["known_XP"].size for _, fields in parts]
    parts = [
        (side, {name: ids[workers.share(len(fields["known_XP"]))] for name, ids in fields.items()})
        for side, fields in parts
    ]
    flat = [fields[name].reshape(-1) for _, fields in parts for name in _ENTITY_FIELDS]
    entities, inverse = np.unique(np.concatenate(flat), return_inverse=True)
    pieces = iter(np.split(inverse.astype(np.int64), np.cumsum([len(piece) for piece in flat])[:-1]))
    corruptions = []
    for (side, fields), total in zip(parts, totals, strict=True):
        positions = {name: next(pieces).reshape(fields[name].shape) for name in _ENTITY_FIELDS}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in (fields | positions).items()}
        corruptions.append(Corruption(side=side, total_positives=total, **tensors))
    return CorruptionBatch(torch.from_numpy(entities), tuple(corruptions), num_triples)
