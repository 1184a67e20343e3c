"""The order of an epoch: a seeded permutation that is computed, not stored.

Any stretch of it costs as much as it is long and nothing is kept, so a resumed run, or another number of workers,
starts anywhere.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medscale.seed import permuted, subseed

__all__ = ["EpochOrder"]


@dataclass(frozen=True)
class EpochOrder:
    """The order in which the epochs of a run visit `length` items."""

    length: int
    seed: int

    def indices(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return items number start .. stop - 1 of an epoch, int64; each item occurs once per epoch."""
        return permuted(np.arange(start, stop), self.length, subseed(self.seed, "order", epoch))
