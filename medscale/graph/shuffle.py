"""From chunks of codes to shuffled triples: ids, then ranges of a seeded hash, sorted, without duplicates.

Equal triples have equal hashes, so a range finds its duplicates, and the triples that two splits share, alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from medscale.graph.chunks import Kind
from medscale.graph.hashing import hashes
from medscale.graph.schema import SPLITS, TRIPLE_COLUMNS
from medscale.graph.spill import copied, spill, spilled
from medscale.graph.vocab import Piece, ids_of_codes
from medscale.logs import Advance

__all__ = ["HashRange", "Shuffled", "Translation", "hash_ranges", "shuffle", "translate"]

Ints = npt.NDArray[np.int64]


class Translation(NamedTuple):
    """A chunk whose rows are to be written with ids: (hash uint64; head, relation, tail int64; split, seen uint8)."""

    rows: Path
    #: the chunk's names, sorted, and where they find their ids, by kind
    names: Mapping[Kind, tuple[Path, tuple[Piece, ...]]]
    target: Path
    seed: int


class HashRange(NamedTuple):
    """The rows of all chunks with hashes from `low` up to but without `high`."""

    low: int
    high: int
    sources: tuple[Path, ...]
    #: by split: where its triples go (head, relation, tail)
    targets: tuple[Path, ...]
    drop_unseen: bool


class Shuffled(NamedTuple):
    """What a range held of one split."""

    num_rows: int
    num_distinct: int
    #: distinct triples with a name unseen in train
    num_unseen: int
    num_written: int
    #: those also in train
    num_leaks: int


def translate(one: Translation, advance: Advance) -> None:
    """Write the rows of a chunk with ids, sorted by their hashes."""
    entity_ids, entity_seen = ids_of_codes(*one.names["entities"])
    relation_ids, relation_seen = ids_of_codes(*one.names["relations"])
    batch = spilled(one.rows)
    head, relation, tail = (np.asarray(batch.column(name)) for name in TRIPLE_COLUMNS)
    triples = {"head": entity_ids[head], "relation": relation_ids[relation], "tail": entity_ids[tail]}
    seen = entity_seen[head] & relation_seen[relation] & entity_seen[tail]
    hashed = hashes(one.seed, "order", triples)
    rows = {**triples, "split": np.asarray(batch.column("split")), "seen": seen.astype(np.uint8)}
    order = np.argsort(hashed)
    spill(one.target, {"hash": hashed[order], **{name: values[order] for name, values in rows.items()}})
    advance(len(order))


def hash_ranges(num_ranges: int, sources: Sequence[Path], directory: Path, *, drop_unseen: bool) -> list[HashRange]:
    """Cut all hashes into ranges that hold about as many rows each."""
    bounds = [(number << 64) // num_ranges for number in range(num_ranges + 1)]
    return [
        HashRange(
            bounds[number], bounds[number + 1], tuple(sources),
            tuple(directory / f"{split}-{number:06d}" for split in SPLITS), drop_unseen,
        )
        for number in range(num_ranges)
    ]  # fmt: skip


def shuffle(one: HashRange, advance: Advance) -> tuple[Shuffled, ...]:
    """Sort the rows of a range by hash, ties by ids, and write each split's distinct triples; return what was met."""
    rows = _rows_of(one)
    found = [_distinct(rows, split) for split in range(len(SPLITS))]
    trained = found[0][0]
    results = []
    for split, (triples, seen, num_rows) in enumerate(found):
        kept = triples[seen] if one.drop_unseen and split else triples
        spill(one.targets[split], {name: kept[:, i] for i, name in enumerate(TRIPLE_COLUMNS)})
        num_leaks = _count_common(trained, triples) if split else 0
        num_unseen = len(seen) - int(np.count_nonzero(seen))
        results.append(Shuffled(num_rows, len(triples), num_unseen, len(kept), num_leaks))
    advance(len(rows["hash"]))
    return tuple(results)


def _rows_of(one: HashRange) -> dict[str, npt.NDArray[np.generic]]:
    slices = []
    for path in one.sources:
        batch = spilled(path)
        hashed = np.asarray(batch.column("hash"))
        start = int(np.searchsorted(hashed, np.uint64(one.low)))
        end = int(np.searchsorted(hashed, np.uint64(one.high))) if one.high < 1 << 64 else len(hashed)
        slices.append(copied(batch.slice(start, end - start)))
    table = pa.Table.from_batches(slices)
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _distinct(rows: dict[str, npt.NDArray[np.generic]], split: int) -> tuple[Ints, npt.NDArray[np.bool_], int]:
    """Return a split's triples in order without duplicates, int64[n, 3], whether seen, bool[n], and how many rows."""
    here = np.flatnonzero(rows["split"] == split)
    hashed = rows["hash"][here]
    triples = np.stack([rows[name][here] for name in TRIPLE_COLUMNS], axis=1).astype(np.int64, copy=False)
    order = _order(hashed, triples)
    triples = triples[order]
    fresh = np.ones(len(triples), dtype=bool)
    fresh[1:] = (triples[1:] != triples[:-1]).any(axis=1)
    return triples[fresh], (rows["seen"][here[order]] == 1)[fresh], len(triples)


def _order(hashed: npt.NDArray[np.generic], triples: Ints) -> Ints:
    """Return the indices that sort rows by hash, equal hashes by ids."""
    order = np.argsort(hashed, kind="stable")
    equal = hashed[order][1:] == hashed[order][:-1]
    # Few: they alone are sorted by ids too, within the places that they have together.
    tied = np.flatnonzero(np.concatenate([equal, [False]]) | np.concatenate([[False], equal]))
    among = order[tied]
    order[tied] = among[np.lexsort((*triples[among].T[::-1], hashed[among]))]
    return order


def _count_common(some: Ints, others: Ints) -> int:
    """Return how many triples occur in both of two arrays, int64[n, 3], neither of which repeats one."""
    # Whatever shares the head is few beside all of train.
    some = some[np.isin(some[:, 0], others[:, 0])]
    both = np.concatenate([some, others])
    both = both[np.lexsort(both.T)]
    return int(np.count_nonzero((both[1:] == both[:-1]).all(axis=1)))
