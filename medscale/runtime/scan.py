"""The best rows for a question: a scan of all rows, or of some, in float32, whose shortlist is scored in float64.

The answer is that of scoring every row in float64 and sorting by (score, id), whatever the number of threads, the
layout, or the order of summation: `Query.lowest` keeps every row on the shortlist that could be among the best.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from medscale.runtime.query import Query
from medscale.runtime.rows import Portion, Rows
from medscale.runtime.scoring import Array

__all__ = [
    "Shortlist",
    "all_scores",
    "best",
    "best_of",
    "best_of_each",
    "in_threads",
    "longest",
    "rank",
    "usable_cores",
]

Item = TypeVar("Item")

#: numbers of a table that one call works on: long enough that Python hardly counts, short enough to share out
PORTION_NUMBERS = 1 << 20
#: fewer numbers than that are not worth a thread
ALONE_NUMBERS = 1 << 21
#: a shortlist is cut when it has grown by so many
GROWTH = 4096


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(work: Callable[[Iterable[Item]], object], portions: Sequence[Item], threads: int) -> None:
    """Call `work` once in each thread, with the portions that it takes from the others' reach as it goes."""
    taken = itertools.count()  # whose `next` is one step of the interpreter

    def mine() -> Iterable[Item]:
        while (place := next(taken)) < len(portions):
            yield portions[place]

    if threads < 2 or len(portions) < 2:
        work(portions)
        return
    others = [_pool(threads - 1).submit(work, mine()) for _ in range(threads - 1)]
    try:
        work(mine())
    finally:
        wait(others)
    for other in others:
        other.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads that last: to start some for each question would cost as much as a small tier's answer."""
    return ThreadPoolExecutor(threads, thread_name_prefix="medscale-scan")


if hasattr(os, "register_at_fork"):
    # A child process has none of its parent's threads.
    os.register_at_fork(after_in_child=_pool.cache_clear)


