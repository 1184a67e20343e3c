"""The only source of randomness.

Every draw is a pure function of the job's seed and of what it is for: the epoch's order, the negatives of
a step, the initial rows of a block. So nothing random has a state to save, a resumed run repeats the draws
of an uninterrupted one, and the number of workers changes none of them.
"""

import hashlib

import numpy as np

__all__ = ["generator", "subseed"]


def subseed(seed: int, *purpose: str | int) -> int:
    """Return 63 bits that depend on the seed and on every word of the purpose."""
    text = "/".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return a fresh generator (Philox) for one purpose, such as `generator(0, "negatives", step)`."""
    return np.random.Generator(np.random.Philox(key=subseed(seed, *purpose)))
