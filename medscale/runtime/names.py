"""Names of entities or relations, looked up in mapped arrays: opening costs nothing, however many there are.

Three arrays hold n names: `bytes` (all names, UTF-8, one after the other by id), `offsets` (n + 1: where each
begins and the last ends) and `order` (the ids sorted by their names' bytes, for binary search).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medscale.errors import DamagedTierError, UnknownNameError

__all__ = ["NameTable"]


@dataclass(frozen=True)
class NameTable:
    """The names of one kind of thing, or of the rows of a shard, both ways. Ids are 0 .. n - 1."""

    #: "entity" or "relation", for messages
    what: str
    #: where the arrays came from, for messages
    source: str
    #: uint8[total bytes]
    data: NDArray[Any]
    #: int64[n + 1]
    offsets: NDArray[Any]
    #: int64[n]
    order: NDArray[Any]

    def __post_init__(self) -> None:
        kinds = [(array.dtype, array.ndim) for array in (self.data, self.offsets, self.order)]
        if kinds != [(np.dtype("u1"), 1), (np.dtype("<i8"), 1), (np.dtype("<i8"), 1)]:
            raise DamagedTierError(f"{self.source}: the {self.what} names have unexpected dtypes or shapes")
        whole = len(self.offsets) == len(self.order) + 1 and self.offsets[0] == 0
        if not whole or self.offsets[-1] != len(self.data):
            raise DamagedTierError(f"{self.source}: the {self.what} names do not fit their offsets")

    def __len__(self) -> int:
        return len(self.order)

    def name(self, index: int) -> str:
        """Return the name of an id.

        Raises:
            UnknownNameError: the id is out of range.
            DamagedTierError: the name's bytes are damaged.

        """
        try:
            return self._bytes(self.check(index)).decode("utf-8")
        except UnicodeDecodeError:
            raise DamagedTierError(f"{self.source}: the name of {self.what} {index} is not UTF-8") from None

    def index(self, name: str) -> int:
        """Return the id of a name.

        Raises:
            UnknownNameError: no such name.

        """
        found = self.find(name)
        if found is None:
            raise UnknownNameError(f"unknown {self.what} {name!r}: it is not among the {len(self):,} of {self.source}")
        return found

    def find(self, name: str) -> int | None:
        """Return the id of a name, or None."""
        wanted = name.encode("utf-8", "surrogatepass")
        position = self._first_not_before(wanted)
        if position < len(self):
            candidate = self.check(int(self.order[position]))
            if self._bytes(candidate) == wanted:
                return candidate
        return None

    def check(self, index: int) -> int:
        """Return the id, which must be in range.

        Raises:
            UnknownNameError: it is not.

        """
        if not 0 <= index < len(self):
            raise UnknownNameError(f"unknown {self.what} id {index}: {self.source} has ids 0 to {len(self) - 1}")
        return index

    def _first_not_before(self, wanted: bytes) -> int:
        order = self.order.data
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self._bytes(self.check(order[middle])) < wanted:
                low = middle + 1
            else:
                high = middle
        return low

    def _bytes(self, index: int) -> bytes:
        # Views of the maps index several times faster than arrays do, one number at a time.
        start, stop = self.offsets.data[index : index + 2]
        if not 0 <= start <= stop <= len(self.data):
            raise DamagedTierError(f"{self.source}: the name of {self.what} {index} lies outside its bytes")
        return self.data[start:stop].tobytes()
