"""Numbers of rows at the precisions of tiers: float32, float16, int8 and int4, per row and cut.

A cut is a span of a row's columns; each is coded by itself, so that the first cuts of a row are the whole row of a
smaller tier, byte for byte. `FORMAT.md` states the codes.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

__all__ = ["PRECISIONS", "Precision", "decode", "encode", "row_bytes", "stored_dtype", "stored_width"]

Precision = Literal["float32", "float16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_DTYPES: dict[Precision, np.dtype[Any]] = {
    "float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "int8": np.dtype("i1"), "int4": np.dtype("u1"),
}  # fmt: skip
#: largest magnitude of a coded number
_LARGEST = {"int8": 127, "int4": 7}


def stored_dtype(precision: Precision) -> np.dtype[Any]:
    """Return the type that rows are stored in."""
    return _DTYPES[precision]


def stored_width(precision: Precision, columns: int) -> int:
    """Return how many stored numbers the columns of one cut take."""
    return -(-columns // 2) if precision == "int4" else columns


def row_bytes(widths: Sequence[int], precision: Precision, *, norms: bool) -> int:
    """Return the bytes of a row whose cuts have so many columns: numbers, scales, and the norms that products need."""
    numbers = sum(stored_width(precision, width) for width in widths) * stored_dtype(precision).itemsize
    scales = len(widths) if precision in _LARGEST else 0
    return numbers + _DTYPES["float32"].itemsize * (scales + (len(widths) - 1 if norms else 0))


def encode(cut_NC: NDArray[np.float32], precision: Precision) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """Return one cut of some rows as stored, [N, stored width], and its scales, float32 [N], if it has any.

    Raises:
        OverflowError: a number is too large for float16; its row is the argument.

    """
    if precision == "float32":
        return np.ascontiguousarray(cut_NC), None
    if precision == "float16":
        with np.errstate(over="ignore"):
            half = cut_NC.astype("<f2")
        beyond = np.flatnonzero(~np.isfinite(half).all(axis=1))
        if beyond.size:
            raise OverflowError(int(beyond[0]))
        return half, None
    largest = _LARGEST[precision]
    scales_N = (np.abs(cut_NC).max(axis=1, initial=0) / np.float32(largest)).astype("<f4")
    # Where the scale underflows to zero all numbers do.
    divisors_N = np.where(scales_N > 0, scales_N, np.float32(np.inf))
    # A denormal scale is rounded itself, and the largest number may then be more than `largest` of it.
    whole_NC = np.clip(np.rint(cut_NC / divisors_N[:, None]), -largest, largest).astype("i1")
    return (whole_NC if precision == "int8" else _pack(whole_NC)), scales_N


def decode(
    stored_NW: NDArray[Any], scales_NJ: NDArray[np.float32] | None, precision: Precision, widths: Sequence[int]
) -> NDArray[np.float32]:
    """Return rows as float32 [N, sum of widths]: the inverse of `encode` for cuts of so many columns, side by side.

    float32 rows are returned as they are, not copied.
    """
    if precision == "float32":
        return stored_NW
    if precision == "float16":
        return stored_NW.astype(np.float32)
    assert scales_NJ is not None
    rows_NC = np.empty((len(stored_NW), sum(widths)), np.float32)
    column = place = 0
    for number, width in enumerate(widths):
        taken = stored_width(precision, width)
        part = stored_NW[:, place : place + taken]
        whole = part if precision == "int8" else _unpack(part)[:, :width]
        np.multiply(whole, scales_NJ[:, number, None], out=rows_NC[:, column : column + width], casting="unsafe")
        column, place = column + width, place + taken
    return rows_NC


def _pack(whole_NC: NDArray[np.int8]) -> NDArray[np.uint8]:
    nibbles = (whole_NC + 8).astype("u1")
    if nibbles.shape[1] % 2:
        nibbles = np.pad(nibbles, ((0, 0), (0, 1)), constant_values=8)
    packed: NDArray[np.uint8] = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return packed


def _unpack(packed_NW: NDArray[np.uint8]) -> NDArray[np.int8]:
    nibbles = np.stack([packed_NW & 15, packed_NW >> 4], -1).reshape(len(packed_NW), -1)
    whole: NDArray[np.int8] = nibbles.astype("i1") - np.int8(8)
    return whole
