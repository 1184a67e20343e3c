"""Entity types: rows of (entity, type, label) by name, sorted, and matched with each range of the entities' names."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medscale.graph.chunks import INTEGER, ROW_BYTES
from medscale.graph.raw import read_rows
from medscale.graph.schema import TYPES_SCHEMA
from medscale.graph.sources import RawFile, RawLayout
from medscale.graph.spill import copied, spill, spilled
from medscale.graph.vocab import Range, order_of, place_of
from medscale.logs import Advance

__all__ = ["Matching", "TypesFile", "match_types", "read_types"]

_COLUMNS = ("entity", "type", "label")


class TypesFile(NamedTuple):
    """A raw file that tells types, and where its chunks go."""

    file: RawFile
    layout: RawLayout
    directory: Path
    number: int
    #: the names of the graph's entities are all integers, and so sorted
    numerical: bool
    #: of a chunk
    num_bytes: int


class Matching(NamedTuple):
    """A range of the entities whose types are to be found in all chunks, and written in order (TYPES_SCHEMA)."""

    entities: Range
    first_id: int
    sources: tuple[Path, ...]
    target: Path


def read_types(one: TypesFile, advance: Advance) -> tuple[list[Path], int]:
    """Write a file's rows as chunks sorted by entity, each row once with its count; return these and the sum.

    Raises:
        GraphError: the file is wrong; names line or row.

    """
    roles = list(one.layout.roles)
    paths, num_rows = list[Path](), 0
    waiting, size = list[pa.Table](), 0

    def write() -> None:
        nonlocal waiting, size
        if waiting:
            paths.append(one.directory / f"{one.number:06d}-{len(paths):04d}.types")
            _write_types(paths[-1], pa.concat_tables(waiting), numerical=one.numerical)
        waiting, size = [], 0

    for rows in read_rows(one.file, one.layout):
        # Type columns of triples repeat an entity's type with every triple of it.
        waiting.append(pa.table(rows.names).group_by(roles).aggregate([]))
        num_rows += len(waiting[-1])
        size += waiting[-1].nbytes + ROW_BYTES * len(waiting[-1])
        if size >= one.num_bytes:
            write()
    write()
    return paths, num_rows


def _write_types(path: Path, rows: pa.Table, *, numerical: bool) -> None:
    if "label" not in rows.column_names:
        rows = rows.append_column("label", pa.nulls(len(rows), pa.string()))
    rows = rows.group_by(list(_COLUMNS)).aggregate([([], "count_all")])
    if numerical:
        # Other names are none of the graph's.
        rows = rows.filter(pc.match_substring_regex(rows.column("entity"), INTEGER))
    rows = rows.combine_chunks()
    rows = rows.take(pa.array(order_of(rows.column("entity"), numerical=numerical)))
    spill(path, {name: rows.column(name).combine_chunks() for name in (*_COLUMNS, "count_all")})


def match_types(one: Matching, advance: Advance) -> tuple[int, int]:
    """Write the distinct types of a range's entities by id; return how many, and the rows that they came from."""
    numerical, slices = one.entities.numerical, []
    for path in one.sources:
        batch = spilled(path)
        entities = batch.column("entity")
        start = place_of(one.entities.low, entities, numerical=numerical, none=0)
        end = place_of(one.entities.high, entities, numerical=numerical, none=len(entities))
        slices.append(copied(batch.slice(start, end - start)))
    rows = pa.Table.from_batches(slices)
    places = pc.index_in(rows.column("entity"), value_set=spilled(one.entities.names).column("name"))
    rows, places = rows.filter(places.is_valid()), places.drop_null()
    ids = pa.array(places.to_numpy().astype(np.int64) + one.first_id)
    table = pa.table([ids, rows.column("type"), rows.column("label")], schema=TYPES_SCHEMA)
    distinct = table.group_by(list(TYPES_SCHEMA.names)).aggregate([])
    ordered = distinct.sort_by([(name, "ascending") for name in TYPES_SCHEMA.names])
    spill(one.target, {name: ordered.column(name).combine_chunks() for name in TYPES_SCHEMA.names})
    return len(ordered), int(rows.column("count_all").to_numpy().sum())
