"""What is known: all fillers of (head, relation, ?) or (?, relation, tail), and whether a triple is known.

Sorted arrays and binary search: 8 bytes per triple and side, 16 per distinct query; no Python object per
triple.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medscale.graph.reader import Graph
from medscale.graph.schema import SPLITS
from medscale.graph.side import Side

__all__ = ["KnownTriples"]

Ints = npt.NDArray[np.int64]

_LIMIT = 2**63


@dataclass(frozen=True)
class _Index:
    """Fillers of one slot, by query (known entity, relation)."""

    #: int64[num_queries], ascending: known entity x num_relations + relation
    queries: Ints
    #: int64[num_queries + 1]: where a query's fillers begin and end
    offsets: Ints
    #: int64[num_triples], ascending within a query
    fillers: Ints


class KnownTriples:
    """The set of known triples, for filtered ranking and for negatives that must not be known."""

    def __init__(self, triples: Sequence[Ints], *, num_entities: int, num_relations: int) -> None:
        """Index int64 [N, 3] arrays (head, relation, tail), one per split; duplicates count once.

        All ids must be in range, as a `Graph` guarantees.
        """
        assert num_entities * max(num_relations, 1) < _LIMIT, "queries do not fit in 64 bits"
        self._num_entities, self._num_relations = num_entities, num_relations
        rows = np.concatenate([*triples, np.empty((0, 3), dtype=np.int64)])
        assert not len(rows) or (rows.min() >= 0 and rows[:, [0, 2]].max() < num_entities)
        assert not len(rows) or rows[:, 1].max() < num_relations
        self._indexes: dict[Side, _Index] = {
            "tail": self._index(rows[:, 0], rows[:, 1], rows[:, 2]),
            "head": self._index(rows[:, 2], rows[:, 1], rows[:, 0]),
        }

    @classmethod
    def of_graph(
        cls, graph: Graph, splits: Sequence[str] = SPLITS, *, about: Ints | None = None
    ) -> "KnownTriples":  # fmt: skip
        """Index the triples of a graph's splits; those only that answer a query of `about`, int64 [Q, 3].

        Ranking Q triples asks for the answers of 2 Q queries: indexing what is about them alone takes memory for
        their answers, not for the graph.

        Raises:
            GraphError: a file of the graph is damaged.

        """
        groups = (rows for split in splits for path in graph.parts(split) for rows in graph.read_part(path))
        if about is not None:
            groups = (rows[_answers_any(rows, about, graph.num_relations)] for rows in groups)
        return cls(list(groups), num_entities=graph.num_entities, num_relations=graph.num_relations)

    def __len__(self) -> int:
        """Return the number of distinct known triples."""
        return len(self._indexes["tail"].fillers)

    def answers(self, side: Side, known: Ints, relation: Ints) -> tuple[Ints, Ints]:
        """Return all known fillers of the asked slot: (offsets int64[Q + 1], entities int64[offsets[-1]]).

        `known` and `relation` are int64[Q]; with side "tail" `known` are heads. The fillers of query q are
        entities[offsets[q] : offsets[q + 1]], ascending. Ids out of range have none.
        """
        index = self._indexes[side]
        first, last = self._range(index, known, relation)
        counts = last - first
        offsets = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=offsets[1:])
        places = np.repeat(first - offsets[:-1], counts) + np.arange(offsets[-1])
        return offsets, index.fillers[places]

    def contains(self, head: Ints, relation: Ints, tail: Ints) -> npt.NDArray[np.bool_]:
        """Tell which triples are known: bool, in the shape to which the three int64 arrays broadcast."""
        head, relation, tail = np.broadcast_arrays(head, relation, tail)
        index = self._indexes["tail"]
        first, last = self._range(index, head.ravel(), relation.ravel())
        wanted = tail.ravel()
        # Binary search for all at once, each between its own bounds.
        low, high = first.copy(), last.copy()
        while (open_ := low < high).any():
            middle = (low + high) // 2
            less = open_ & (index.fillers[np.minimum(middle, len(index.fillers) - 1)] < wanted)
            low, high = np.where(less, middle + 1, low), np.where(open_ & ~less, middle, high)
        found = low < last
        found[found] = index.fillers[low[found]] == wanted[found]
        return found.reshape(head.shape)

    def _index(self, known: Ints, relation: Ints, filler: Ints) -> _Index:
        queries, fillers = _sorted_pairs(known * self._num_relations + relation, filler, self._num_entities)
        starts = np.flatnonzero(np.diff(queries, prepend=-1))
        return _Index(queries[starts], np.append(starts, len(queries)).astype(np.int64), fillers)

    def _range(self, index: _Index, known: Ints, relation: Ints) -> tuple[Ints, Ints]:
        """Return where in the fillers each query's begin and end; both 0 where it has none."""
        query = known * self._num_relations + relation
        place = np.searchsorted(index.queries, query)
        found = place < len(index.queries)
        found[found] = index.queries[place[found]] == query[found]
        # Ids out of range could spell another query's number.
        found &= (known >= 0) & (known < self._num_entities) & (relation >= 0) & (relation < self._num_relations)
        place = np.where(found, place, 0)
        return np.where(found, index.offsets[place], 0), np.where(found, index.offsets[place + found], 0)


def _sorted_pairs(query: Ints, filler: Ints, num_entities: int) -> tuple[Ints, Ints]:
    """Return the distinct (query, filler) pairs in ascending order."""
    if len(query) and (int(query.max()) + 1) * num_entities < _LIMIT:
        # One number per pair sorts several times faster than two keys.
        pairs = np.unique(query * num_entities + filler)
        return pairs // num_entities, pairs % num_entities
    order = np.lexsort((filler, query))
    query, filler = query[order], filler[order]
    fresh = (np.diff(query, prepend=-1) != 0) | (np.diff(filler, prepend=-1) != 0)
    return query[fresh], filler[fresh]


def _answers_any(rows: Ints, about: Ints, num_relations: int) -> npt.NDArray[np.bool_]:
    """Tell which triples share head and relation, or relation and tail, with one of `about`; both int64 [n, 3]."""
    found = np.zeros(len(rows), dtype=bool)
    for known in (0, 2):
        asked = np.unique(about[:, known] * num_relations + about[:, 1])
        if len(asked):
            query = rows[:, known] * num_relations + rows[:, 1]
            found |= asked[np.minimum(np.searchsorted(asked, query), len(asked) - 1)] == query
    return found
