"""Top-k through a chain of tiers: the smallest one looks at all rows, larger ones at those that are left.

Exact: a row is dropped only where no further column can bring it among the k best. For distances, a row is at least as
far as its first columns sum up to (with the weights of the largest tier); for products, the further columns add at most
the norm of the query's times the norm of the row's, cut by cut, which tiers hold (`norms`). Both bounds leave room for
the rounding of float32. Not exact: each tier passes on its best rows, as many as it is told.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from medscale.errors import ExportError, TierChainError
from medscale.runtime.query import Query
from medscale.runtime.rows import Portion
from medscale.runtime.scan import PORTION_NUMBERS, best_of, in_threads
from medscale.runtime.tier import Names, Tier, check_k

__all__ = ["Cascade", "CascadeAnswers"]

#: rows that are scored in full to learn how good the k best are at least
PROBES = 256
#: above this share of all rows, reading them one after the other is faster than picking some out
SCATTERED = 0.2


class CascadeAnswers(NamedTuple):
    """What a cascade found, best first, and how much work each tier spared the next."""

    names: list[str]
    #: float32[k]
    scores: NDArray[np.float32]
    #: per tier but the last: the share of all rows in question that the next one need not look at
    pruned: tuple[float, ...]


class Cascade:
    """Tiers of one export, from the smallest: answers as the largest gives them, sooner."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        """Chain tiers, such as [phone, pc, server].

        Raises:
            ExportError: fewer than two, in the wrong order, or not of the same run and step.

        """
        if not all(isinstance(tier, Tier) for tier in tiers):
            raise TierChainError("a cascade is of tiers that are open: Cascade([Tier.open(path), ...])")
        if len(tiers) < 2:
            raise TierChainError(f"a cascade needs two tiers at least, got {len(tiers)}")
        self._tiers = tuple(tiers)
        self._last = tiers[-1]
        for smaller, larger in itertools.pairwise(tiers):
            _check_pair(smaller, larger)

    def top_k(
        self, head: str | int, relation: str | int, k: int, *, exact: bool = True,
        shortlist: Sequence[int] | None = None, exclude: Names | None = None, candidates: Names | None = None,
    ) -> CascadeAnswers:  # fmt: skip
        """Return the k best tails: those of the largest tier's `top_k`, or with `exact=False` mostly those.

        `shortlist` is for `exact=False`: how many rows each tier but the last passes on; by default a tenth of
        all, then a hundredth, and 100 k and 20 k at least; `shortlist_for` finds better ones.

        Raises:
            ExportError: as `Tier.top_k`; or the tiers are not such that bounds hold (`exact`): of several precisions,
                or without stored norms where products need them.

        """
        return self._answers(self._last.query(head, relation, "tail"), k, exact, shortlist, exclude, candidates)

    def top_k_heads(
        self, relation: str | int, tail: str | int, k: int, *, exact: bool = True,
        shortlist: Sequence[int] | None = None, exclude: Names | None = None, candidates: Names | None = None,
    ) -> CascadeAnswers:  # fmt: skip
        """Return the k best heads, as `top_k` does the best tails.

        Raises:
            ExportError: as `top_k`.

        """
        return self._answers(self._last.query(tail, relation, "head"), k, exact, shortlist, exclude, candidates)

    def recall(
        self, queries: Iterable[tuple[str | int | None, str | int, str | int | None]], k: int,
        *, shortlist: Sequence[int] | None = None,
    ) -> float:  # fmt: skip
        """Return the share of the k best answers, as brute force finds them, that `exact=False` finds too.

        Queries are (head, relation, None) or (None, relation, tail).

        Raises:
            ExportError: as `top_k`, or there are no queries.

        """
        found = asked = 0
        for query in self._queries(queries):
            best = self._last.best(query, k)[0]
            mine = self.best(query, k, exact=False, shortlist=shortlist)[0]
            found, asked = found + len(np.intersect1d(best, mine)), asked + len(best)
        return found / asked

    def shortlist_for(
        self, queries: Iterable[tuple[str | int | None, str | int, str | int | None]], k: int, recall: float = 0.95
    ) -> list[int]:
        """Return the `shortlist` that reads the fewest numbers of those that reach a recall on sample queries.

        They reach it with a standard error to spare, since other queries are not the same. Queries are as in `recall`,
        which tells on others what the shortlist is worth; some hundreds will do.

        Raises:
            ExportError: as `recall`, or the recall asked for is not above 0 and at most 1.

        """
        check_k(k)
        if not 0 < recall <= 1:
            raise ExportError(f"recall is {recall!r:.80}; allowed: above 0, up to 1")
        places_QKS = np.stack([self._places(query, k) for query in self._queries(queries)])
        num_queries, _, steps = places_QKS.shape
        levels = np.linspace(0, 1, max(3, min(64, int(30_000 ** (1 / steps)))))
        sizes = [np.unique(np.quantile(places, levels, method="higher")).tolist() for places in places_QKS.T]
        columns = [tier.columns for tier in self._tiers[1:]]
        for choice in sorted(itertools.product(*sizes), key=lambda choice: float(np.dot(choice, columns))):
            found_Q = (places_QKS <= choice).all(axis=2).mean(axis=1)
            if found_Q.mean() - found_Q.std() / np.sqrt(num_queries) >= recall:
                return [max(size, k) for size in choice]
        raise AssertionError("the last places of all are among the sizes")

    def _places(self, query: Query, k: int) -> NDArray[np.int64]:
        """Return the place of each of the k best among all rows by each tier but the last: int64 [k, steps], from 1."""
        best, everyone, found = self._last.best(query, k)[0], self._all_ids, []
        for tier in self._tiers[:-1]:
            scores = query.of_sums(self._sums(tier, query, everyone, 0, tier.columns))
            found.append(len(scores) + 1 - np.searchsorted(np.sort(scores), scores[best], side="right"))
        return np.stack(found, axis=1)

    def _queries(self, queries: Iterable[tuple[str | int | None, str | int, str | int | None]]) -> Iterator[Query]:
        """Yield what is asked for; refuse what is no query, or none at all."""
        queries = list(queries)
        if not queries:
            raise ExportError("there are no queries to measure recall on")
        for head, relation, tail in queries:
            if (head is None) == (tail is None):
                raise ExportError(f"a query has a head or a tail, got {head!r} and {tail!r}")
            if head is not None:
                yield self._last.query(head, relation, "tail")
            elif tail is not None:
                yield self._last.query(tail, relation, "head")

    def best(
        self, query: Query, k: int, *, exact: bool = True, shortlist: Sequence[int] | None = None,
        exclude: Names | None = None, candidates: Names | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], tuple[float, ...]]:  # fmt: skip
        """Return (ids, scores, pruned) of a query of the largest tier's, as `top_k` does.

        Raises:
            ExportError: as `top_k`.

        """
        check_k(k)
        last = self._last
        ids = self._all_ids if candidates is None else last.candidate_ids(candidates)
        if exclude is not None:
            ids = ids[np.isin(ids, np.unique(last.ids(exclude)), assume_unique=True, invert=True)]
        if not exact:
            return self._passed_on(query, ids, k, self._sizes(k, shortlist))
        if shortlist is not None:
            raise ExportError("shortlist is for exact=False: an exact cascade passes on what it must")
        self._check_exact()
        return self._bounded(query, ids, k)

    def _answers(
        self, query: Query, k: int, exact: bool, shortlist: Sequence[int] | None, exclude: Names | None,
        candidates: Names | None,
    ) -> CascadeAnswers:  # fmt: skip
        ids, scores, pruned = self.best(
            query, k, exact=exact, shortlist=shortlist, exclude=exclude, candidates=candidates
        )
        return CascadeAnswers([self._last.entity_name(int(i)) for i in ids], scores, pruned)

    def _sizes(self, k: int, shortlist: Sequence[int] | None) -> Sequence[int]:
        steps = len(self._tiers) - 1
        if shortlist is None:
            all_rows = self._last.num_entities
            return [max(20 * k * 5 ** (step == 0), all_rows // 10 // 10**step) for step in range(steps)]
        if len(shortlist) != steps or not all(type(size) is int and size > 0 for size in shortlist):
            raise ExportError(
                f"shortlist is {shortlist!r:.80}; give {steps} numbers of rows, one per tier but the last"
            )
        return [max(size, k) for size in shortlist]

    def _passed_on(
        self, query: Query, ids: NDArray[np.int64], k: int, sizes: Sequence[int]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], tuple[float, ...]]:
        number, pruned = len(ids), []
        for tier, size in zip(self._tiers, sizes, strict=False):
            if len(ids) > size:
                ids = ids[_highest(query.of_sums(self._sums(tier, query, ids, 0, tier.columns)), size)]
            pruned.append(1 - len(ids) / max(number, 1))
        return *best_of(query, self._last.rows, k, ids), tuple(pruned)

    def _bounded(
        self, query: Query, ids: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], tuple[float, ...]]:
        number, pruned, length = len(ids), [], self._last.length(query)
        sums, start = np.zeros(number, np.float32), 0
        for tier in self._tiers:
            sums += self._sums(tier, query, ids, start, tier.columns)
            start = tier.columns
            highest = query.of_sums(sums.copy()) + self._rest(query, ids, start)
            if len(ids) > k:
                lowest = query.lowest(self._kth(query, ids, highest, k), length)
                # Not "at least": where float32 overflowed to NaN, the next columns shall decide.
                kept = np.flatnonzero(~(highest < lowest))
                ids, sums = ids[kept], sums[kept]
            pruned.append(1 - len(ids) / max(number, 1))
        return *best_of(query, self._last.rows, k, ids), tuple(pruned[:-1])

    def _kth(self, query: Query, ids: NDArray[np.int64], highest: NDArray[np.float32], k: int) -> float:
        """Return a score that at least k of the rows reach: the k-th best of those that look best."""
        probes = min(len(ids), max(PROBES, 2 * k))
        return float(best_of(query, self._last.rows, k, ids[_highest(highest, probes)])[1][-1])

    def _rest(self, query: Query, ids: NDArray[np.int64], start: int) -> NDArray[np.float32] | float:
        """Return what the columns from `start` on can add to scores at most."""
        if query.is_distance:
            return 0.0
        rest, begin, folded = np.zeros(len(ids), np.float32), 0, query.vector * query.weights
        for cut, columns in enumerate(self._cut_columns):
            if begin >= start:
                rest += np.float32(np.linalg.norm(folded[begin : begin + columns])) * self._norms[cut][ids]
            begin += columns
        return rest

    def _sums(self, tier: Tier, query: Query, ids: NDArray[np.int64], start: int, stop: int) -> NDArray[np.float32]:
        """Return what columns [start, stop) of a tier's rows sum up to, float32 [len(ids)]."""
        rows = tier.rows
        if len(ids) > SCATTERED * rows.num_entities:
            found = np.empty(rows.num_entities, np.float32)

            def scan(portions: Iterable[Portion]) -> None:
                for portion in portions:
                    parts = portion.shard.columns_of(portion.rows, start, stop)
                    found[portion.ids] = query.sums(parts, portion.rows.stop - portion.rows.start)

            in_threads(scan, rows.portions(PORTION_NUMBERS * rows.columns // (stop - start)), tier.threads)
            return found if len(ids) == len(found) else found[ids]
        found = np.empty(len(ids), np.float32)
        step = max(1, PORTION_NUMBERS // 4 // (stop - start))

        def pick(parts: Iterable[slice]) -> None:
            for part in parts:
                chunk = rows.columns_of(ids[part], start, stop)
                found[part] = query.sums([(start, chunk)], len(chunk))

        in_threads(pick, [slice(i, i + step) for i in range(0, len(ids), step)], tier.threads)
        return found

    @cached_property
    def _all_ids(self) -> NDArray[np.int64]:
        return np.arange(self._last.num_entities)

    @property
    def _cut_columns(self) -> list[int]:
        facts = self._last.checked_facts
        return [units * facts.unit_columns for units in np.diff([0, *facts.cuts]).tolist()]

    @cached_property
    def _norms(self) -> dict[int, NDArray[np.float32]]:
        """float32[num_entities] by cut: the stored norms of the largest tier."""
        cuts = range(1, len(self._cut_columns))
        found = {cut: np.empty(self._last.num_entities, np.float32) for cut in cuts}
        for portion in self._last.rows.portions(1 << 30):
            stored = dict(portion.shard.norms)
            for cut in cuts:
                found[cut][portion.ids] = stored[cut][portion.rows]
        return found

    def _check_exact(self) -> None:
        """Refuse tiers whose bounds do not hold.

        Raises:
            ExportError: says which, and why.

        """
        for smaller, larger in itertools.pairwise(self._tiers):
            ours, theirs = smaller.checked_facts, larger.checked_facts
            if ours.precision != theirs.precision:
                raise TierChainError(
                    f"{ours.source} is of precision {ours.precision}, {theirs.source} of {theirs.precision}: bounds "
                    "need one precision; use exact=False"
                )
            if theirs.payload[: len(ours.payload)] != ours.payload:
                raise TierChainError(f"{ours.source} and {theirs.source} were not exported together: use exact=False")
        facts = self._last.checked_facts
        if facts.scorer.geometry == "product" and facts.format == 1:
            raise ExportError(f"{facts.source} is of format 1, without norms: export it again, or use exact=False")


def _highest(scores: NDArray[np.float32], number: int) -> NDArray[np.int64]:
    """Return the places of the so many highest scores, rising; of equal ones the first."""
    # Where float32 overflowed to NaN, the next tier shall decide.
    known = np.nan_to_num(scores, nan=np.inf) if np.isnan(scores.max()) else scores
    last = np.partition(known, len(known) - number)[len(known) - number]
    kept = np.flatnonzero(known >= last)
    if len(kept) > number:
        surplus = np.flatnonzero(known[kept] == last)[number - len(kept) :]
        kept = np.delete(kept, surplus)
    return kept


def _check_pair(smaller: Tier, larger: Tier) -> None:
    """Refuse two tiers that do not follow one another.

    Raises:
        ExportError: says why.

    """
    ours, theirs = smaller.checked_facts, larger.checked_facts
    for key in ("run", "step", "graph_sha256", "scorer_name", "norm", "reciprocal"):
        if getattr(ours, key) != getattr(theirs, key):
            raise TierChainError(
                f"{ours.source} and {theirs.source} are of different runs: {key} is {getattr(ours, key)!r} and "
                f"{getattr(theirs, key)!r}"
            )
    if smaller.num_entities != larger.num_entities:
        counts = f"{smaller.num_entities:,} and {larger.num_entities:,}"
        raise TierChainError(f"{ours.source} and {theirs.source} have different entities: {counts}")
    if ours.dim >= theirs.dim:
        raise TierChainError(
            f"wrong order: tier {smaller.name!r} of {ours.dim} units comes before {larger.name!r} of {theirs.dim}; "
            "begin with the smallest"
        )
