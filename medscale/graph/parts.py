"""The files of a graph, each cut out of sorted runs on disk: a file is a unit of work for whoever writes it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from medscale.graph.schema import NAMES_SCHEMA, PART_ROWS, ROW_GROUP_ROWS, PartWriter, open_writer
from medscale.graph.spill import copied, spilled
from medscale.logs import Advance

__all__ = ["Part", "parts_of", "write_part", "write_relations"]


class Part(NamedTuple):
    """One file of a directory of a graph: the rows from `first` to `last` of runs that follow one another."""

    directory: Path
    schema: pa.Schema
    first: int
    last: int
    #: (the run, the number of its first row, the number after its last)
    runs: tuple[tuple[Path, int, int], ...]


def parts_of(directory: Path, schema: pa.Schema, runs: Sequence[tuple[Path, int]]) -> list[Part]:
    """Return the files that runs (path, number of rows) become together; none if there are no rows."""
    ends = np.cumsum([0, *(count for _, count in runs)]).tolist()
    placed = [(path, start, end) for (path, _), start, end in zip(runs, ends[:-1], ends[1:], strict=True)]
    parts = []
    for first in range(0, ends[-1], PART_ROWS):
        last = min(first + PART_ROWS, ends[-1])
        inside = tuple(run for run in placed if run[1] < last and run[2] > first)
        parts.append(Part(directory, schema, first, last, inside))
    return parts


def write_part(part: Part, advance: Advance) -> None:
    """Write one file of a graph."""
    with PartWriter(part.directory, part.schema, first_part=part.first // PART_ROWS) as writer:
        for rows in _rows_of(part):
            writer.append(rows)
            advance(len(next(iter(rows.values()))))


def write_relations(path: Path, runs: Sequence[tuple[Path, int]]) -> None:
    """Write all relations into one file; they are few."""
    names = pa.chunked_array([spilled(run).column("name") for run, _ in runs]).combine_chunks()
    ids = pa.array(np.arange(len(names), dtype=np.int64))
    with open_writer(path, NAMES_SCHEMA) as writer:
        writer.write_table(pa.table([ids, names], schema=NAMES_SCHEMA), row_group_size=ROW_GROUP_ROWS)


def _rows_of(part: Part) -> Iterator[dict[str, pa.Array]]:
    """Yield a part's rows by column, at most a row group at a time; names with their ids."""
    for path, start, end in part.runs:
        batch = spilled(path)
        for first in range(max(part.first, start), min(part.last, end), ROW_GROUP_ROWS):
            last = min(first + ROW_GROUP_ROWS, part.last, end)
            rows = copied(batch.slice(first - start, last - first))
            columns = {name: rows.column(name) for name in rows.schema.names}
            if part.schema.equals(NAMES_SCHEMA):
                columns = {"id": pa.array(np.arange(first, last, dtype=np.int64)), **columns}
            yield columns
