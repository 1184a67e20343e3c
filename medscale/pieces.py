"""Rows of a checkpoint's tables, read where they lie in its files: neither a table nor a piece of one is in memory.

DCP writes each piece of a table as the zip stream of `torch.save`, one after the other into the files of the workers,
and notes where. In such a stream the numbers are one entry that is not compressed, row after row, so a row is bytes at
a known place whatever the number of workers was, and whether whole tables or rows of them lay on a worker.
"""

import io
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from medscale.errors import CheckpointError

__all__ = ["StoredRows"]

#: bytes of a piece that are mapped at a time while single rows are picked out of it
WINDOW_BYTES = 64 << 20
#: of an entry's header in a zip file: bytes before its name, and where the lengths of its name and of what follows are
_HEADER_BYTES, _LENGTHS = 30, slice(26, 30)

_FLOAT32 = np.dtype("<f4")


@dataclass(frozen=True)
class _Piece:
    """Rows [first, first + rows) of a table, which begin at a byte of a file."""

    path: Path
    offset: int
    first: int
    rows: int


class StoredRows:
    """The rows of some float32 tables in a DCP directory that has been verified; threads may read at once.

    `widths` names the tables and tells their columns.

    Raises:
        CheckpointError: a table is missing, of another size, or not stored as plain rows.

    """

    def __init__(self, state: Path, widths: Mapping[str, int], num_rows: int) -> None:
        self.widths = dict(widths)
        self._pieces: dict[str, list[_Piece]] = {}
        try:
            metadata = FileSystemReader(state).read_metadata()
            for name, width in widths.items():
                self._pieces[name] = _pieces_of(state, metadata, name, width, num_rows)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as cause:
            raise CheckpointError(f"{state} cannot be read by rows: {cause!r}") from None

    def read(self, table: str, start: int, stop: int) -> NDArray[np.float32]:
        """Return rows [start, stop) of a table, float32 [stop - start, width].

        Raises:
            CheckpointError: a file went away, or is shorter than it was.

        """
        rows = np.empty((stop - start, self.widths[table]), _FLOAT32)
        row_bytes = self.widths[table] * _FLOAT32.itemsize
        for piece in self._pieces[table]:
            first, last = max(start, piece.first), min(stop, piece.first + piece.rows)
            if first < last:
                offset = piece.offset + (first - piece.first) * row_bytes
                _fill(rows[first - start : last - start].reshape(-1).view(np.uint8).data, piece.path, offset)
        return rows

    def pick(self, table: str, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return single rows of a table, float32 [len(ids), width]; ids must rise.

        Raises:
            CheckpointError: a file went away, or is shorter than it was.

        """
        row_bytes = self.widths[table] * _FLOAT32.itemsize
        rows = np.empty((len(ids), row_bytes), np.uint8)
        step = max(1, WINDOW_BYTES // row_bytes)
        for piece in self._pieces[table]:
            for first in range(piece.first, piece.first + piece.rows, step):
                last = min(first + step, piece.first + piece.rows)
                here = slice(*np.searchsorted(ids, (first, last)))
                if here.start < here.stop:
                    offset = piece.offset + (first - piece.first) * row_bytes
                    # Bytes, not numbers: a window may begin at any of them. It is unmapped at once, and with it go
                    # its pages from this process's memory.
                    window = _mapped(piece.path, offset, (last - first, row_bytes))
                    np.take(window, ids[here] - first, axis=0, out=rows[here], mode="clip")
        return rows.view(_FLOAT32)


def _pieces_of(state: Path, metadata: Metadata, table: str, width: int, num_rows: int) -> list[_Piece]:
    """Return where the rows of a table lie, in order.

    Raises:
        ValueError: they are not what they should be.

    """
    stored = metadata.state_dict_metadata[table]
    if (
        isinstance(stored, BytesStorageMetadata)
        or stored.properties.dtype != torch.float32
        or tuple(stored.size) != (num_rows, width)
    ):
        raise ValueError(f"{table} should be float32 [{num_rows}, {width}], found {stored}")
    pieces, end = [], 0
    for chunk in sorted(stored.chunks, key=lambda chunk: tuple(chunk.offsets)):
        (first, column), (rows, columns) = chunk.offsets, chunk.sizes
        if (first, column, columns) != (end, 0, width):
            raise ValueError(f"{table} has a piece at row {first}, column {column} that does not follow row {end}")
        place = metadata.storage_data[MetadataIndex(table, chunk.offsets)]
        path = state / place.relative_path
        pieces.append(_Piece(path, _numbers_at(path, place.offset, place.length, rows * width), first, rows))
        end = first + rows
    if end != num_rows:
        raise ValueError(f"{table} ends at row {end} of {num_rows}")
    return pieces


def _numbers_at(path: Path, start: int, length: int, count: int) -> int:
    """Return the byte of a file at which the numbers of a tensor begin, whose zip stream begins at `start`.

    Raises:
        ValueError: they are compressed, not so many, or not little-endian.

    """
    with path.open("rb") as file, zipfile.ZipFile(_Part(file, start, length)) as stream:
        (entry,) = (one for one in stream.infolist() if one.filename.endswith("/data/0"))
        name = entry.filename.removesuffix("data/0")
        plain = entry.compress_type == zipfile.ZIP_STORED and stream.read(f"{name}byteorder") == b"little"
        if not plain or entry.file_size != count * _FLOAT32.itemsize:
            raise ValueError(f"{path}: the tensor at byte {start} is not {count} plain numbers")
        header = os.pread(file.fileno(), _HEADER_BYTES, start + entry.header_offset)
    lengths = np.frombuffer(header[_LENGTHS], "<u2")
    return start + entry.header_offset + _HEADER_BYTES + int(lengths.sum())


class _Part(io.RawIOBase):
    """Bytes [start, start + length) of a file as a file of their own."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self.file = file
        self.start = start
        self.length = length
        self.place = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.length}[whence] + offset
        return self.place

    def read(self, size: int = -1) -> bytes:
        left = self.length - self.place
        data = os.pread(self.file.fileno(), left if size < 0 else min(size, left), self.start + self.place)
        self.place += len(data)
        return data


def _fill(buffer: memoryview, path: Path, offset: int) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as cause:
        raise _gone(path, cause) from None
    try:
        while buffer:
            got = os.preadv(handle, [buffer], offset)
            if got == 0:
                raise CheckpointError(f"{path} became shorter while it was read")
            buffer, offset = buffer[got:], offset + got
    finally:
        os.close(handle)


def _mapped(path: Path, offset: int, shape: tuple[int, int]) -> NDArray[np.uint8]:
    try:
        return np.memmap(path, np.uint8, "r", offset, shape)
    except (OSError, ValueError) as cause:
        raise _gone(path, cause) from None


def _gone(path: Path, cause: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read any more: a running job may have retired it; try again ({cause})")
