"""FNV-1a over names: which shard of an export an entity lies in, the same for every reader in any language."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

__all__ = ["chunks_of", "fnv1a", "names_twice", "utf8"]

_BASIS, _PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)

#: names hashed at a time: what is held of them stays in a core's cache
BATCH = 1 << 16


def fnv1a(names: pa.ChunkedArray) -> NDArray[np.uint64]:
    """Return the 64-bit FNV-1a of each name's UTF-8 bytes, uint64[len(names)]."""
    hashes = np.empty(len(names), np.uint64)
    done = 0
    for chunk in chunks_of(names, BATCH):
        data, offsets = utf8(chunk)
        hashes[done : done + len(chunk)] = _hashed(data, offsets)
        done += len(chunk)
    return hashes


def _hashed(data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the hashes of names [offsets[i], offsets[i + 1]), a letter of all of them at a time."""
    lengths = np.diff(offsets)
    longest_first = np.argsort(-lengths, kind="stable")
    starts, rising = offsets[:-1][longest_first], lengths[longest_first][::-1]
    hashes = np.full(len(lengths), _BASIS)
    for place in range(int(lengths.max(initial=0))):
        longer = len(lengths) - int(np.searchsorted(rising, place, side="right"))
        hashes[:longer] = (hashes[:longer] ^ data[starts[:longer] + place]) * _PRIME
    in_order = np.empty_like(hashes)
    in_order[longest_first] = hashes
    return in_order


def names_twice(names: pa.ChunkedArray, hashes: NDArray[np.uint64]) -> str | None:
    """Return a name that occurs more than once, or None; holds 8 bytes per name."""
    in_order = np.sort(hashes)
    suspects = np.unique(in_order[1:][in_order[1:] == in_order[:-1]])
    seen = set()
    for place in np.flatnonzero(np.isin(hashes, suspects)) if suspects.size else ():
        name = names[int(place)].as_py()
        if name in seen:
            return str(name)
        seen.add(name)
    return None


def chunks_of(names: pa.ChunkedArray, rows: int) -> Iterator[pa.Array]:
    """Yield names in portions of so many at most."""
    for chunk in names.chunks:
        yield from (chunk.slice(start, rows) for start in range(0, len(chunk), rows))


def utf8(names: pa.Array) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the UTF-8 bytes of names, one after the other, and where each begins and the last ends, int64[n + 1]."""
    text = names.cast(pa.large_string())
    _, ends, letters = text.buffers()
    if ends is None or letters is None or not len(text):
        return np.zeros(0, np.uint8), np.zeros(len(text) + 1, np.int64)
    offsets = np.frombuffer(ends, np.int64)[text.offset : text.offset + len(text) + 1]
    return np.frombuffer(letters, np.uint8)[offsets[0] : offsets[-1]], offsets - offsets[0]
