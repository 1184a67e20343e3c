"""Reader actors: Ray processes that read and shuffle partitions of training triples for all workers.

A partition goes through the object store once, however many workers ask for it; workers on one machine share its
memory. Readers do what they are asked for and no more: what waits in memory is what workers asked for ahead.
"""

import os
from collections import OrderedDict
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError

from medscale.batches.partitions import Feed, PartitionReader, ReaderCounts, order_of
from medscale.cluster import result_of, start_actor
from medscale.config import Job
from medscale.errors import WorkerError
from medscale.graph.reader import Graph, open_graph
from medscale.location import Location

__all__ = ["feed_of", "start_readers"]

#: how often a partition is asked for anew after its copy in the object store, or its reader, was lost
_ATTEMPTS = 5
#: partitions that a reader keeps: workers are so far apart at most
_KEPT = 3


class Reader:
    """One process that reads; the last partitions it still has, for the other workers that ask."""

    def __init__(self, graph_directory: Location, seed: int, split: str, number: int) -> None:
        self._reader = PartitionReader(open_graph(graph_directory, verify=False), seed, number, split=split)
        self._recent: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def read(self, epoch: int, place: int) -> tuple[list[Any], ReaderCounts]:
        """Return (the shuffled partition's reference, what was done so far)."""
        key = epoch, place
        if key not in self._recent:
            self._recent[key] = ray.put(self._reader.read(epoch, place))
            while len(self._recent) > _KEPT:
                self._recent.popitem(last=False)
        return [self._recent[key]], self._reader.counts

    def pid(self) -> int:
        """Return the number of this process, for those who measure it."""
        return os.getpid()


def start_readers(job: Job, graph: Graph) -> list[Any]:
    """Start the job's readers, and return their handles; each is started anew when it dies."""
    what = graph.directory.resolve(), job.seed, job.trained_split
    return [start_actor(Reader, *what, number) for number in range(job.runtime.readers)]


def feed_of(readers: list[Any], job: Job, graph: Graph) -> Feed:
    """Return a worker's feed from readers that take turns, one partition ahead for each."""
    order = order_of(graph, job.seed, job.trained_split)
    counts = [ReaderCounts(number) for number in range(len(readers))]

    def read(epoch: int, place: int) -> NDArray[np.int64]:
        number = (epoch * len(order.sizes) + place) % len(readers)
        lost: RayError | None = None
        for _ in range(_ATTEMPTS):
            try:
                (partition,), counts[number] = result_of(readers[number].read.remote(epoch, place))
                triples: NDArray[np.int64] = result_of(partition)
                return triples
            except RayError as error:
                lost = error
        raise WorkerError(f"reader {number} was lost {_ATTEMPTS} times: {lost}; see its log, and run again to go on")

    return Feed(order, read, lambda: counts, ahead=len(readers))
