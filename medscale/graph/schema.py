"""The form of a graph directory: splits, columns, Parquet schemas, limits of ids, and how files are written.

    manifest.json
    entities/part-*.parquet           id int64, name string; ids are dense and in the order of the rows
    relations.parquet                 id int64, name string
    entity_types/part-*.parquet       entity int64, type string, label string or null (where there are types)
    train|valid|test/part-*.parquet   head, relation, tail int64; rows shuffled once
    growth/part-*.parquet             of train, what vectors of new names alone learn from (of a graph that grew)

Page checksums are always written and always verified: without them Parquet returns flipped bits silently.
"""

from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medscale.location import Location

__all__ = [
    "ENTITIES",
    "ENTITY_TYPES",
    "GRAPH_FORMAT",
    "GRAPH_KIND",
    "GROWTH",
    "MAX_ID",
    "MAX_NAME_BYTES",
    "NAMES_SCHEMA",
    "PART_ROWS",
    "RELATIONS",
    "ROW_GROUP_ROWS",
    "SPLITS",
    "TRIPLES_SCHEMA",
    "TRIPLE_COLUMNS",
    "TYPES_SCHEMA",
    "PartWriter",
    "open_parquet",
    "open_writer",
]


GRAPH_KIND = "graph"
GRAPH_FORMAT = 1

SPLITS = ("train", "valid", "test")
#: of a graph that grew, the training triples that mention a new name, and some others: read as a split of its own
GROWTH = "growth"
ENTITIES, RELATIONS, ENTITY_TYPES = "entities", "relations.parquet", "entity_types"
TRIPLE_COLUMNS = ("head", "relation", "tail")

TRIPLES_SCHEMA = pa.schema([pa.field(name, pa.int64(), nullable=False) for name in TRIPLE_COLUMNS])
NAMES_SCHEMA = pa.schema([pa.field("id", pa.int64(), nullable=False), pa.field("name", pa.string(), nullable=False)])
TYPES_SCHEMA = pa.schema(
    [
        pa.field("entity", pa.int64(), nullable=False),
        pa.field("type", pa.string(), nullable=False),
        pa.field("label", pa.string()),
    ]
)

#: largest integer id that raw files may hold: the last one that every JSON reader and float64 keeps exact
MAX_ID = 2**53
#: longest name in bytes; longer ones are broken line ends or quoting, not names
MAX_NAME_BYTES = 1 << 20

#: rows per row group and per file: a reader holds one row group, a file is a unit of work for a reader
ROW_GROUP_ROWS = 1 << 17
PART_ROWS = 8 * ROW_GROUP_ROWS


def open_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Open a Parquet file for writing, with page checksums, as every file of a graph is written."""
    return pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)


def open_parquet(path: Location) -> pq.ParquetFile:
    """Open a Parquet file for reading, wherever it lies; pages that carry a checksum are checked against it.

    Raises:
        OSError, pyarrow.ArrowInvalid: not a Parquet file, its footer is damaged, or its filesystem is out of reach.

    """
    if isinstance(path, Path):
        return pq.ParquetFile(path, page_checksum_verification=True)
    # With pre_buffer a row group is one request, not one for each column.
    return pq.ParquetFile(path.path, filesystem=path.filesystem, pre_buffer=True, page_checksum_verification=True)


class PartWriter:
    """Writes rows as `part-00000.parquet`, `part-00001.parquet`, ... with row groups of one fixed size.

    The files depend on the rows alone, not on the batches in which they came. No rows: no file.
    """

    def __init__(self, directory: Path, schema: pa.Schema, *, part_rows: int = PART_ROWS, first_part: int = 0) -> None:
        assert part_rows % ROW_GROUP_ROWS == 0 or part_rows < ROW_GROUP_ROWS
        self._directory = directory
        self._schema = schema
        self._part_rows = part_rows
        self._group_rows = min(ROW_GROUP_ROWS, part_rows)
        self._pending = schema.empty_table()
        self._writer: pq.ParquetWriter | None = None
        self._rows_in_part = 0
        #: the number of the next file
        self.num_parts = first_part
        #: rows taken so far
        self.num_rows = 0

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._pending.num_rows:
            self._write_group(self._pending)
        self._close_part()

    def append(self, columns: dict[str, Any]) -> None:
        """Add rows: one array (numpy or Arrow) per column of the schema, all of one length."""
        rows = pa.table(columns, schema=self._schema)
        self.num_rows += rows.num_rows
        self._pending = pa.concat_tables([self._pending, rows])
        while self._pending.num_rows >= self._group_rows:
            self._write_group(self._pending.slice(0, self._group_rows))
            # Copied, so that the rows already written do not stay in memory behind the slice.
            self._pending = self._pending.slice(self._group_rows).combine_chunks()

    def _write_group(self, rows: pa.Table) -> None:
        if self._writer is None:
            self._directory.mkdir(exist_ok=True)
            path = self._directory / f"part-{self.num_parts:05d}.parquet"
            self._writer = open_writer(path, self._schema)
            self.num_parts += 1
        # In one piece: where pages end must not tell how the rows came.
        self._writer.write_table(rows.combine_chunks(), row_group_size=self._group_rows)
        self._rows_in_part += rows.num_rows
        if self._rows_in_part >= self._part_rows:
            self._close_part()

    def _close_part(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None
        self._rows_in_part = 0
