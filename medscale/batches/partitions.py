"""Training triples as they are read: partition by partition, shuffled, some ahead of the steps that want them.

A reader turns (epoch, place) into a shuffled partition and has no other state, so who reads it does not matter: a
thread of the worker, or an actor that serves all workers. A reader only does what it is asked for, and a feed asks a
few partitions ahead, so a slow trainer holds a fixed number of them.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medscale.batches.order import PartitionOrder
from medscale.errors import GraphError
from medscale.graph.reader import Graph
from medscale.graph.schema import PART_ROWS

__all__ = ["Feed", "PartitionReader", "ReaderCounts", "order_of"]

Ids = NDArray[np.int64]


@dataclass
class ReaderCounts:
    """What a reader has done so far."""

    #: number of the reader
    reader: int
    partitions: int = 0
    triples: int = 0
    #: spent reading and shuffling
    seconds: float = 0.0


def order_of(graph: Graph, seed: int, split: str = "train") -> PartitionOrder:
    """Return the order of the triples of "train" or "growth"; partitions are files, all of one size but the last.

    Raises:
        GraphError: the graph has no training triples, or other files than their number asks for.

    """
    number, parts = graph.num_triples[split], len(graph.parts(split))
    if not number:
        raise GraphError(f"{graph.directory} has no training triples")
    if parts != -(-number // PART_ROWS):
        raise GraphError(f"{graph.directory}: {number} training triples in {parts} files; prepare the graph anew")
    return PartitionOrder((*[PART_ROWS] * (parts - 1), number - PART_ROWS * (parts - 1)), seed)


class PartitionReader:
    """Reads the triples that a graph's split trains on, "train" or "growth", by (epoch, place)."""

    def __init__(self, graph: Graph, seed: int, number: int = 0, *, split: str = "train") -> None:
        self.graph, self.order, self.counts = graph, order_of(graph, seed, split), ReaderCounts(number)
        self._parts = graph.parts(split)

    def read(self, epoch: int, place: int) -> Ids:
        """Return the partition that an epoch visits as number `place`, shuffled, int64 [n, 3].

        Raises:
            GraphError: its file is damaged, or holds another number of triples than it should; names file and row
                group.

        """
        start = time.perf_counter()
        partition = int(self.order.partitions(epoch)[place])
        path, size = self._parts[partition], self.order.sizes[partition]
        triples = np.concatenate([*self.graph.read_part(path), np.empty((0, 3), dtype=np.int64)])
        if len(triples) != size:
            raise GraphError(f"{path} holds {len(triples)} triples, not {size}; prepare the graph anew")
        shuffled: Ids = triples[self.order.rows(epoch, partition)]
        self.counts.partitions += 1
        self.counts.triples += size
        self.counts.seconds += time.perf_counter() - start
        return shuffled


class Feed:
    """The training triples of all epochs, in order; the partitions that come next are read meanwhile."""

    def __init__(
        self, order: PartitionOrder, read: Callable[[int, int], Ids], counts: Callable[[], list[ReaderCounts]],
        *, ahead: int = 1,
    ) -> None:  # fmt: skip
        self.order, self._read, self._counts, self._ahead = order, read, counts, ahead
        self._pool = ThreadPoolExecutor(ahead)
        #: by (epoch, place)
        self._coming: dict[tuple[int, int], Future[Ids]] = {}
        #: seconds that steps have waited for readers
        self.waited = 0.0

    @classmethod
    def of(cls, reader: PartitionReader) -> "Feed":
        """Return the feed of a reader in this process."""
        return cls(reader.order, reader.read, lambda: [reader.counts])

    def triples(self, epoch: int, start: int, stop: int) -> Ids:
        """Return triples number start .. stop - 1 of an epoch, int64 [stop - start, 3].

        Raises:
            GraphError: a file is damaged.

        """
        pieces = [
            self._partition(epoch, stretch.place)[stretch.first : stretch.last]
            for stretch in self.order.stretches(epoch, start, stop)
        ]
        return np.concatenate(pieces)

    def described(self) -> dict[str, Any]:
        """Return, for the run's log, what each reader has done and how long steps have waited for readers."""
        counts = self._counts()
        return {
            "reader_wait_s": round(self.waited, 6),
            "reader_triples": {str(c.reader): c.triples for c in counts},
            "reader_triples_per_s": {str(c.reader): round(c.triples / (c.seconds or 1e-9)) for c in counts},
        }

    def _partition(self, epoch: int, place: int) -> Ids:
        wanted = [
            divmod(epoch * len(self.order.sizes) + place + i, len(self.order.sizes)) for i in range(1 + self._ahead)
        ]
        self._coming = {key: coming for key, coming in self._coming.items() if key in wanted}
        for key in wanted:
            if key not in self._coming:
                self._coming[key] = self._pool.submit(self._read, *key)
        start = time.perf_counter()
        partition = self._coming[epoch, place].result()
        self.waited += time.perf_counter() - start
        return partition
