"""Names and ids. Ids are dense, from 0, in the order of the names (numerical where all names are integers).

So the ids of a graph depend on its names alone, and integer ids that are dense already stay as they are.

The names of each chunk are sorted. Regular samples of them cut the order into ranges that hold about as many bytes
each; a range's names are brought together from all chunks and counted, and the counts of the ranges before it
make them ids. No task sees more than a range, or a chunk.
"""

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from medscale.graph.chunks import Kind
from medscale.graph.spill import copied, spill, spilled
from medscale.logs import Advance

__all__ = [
    "NumberedRange",
    "Piece",
    "Range",
    "Sorting",
    "ids_of_codes",
    "number_range",
    "order_of",
    "pieces_of",
    "place_of",
    "ranges_of",
    "sort_names",
]

#: bytes that a name takes beside its letters
_NAME_BYTES = 16


class Sorting(NamedTuple):
    """Names of a chunk that are to be sorted: (name, seen) to (name, seen, code), its place before sorting."""

    source: Path
    target: Path
    numerical: bool
    #: bytes between two samples
    step: int


class Range(NamedTuple):
    """A part of the order of names: from `low` up to but without `high` (None: no limit)."""

    kind: Kind
    low: str | None
    high: str | None
    numerical: bool
    #: chunks' sorted names
    sources: tuple[Path, ...]
    #: where the distinct names go (name), in order
    names: Path
    #: where each chunk's names learn their places (place int64, seen uint8), chunk after chunk
    places: Path
    #: names unseen in train are left out, and have places of their own
    only_seen: bool


class NumberedRange(NamedTuple):
    """How many names a range holds."""

    num_names: int
    #: left out
    num_unseen: int
    #: names of each chunk that lie in the range
    chunk_names: tuple[int, ...]


class Piece(NamedTuple):
    """Where `num_names` of a chunk's names, in order, find their ids: at `start` of a range's places."""

    places: Path
    start: int
    num_names: int
    #: what makes an id of the place of a name seen in train, and of one that is not
    first_id: int
    first_unseen_id: int


def order_of(names: pa.Array, *, numerical: bool) -> npt.NDArray[np.int64]:
    """Return the indices that sort names."""
    return np.asarray(pc.sort_indices(names.cast(pa.int64()) if numerical else names)).astype(np.int64)


def sort_names(sorting: Sorting, advance: Advance) -> list[str]:
    """Sort the names of a chunk; return a sample of them, one every `step` bytes."""
    batch = spilled(sorting.source)
    order = order_of(batch.column("name"), numerical=sorting.numerical)
    names, seen = batch.column("name").take(pa.array(order)), batch.column("seen").take(pa.array(order))
    spill(sorting.target, {"name": names, "seen": seen, "code": order})
    ends = np.cumsum(np.asarray(pc.binary_length(names), dtype=np.int64) + _NAME_BYTES)
    sampled = np.searchsorted(ends, np.arange(sorting.step, ends[-1], sorting.step))
    return names.take(pa.array(sampled)).to_pylist()  # type: ignore[no-any-return]


def ranges_of(
    kind: Kind, samples: Sequence[Sequence[str]], every: int, sources: Sequence[Path], directory: Path, *,
    numerical: bool, only_seen: bool,
) -> list[Range]:  # fmt: skip
    """Cut the order of names at every `every`-th sample of all chunks."""
    drawn = sorted((name for sample in samples for name in sample), key=int if numerical else None)
    bounds = [None, *dict.fromkeys(drawn[every::every]), None]
    return [
        Range(
            kind, low, high, numerical, tuple(sources), directory / f"{kind}-{number:06d}.names",
            directory / f"{kind}-{number:06d}.places", only_seen,
        )
        for number, (low, high) in enumerate(itertools.pairwise(bounds))
    ]  # fmt: skip


def place_of(name: str | None, names: pa.Array, *, numerical: bool, none: int) -> int:
    """Return the index of the first of sorted `names` that is not before `name`; of None: `none`."""
    if name is None:
        return none
    if numerical:
        return bisect_left(range(len(names)), int(name), key=lambda i: int(names[i].as_py()))
    return bisect_left(range(len(names)), name, key=lambda i: names[i].as_py())


def number_range(one: Range, advance: Advance) -> NumberedRange:
    """Bring the names of a range together, and write them in order, and each chunk's places among them."""
    found, seen = [], []
    for path in one.sources:
        batch = spilled(path)
        names = batch.column("name")
        start = place_of(one.low, names, numerical=one.numerical, none=0)
        end = place_of(one.high, names, numerical=one.numerical, none=len(names))
        rows = copied(batch.slice(start, end - start))
        found.append(rows.column("name"))
        seen.append(np.asarray(rows.column("seen")))
    encoded = pa.chunked_array(found, pa.string()).dictionary_encode().chunks  # all with one dictionary
    codes, seen_here = np.concatenate([np.asarray(chunk.indices) for chunk in encoded]), np.concatenate(seen)
    distinct = encoded[-1].dictionary
    seen_anywhere = np.zeros(len(distinct), dtype=bool)
    seen_anywhere[codes[seen_here == 1]] = True
    order = order_of(distinct, numerical=one.numerical)
    kept = seen_anywhere[order] if one.only_seen else np.ones(len(distinct), dtype=bool)
    places = np.empty(len(distinct), dtype=np.int64)
    places[order] = np.where(kept, np.cumsum(kept), np.cumsum(~kept)) - 1
    spill(one.names, {"name": distinct.take(pa.array(order[kept]))})
    spill(one.places, {"place": places[codes], "seen": seen_anywhere[codes].astype(np.uint8)})
    advance(len(codes))
    num_kept = int(np.count_nonzero(kept))
    return NumberedRange(num_kept, len(distinct) - num_kept, tuple(map(len, found)))


def pieces_of(ranges: Sequence[Range], numbered: Sequence[NumberedRange]) -> list[tuple[Piece, ...]]:
    """Return for each chunk where its names find their ids, in their order."""
    first_id, first_unseen_id = 0, sum(counts.num_names for counts in numbered)
    by_range = []
    for one, counts in zip(ranges, numbered, strict=True):
        starts = np.cumsum([0, *counts.chunk_names]).tolist()
        unseen = first_unseen_id if one.only_seen else first_id
        by_range.append(
            [
                Piece(one.places, start, count, first_id, unseen)
                for start, count in zip(starts, counts.chunk_names, strict=False)
            ]
        )
        first_id += counts.num_names
        first_unseen_id += counts.num_unseen
    return list(zip(*by_range, strict=True))


def ids_of_codes(sorted_names: Path, pieces: Sequence[Piece]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return by code of a chunk's names their ids, int64[n], and whether they occur in train, bool[n]."""
    codes = np.asarray(spilled(sorted_names).column("code"))
    ids, seen, done = np.empty(len(codes), dtype=np.int64), np.empty(len(codes), dtype=bool), 0
    for piece in pieces:
        batch = spilled(piece.places).slice(piece.start, piece.num_names)
        here = codes[done : done + piece.num_names]
        seen[here] = is_seen = np.asarray(batch.column("seen")) == 1
        ids[here] = np.asarray(batch.column("place")) + np.where(is_seen, piece.first_id, piece.first_unseen_id)
        done += piece.num_names
    assert done == len(codes)
    return ids, seen
