"""The order of an epoch: a seeded permutation that is computed, not stored.

A Feistel network over the indices (cycle-walked to the exact length) gives any stretch of the order in O(stretch)
time and no memory, so a resumed run, or another number of workers, starts anywhere.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medscale.seed import generator

__all__ = ["EpochOrder"]

_ROUNDS = 6


@dataclass(frozen=True)
class EpochOrder:
    """The order in which the epochs of a run visit `length` items."""

    length: int
    seed: int

    def indices(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return items number start .. stop - 1 of an epoch, int64; each item occurs once per epoch."""
        keys = generator(self.seed, "order", epoch).integers(0, 2**63, size=_ROUNDS, dtype=np.uint64)
        half_bits = max(1, -(-max(self.length - 1, 1).bit_length() // 2))
        values = _permute(np.arange(start, stop, dtype=np.uint64), keys, half_bits)
        while (outside := values >= self.length).any():
            values[outside] = _permute(values[outside], keys, half_bits)
        return values.astype(np.int64)


def _permute(values: NDArray[np.uint64], keys: NDArray[np.uint64], half_bits: int) -> NDArray[np.uint64]:
    """Permute 0 .. 4^half_bits - 1 by a Feistel network."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a well-mixed 64-bit hash (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
