"""The order of an epoch: a seeded permutation that is computed, not stored.

Any stretch of it costs as much as it is long and nothing is kept, so a resumed run, or another number of workers,
starts anywhere.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medscale.seed import permuted, subseed

__all__ = ["EpochOrder", "PartitionOrder", "Stretch"]


@dataclass(frozen=True)
class EpochOrder:
    """The order in which the epochs of a run visit `length` items that are all at hand."""

    length: int
    seed: int

    def indices(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return items number start .. stop - 1 of an epoch, int64; each item occurs once per epoch."""
        return permuted(np.arange(start, stop), self.length, subseed(self.seed, "order", epoch))


@dataclass(frozen=True)
class Stretch:
    """Rows first .. last - 1 of the shuffled partition that an epoch visits as number `place`."""

    place: int
    first: int
    last: int


@dataclass(frozen=True)
class PartitionOrder:
    """The order in which the epochs of a run visit triples that lie in partitions, read one at a time.

    An epoch visits the partitions in a seeded order, and each one's rows in another. Rows of a graph directory are
    shuffled when it is prepared, so every partition is a sample of the whole graph. With a single partition this is
    the order of `EpochOrder`.
    """

    #: triples in each partition
    sizes: tuple[int, ...]
    seed: int

    def __len__(self) -> int:
        """Return the number of triples."""
        return sum(self.sizes)

    def partitions(self, epoch: int) -> NDArray[np.int64]:
        """Return the partitions in the order of an epoch, int64[P]."""
        return _visited(self, epoch)[0]

    def rows(self, epoch: int, partition: int) -> NDArray[np.int64]:
        """Return the rows of a partition in the order of an epoch, int64[n]."""
        size = self.sizes[partition]
        # Keys of partitions lie far enough apart for the rounds of each permutation.
        return permuted(np.arange(size), size, subseed(self.seed, "order", epoch) + (partition << 32))

    def stretches(self, epoch: int, start: int, stop: int) -> Iterator[Stretch]:
        """Yield where triples number start .. stop - 1 of an epoch lie, in order."""
        ends_P = _visited(self, epoch)[1]
        for place in range(int(np.searchsorted(ends_P, start, side="right")), len(ends_P)):
            begin, end = int(ends_P[place - 1]) if place else 0, int(ends_P[place])
            if begin >= stop:
                return
            yield Stretch(place, max(start, begin) - begin, min(stop, end) - begin)


@functools.lru_cache(maxsize=8)
def _visited(order: PartitionOrder, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (partitions, triples up to the end of each), int64[P], in the order of an epoch."""
    number = len(order.sizes)
    partitions = permuted(np.arange(number), number, subseed(order.seed, "partitions", epoch))
    return partitions, np.cumsum(np.asarray(order.sizes)[partitions])