@dataclass
class Shortlist:
    """Rows that may be among the k best for a query, as far as float32 can tell."""

    query: Query
    k: int
    #: the largest Euclidean norm of a row; products need it
    length: float

    def __post_init__(self) -> None:
        self._ids: list[NDArray[np.int64]] = []
        self._scores: list[NDArray[np.float32]] = []
        self._held = 0
        self._cut_at = self.k + GROWTH
        #: no row with a lower float32 score is among the k best
        self.lowest = np.float32(-np.inf)

    def offer(self, scores: NDArray[np.float32], ids: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> None:
        """Take in rows whose score is not below `lowest`; `ids` gives the ids of places in `scores`."""
        # Not "at least": where float32 overflowed to NaN, float64 shall decide.
        kept = np.flatnonzero(~(scores < self.lowest))
        if len(kept):
            self._ids.append(ids(kept))
            self._scores.append(scores[kept])
            self._held += len(kept)
            if self._held > self._cut_at:
                self.cut()

    def cut(self) -> None:
        """Drop those that better ones have pushed out."""
        ids, scores = (
            np.concatenate([np.zeros(0, np.int64), *self._ids]),
            np.concatenate([np.zeros(0, np.float32), *self._scores]),
        )
        if len(scores) > self.k:
            known = np.where(np.isnan(scores), -np.inf, scores)
            kth = float(np.partition(known, len(known) - self.k)[len(known) - self.k])
            if kth > -np.inf:
                self.lowest = max(self.lowest, self.query.lowest(kth, self.length))
            kept = ~(scores < self.lowest)
            ids, scores = ids[kept], scores[kept]
        self._ids, self._scores, self._held = [ids], [scores], len(ids)
        # Equal rows cannot be told apart and may be many: the next cut comes later then.
        self._cut_at = 2 * len(ids) + GROWTH

    @property
    def ids(self) -> NDArray[np.int64]:
        """int64[rows]: those on the list."""
        self.cut()
        return self._ids[0]

    def join(self, other: "Shortlist") -> None:
        """Take over another one's rows."""
        self._ids += other._ids
        self._scores += other._scores


def rank(query: Query, rows: Rows, ids: NDArray[np.int64], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return (ids, scores) of the k best of the rows named, best first, equal scores by id: the plain way."""
    scores = np.empty(len(ids), np.float32)
    step = max(1, PORTION_NUMBERS // 2 // rows.columns)
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        scores[part] = query.scores(rows.vectors(ids[part]))
    first = np.lexsort((ids, -scores))[:k]
    return ids[first], scores[first]


def best(
    query: Query, rows: Rows, k: int, *, excluded: NDArray[np.int64], threads: int, length: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return (ids, scores) of the k best rows but the `excluded` (rising), best first, equal scores by id."""
    portions = rows.portions(PORTION_NUMBERS)
    lists: list[Shortlist] = []

    def work(mine: Iterable[Portion]) -> None:
        shortlist = Shortlist(query, k, length)
        lists.append(shortlist)
        for portion in mine:
            scores = approximate(query, portion, rows.columns)
            leave_out(scores, portion, excluded)
            shortlist.offer(scores, lambda kept, portion=portion: portion.shard.ids_of(kept + portion.rows.start))  # type: ignore[misc]

    in_threads(work, portions, threads if rows.num_entities * rows.columns > ALONE_NUMBERS else 1)
    for other in lists[1:]:
        lists[0].join(other)
    return rank(query, rows, without(lists[0].ids, excluded), k)


def best_of(query: Query, rows: Rows, k: int, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return (ids, scores) of the k best of the rows named, best first, equal scores by id."""
    scores, squares = np.empty(len(ids), np.float32), 0.0
    step = max(1, PORTION_NUMBERS // 4 // rows.columns)
    for start in range(0, len(ids), step):
        part_NC = rows.vectors(ids[start : start + step])
        scores[start : start + step] = query.approximate([(0, part_NC)], len(part_NC))
        if not query.is_distance:
            squares = max(squares, float(np.einsum("nc,nc->n", part_NC, part_NC).max(initial=0)))
    shortlist = Shortlist(query, k, _length(squares, rows.columns))
    shortlist.offer(scores, ids.__getitem__)
    return rank(query, rows, shortlist.ids, k)


def best_of_each(
    queries: Sequence[Query], rows: Rows, k: int, *, threads: int, length: float
) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Return (ids, scores) as `best` does for each query, all of one scorer, in one scan of the rows."""
    lists: list[list[Shortlist]] = []
    products = bool(queries) and queries[0].geometry == "product"
    folded_QC = np.array([query.vector * query.weights for query in queries if products], np.float32)

    def work(mine: Iterable[Portion]) -> None:
        shortlists = [Shortlist(query, k, length) for query in queries]
        lists.append(shortlists)
        for portion in mine:
            number = portion.rows.stop - portion.rows.start
            parts = list(portion.shard.columns_of(portion.rows, 0, rows.columns))
            scores_QN = np.zeros((len(queries), number), np.float32) if products else None
            if scores_QN is not None:
                for start, part in parts:
                    scores_QN += folded_QC[:, start : start + part.shape[1]] @ part.T
            for place, shortlist in enumerate(shortlists):
                scores = queries[place].approximate(parts, number) if scores_QN is None else scores_QN[place]
                shortlist.offer(scores, lambda kept, portion=portion: portion.shard.ids_of(kept + portion.rows.start))  # type: ignore[misc]

    # Products of matrices are for BLAS and its own threads.
    in_threads(work, rows.portions(PORTION_NUMBERS), 1 if products else threads)
    for others in lists[1:]:
        for shortlist, other in zip(lists[0], others, strict=True):
            shortlist.join(other)
    return [rank(query, rows, shortlist.ids, k) for query, shortlist in zip(queries, lists[0], strict=True)]


def all_scores(query: Query, rows: Rows, threads: int) -> NDArray[np.float32]:
    """Return the score of every row, float32 [num_entities], computed in float32."""
    scores = np.empty(rows.num_entities, np.float32)

    def work(mine: Iterable[Portion]) -> None:
        for portion in mine:
            scores[portion.ids] = approximate(query, portion, rows.columns)

    in_threads(work, rows.portions(PORTION_NUMBERS), threads if scores.size * rows.columns > ALONE_NUMBERS else 1)
    return scores


def approximate(query: Query, portion: Portion, columns: int) -> NDArray[np.float32]:
    """Return the scores of a portion's rows in float32."""
    number = portion.rows.stop - portion.rows.start
    return query.approximate(portion.shard.columns_of(portion.rows, 0, columns), number)


def leave_out(scores: NDArray[np.float32], portion: Portion, excluded: NDArray[np.int64]) -> None:
    """Give the excluded rows of a portion the lowest score, in place."""
    shard, rows = portion.shard, portion.rows
    if shard.ids is None:
        first, last = np.searchsorted(excluded, (shard.first + rows.start, shard.first + rows.stop))
        scores[excluded[first:last] - shard.first - rows.start] = -np.inf
    elif len(excluded):
        scores[np.isin(shard.ids[rows], excluded, assume_unique=True)] = -np.inf


def without(ids: NDArray[np.int64], excluded: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the ids that are not excluded."""
    return ids[np.isin(ids, excluded, assume_unique=True, invert=True)]


def longest(rows: Rows, threads: int) -> float:
    """Return a bound, from above, on the Euclidean norms of all rows."""
    bounds: list[float] = [0.0]

    def work(mine: Iterable[Portion]) -> None:
        for portion in mine:
            squares: Array = np.zeros(portion.rows.stop - portion.rows.start, np.float32)
            for _, part in portion.shard.columns_of(portion.rows, 0, rows.columns):
                squares += np.einsum("nc,nc->n", part, part)
            bounds.append(float(squares.max(initial=0)))

    in_threads(work, rows.portions(PORTION_NUMBERS), threads if rows.num_entities * rows.columns > ALONE_NUMBERS else 1)
    return _length(max(bounds), rows.columns)


def _length(squares: float, columns: int) -> float:
    """Return a bound on a norm whose square was summed up in float32."""
    return float(np.sqrt(squares)) * (1 + columns * 1e-7) + 1e-18 * columns
