"""The only source of randomness.

Every draw is a pure function of the job's seed and of what it is for: the epoch's order, the negatives of
a step, the initial rows of a block. So nothing random has a state to save, a resumed run repeats the draws
of an uninterrupted one, and the number of workers changes none of them.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["generator", "mixed", "permuted", "subseed"]

#: rounds of the Feistel network
_ROUNDS = 6


def subseed(seed: int, *purpose: str | int) -> int:
    """Return 63 bits that depend on the seed and on every word of the purpose."""
    text = "/".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return a fresh generator (Philox) for one purpose, such as `generator(0, "negatives", step)`."""
    return np.random.Generator(np.random.Philox(key=subseed(seed, *purpose)))


def mixed(numbers: NDArray[np.int64] | NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """Return 64 well-mixed bits for each number under a key (SplitMix64), uint64[n]."""
    state = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def permuted(numbers: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Return where a seeded permutation of 0 .. size - 1 takes `numbers`, int64[n]; nothing is stored.

    A Feistel network on the next even power of two, walked until the result falls below `size`: any stretch of
    the permutation costs as much as it is long.
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = np.uint64((1 << half) - 1)
    result = numbers.astype(np.uint64)
    outside = np.ones(len(numbers), dtype=bool)
    while outside.any():
        left, right = result[outside] >> np.uint64(half), result[outside] & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (mixed(right, key + turn) & mask)
        result[outside] = left << np.uint64(half) | right
        outside = result >= size
    return result.astype(np.int64)
