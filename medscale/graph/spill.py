"""Tables that lie on disk between the stages of an ingest: Arrow's own format, mapped into memory to be read."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

__all__ = ["copied", "spill", "spilled"]


def spill(path: Path, columns: Mapping[str, Any]) -> None:
    """Write columns (numpy or Arrow, all of one length, no nulls but in strings) as one batch; it appears whole."""
    batch = pa.record_batch(dict(columns))
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    with pa.OSFile(str(draft), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    draft.replace(path)


def spilled(path: Path) -> pa.RecordBatch:
    """Return what `spill` wrote, mapped: of its columns, and slices of them, only what is read is in memory."""
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


def copied(rows: pa.RecordBatch) -> pa.RecordBatch:
    """Return a copy, so that the file may be closed: there are more files than a process may have open."""
    return pa.concat_batches([rows])
