"""Tensors of a safetensors file as read-only maps, once everything about the file's header is sound.

The whole header is checked against the file's size before an array is made, so a file that was cut, padded
or tampered with raises; it never gives an array that lies elsewhere. What the bytes hold is the manifest's
business.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medscale.errors import DamagedTierError
from medscale.manifest import parse_json

__all__ = ["DTYPES", "map_tensors", "safetensors_header"]

#: the types that tiers are made of, by their safetensors names
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}

#: a tier's header names a handful of tensors; the format itself allows 100 MB
MAX_HEADER_BYTES = 65_536


def safetensors_header(tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> bytes:
    """Return the bytes before the data of a safetensors file whose tensors follow in the order given.

    The data begins at a multiple of 8 and so does each tensor if wider types come first, which maps like.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, Any] = {}
    start = 0
    for name, (dtype, shape) in tensors.items():
        stop = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        entries[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    assert len(text) <= MAX_HEADER_BYTES
    return len(text).to_bytes(8, "little") + text


def map_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Map every tensor of a safetensors file, read-only.

    Raises:
        DamagedTierError: unreadable, or any part of the header is malformed or does not fit the file's size.

    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"its header claims {length} bytes, of {size} in the file")
            header = file.read(length)
        places = _places(header, size - 8 - length)
        # One map a file: a process may have some ten thousand maps, and a tier many shards.
        data = np.memmap(path, np.uint8, "r", shape=size).view(np.ndarray)
        return {
            name: np.ndarray(shape, dtype, data.data, 8 + length + start)
            for name, (start, dtype, shape) in places.items()
        }
    except (OSError, ValueError, OverflowError) as cause:
        raise DamagedTierError(f"{path} is not a sound safetensors file: {cause}") from None


def _places(header: bytes, data_bytes: int) -> dict[str, tuple[int, np.dtype[Any], tuple[int, ...]]]:
    """Return (offset in the data, dtype, shape) of each tensor; together they cover the data exactly once."""
    if not header.startswith(b"{"):
        raise ValueError("its header does not begin with '{'")
    entries = parse_json(header.decode("utf-8"))
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is not a map of strings")
    spans = sorted((_span(name, entry), name) for name, entry in entries.items())
    end = 0
    for (start, stop), name in spans:
        if start != end:
            raise ValueError(f"tensor {name!r} begins at {start}, the one before it ends at {end}")
        end = stop
    if end != data_bytes:
        raise ValueError(f"its tensors end at {end}, its data at {data_bytes}")
    return {name: (start, DTYPES[entries[name]["dtype"]], tuple(entries[name]["shape"])) for (start, _), name in spans}


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Return a tensor's (start, stop) in the data, its entry checked."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} lacks dtype, shape or data_offsets, or has more")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if entry["dtype"] not in list(DTYPES):
        raise ValueError(f"tensor {name!r} has dtype {entry['dtype']!r}; tiers use {', '.join(DTYPES)}")
    if not _whole_numbers(shape) or len(shape) > 2 or not _whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has a malformed shape or data_offsets")
    elements = 1
    for length in shape:
        elements *= length  # Python integers: no product can wrap around
    if offsets[1] - offsets[0] != elements * DTYPES[entry["dtype"]].itemsize:
        raise ValueError(f"tensor {name!r} of shape {shape} does not fill its data_offsets {offsets}")
    return offsets[0], offsets[1]


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
