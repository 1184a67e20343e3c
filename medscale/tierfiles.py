"""Files of a tier, hashed while they are written; `runtime/FORMAT.md` specifies them."""

import hashlib
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medscale.namehash import utf8
from medscale.runtime.shards import safetensors_header
from medscale.storage import fault_point, sha256_of

__all__ = [
    "HashedFile", "ParquetRows", "RowsFile", "fixed_size_list", "list_type", "name_tensors", "octets",
    "write_tensors",
]  # fmt: skip

#: a file of so many bytes is made durable as soon as it is complete
EARLY_BYTES = 8 << 20

Array = NDArray[Any]
#: dtype and shape of a tensor
Kind = tuple[np.dtype[Any], tuple[int, ...]]


class HashedFile:
    """A file that is written from front to back, and its SHA-256; pyarrow may write to it too."""

    def __init__(self, path: Path) -> None:
        # A task that is run again replaces what it left.
        self._file = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._written = self._started = 0

    def write(self, data: Any) -> int:
        """Append bytes, or whatever lets itself be seen as bytes."""
        view = memoryview(data)
        self._digest.update(view)
        _write_all(self._file.fileno(), view)
        self._written += len(view)
        if self._written - self._started >= EARLY_BYTES and hasattr(os, "posix_fadvise"):
            # Pages that are "not needed" begin their way to the disk, and nobody waits for them.
            os.posix_fadvise(self._file.fileno(), self._started, self._written - self._started, os.POSIX_FADV_DONTNEED)
            self._started = self._written
        return len(view)

    def flush(self) -> None:
        """Do nothing: there is no buffer."""

    @property
    def closed(self) -> bool:
        """Whether nothing more can be written."""
        return self._file.closed

    def close(self) -> None:
        """Write no more."""
        if not self.closed:
            _close(self._file)

    @property
    def sha256(self) -> str:
        """Of all that was written."""
        return self._digest.hexdigest()


class RowsFile:
    """A safetensors file whose `vectors` are appended a few rows at a time.

    `known` are other tensors as they are, `later` those that are given at the end.
    """

    def __init__(self, path: Path, vectors: Kind, known: Mapping[str, Array], later: Mapping[str, Kind]) -> None:
        kinds = {"vectors": vectors} | {name: (array.dtype, array.shape) for name, array in known.items()} | dict(later)
        # Wider types first. Among equals `vectors`: what comes before them has to be known when they are hashed.
        order = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name != "vectors", name))
        place = order.index("vectors")
        self.path = path
        self._before, self._after = order[:place], order[place + 1 :]
        self._known = known
        self._header = safetensors_header({name: kinds[name] for name in order})
        self._hashed: HashedFile | None = None
        if self._before and not known.keys() >= set(self._before):
            self._file = path.open("wb", buffering=0)
            skipped = sum(int(np.prod(shape)) * dtype.itemsize for dtype, shape in map(kinds.__getitem__, self._before))
            self._file.seek(len(self._header) + skipped)
        else:
            self._hashed = HashedFile(path)
            for part in (self._header, *(octets(known[name]) for name in self._before)):
                self._hashed.write(part)

    def append(self, rows: Array) -> None:
        """Append rows of `vectors`."""
        if self._hashed is not None:
            self._hashed.write(octets(rows))
        else:
            _write_all(self._file.fileno(), octets(rows))

    def close(self, later: Mapping[str, Array]) -> str:
        """Write the other tensors and return the file's SHA-256."""
        tensors = dict(self._known) | dict(later)
        if self._hashed is not None:
            for name in self._after:
                self._hashed.write(octets(tensors[name]))
            self._hashed.close()
            return self._hashed.sha256
        for name in self._after:
            _write_all(self._file.fileno(), octets(tensors[name]))
        self._file.seek(0)
        _write_all(self._file.fileno(), memoryview(self._header))
        for name in self._before:
            _write_all(self._file.fileno(), octets(tensors[name]))
        _close(self._file)
        # What stands before the vectors was not known while they came, so here the hash takes a second look, at
        # pages that the system has just been given.
        return sha256_of(self.path)


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> str:
    """Write a safetensors file, wider types first, and return its SHA-256."""
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    file = HashedFile(path)
    file.write(safetensors_header({name: (array.dtype, array.shape) for name, array in ordered.items()}))
    for array in ordered.values():
        file.write(octets(array))
    file.close()
    return file.sha256


def name_tensors(what: str, names: pa.Array) -> dict[str, Array]:
    """Return the order (int64), offsets (int64) and bytes (uint8) of names; see `runtime.names`."""
    data, offsets = utf8(names)
    order = pc.sort_indices(names.cast(pa.large_string())).to_numpy().astype(np.int64)
    return {f"{what}_order": order, f"{what}_offsets": offsets, f"{what}_bytes": data}


class ParquetRows:
    """A Parquet file whose rows are appended a few at a time, a row group each; `columns` tells types by name."""

    def __init__(self, path: Path, columns: Mapping[str, pa.DataType]) -> None:
        self.path = path
        # Nothing is null, which spares the writer to look, and to write it.
        self.schema = schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])
        self._file = HashedFile(path)
        # Flipped bits pass unseen without page checksums. Trained columns do not compress; names do.
        self._writer = pq.ParquetWriter(
            self._file,
            schema,
            compression={name: "zstd" for name in ("id", "name") if name in schema.names},
            use_dictionary=False,
            write_statistics=[name for name in ("id", "name") if name in schema.names],
            write_page_checksum=True,
        )

    def append(self, columns: Mapping[str, Any]) -> None:
        """Append rows, given by columns."""
        self._writer.write_table(pa.table([columns[name] for name in self.schema.names], schema=self.schema))

    def close(self) -> str:
        """Write the footer and return the file's SHA-256."""
        self._writer.close()
        self._file.close()
        return self._file.sha256


def fixed_size_list(rows: Array) -> pa.FixedSizeListArray:
    """Return rows [N, C] as N lists of C numbers, which share their memory."""
    numbers = pa.array(rows.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(numbers, type=list_type(numbers.type, rows.shape[1]))


def list_type(number: pa.DataType, length: int) -> pa.DataType:
    """Return the type of lists of so many numbers, none of them null."""
    return pa.list_(pa.field("item", number, nullable=False), length)


def octets(array: Array) -> memoryview:
    """Return an array's bytes, row after row, without a copy where they lie so already."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _close(file: FileIO) -> None:
    # Whoever publishes the files makes all of them durable. Large ones go to the disk while others are being made.
    if os.fstat(file.fileno()).st_size >= EARLY_BYTES:
        os.fsync(file.fileno())
    file.close()
    fault_point("after-shard")


def _write_all(handle: int, view: memoryview) -> None:
    while len(view):
        view = view[os.write(handle, view) :]
