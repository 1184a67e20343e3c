"""A graph directory, opened: its facts, its triples as arrays, its names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from medscale.errors import GraphError
from medscale.graph.schema import (
    ENTITIES,
    ENTITY_TYPES,
    GRAPH_FORMAT,
    GRAPH_KIND,
    GROWTH,
    NAMES_SCHEMA,
    RELATIONS,
    SPLITS,
    TRIPLE_COLUMNS,
    TRIPLES_SCHEMA,
    TYPES_SCHEMA,
    open_parquet,
)
from medscale.location import Location
from medscale.manifest import MANIFEST, Manifest, read_manifest, verify_files
from medscale.storage import safe_join, sha256_of

__all__ = ["Graph", "graph_exists", "open_graph"]


@dataclass(frozen=True)
class Graph:
    """A prepared graph. What its methods return is read from its files anew, and checked, at every call."""

    #: local, or on any filesystem of pyarrow's; `schema.open_parquet` opens its Parquet files either way
    directory: Location
    name: str
    num_entities: int
    num_relations: int
    #: by split: "train", "valid", "test"; of a graph that grew also "growth", a part of train
    num_triples: Mapping[str, int]
    #: of the manifest, which holds the hash of every file: the identity of the graph
    sha256: str
    #: all that was counted while the graph was prepared, and its origin
    facts: Mapping[str, Any]
    #: relative names of all files, in order
    files: tuple[str, ...]

    def parts(self, split: str) -> list[Location]:
        """Return the Parquet files of a split, in order; none if it is empty."""
        assert split in (*SPLITS, GROWTH), split
        return self._under(split)

    def triples(self, split: str) -> npt.NDArray[np.int64]:
        """Return all triples of a split, int64 [num_triples, 3] (head, relation, tail), in the files' order.

        Raises:
            GraphError: a file is damaged, or holds other columns, rows or ids than the manifest says.

        """
        triples = np.empty((self.num_triples[split], 3), dtype=np.int64)
        filled = 0
        for path in self.parts(split):
            for rows in self.read_part(path):
                if filled + len(rows) > len(triples):
                    raise GraphError(f"{path} holds more rows than its manifest says; prepare the graph anew")
                triples[filled : filled + len(rows)] = rows
                filled += len(rows)
        if filled != len(triples):
            raise GraphError(f"{self.directory}: {split} holds {filled} triples, its manifest says {len(triples)}")
        return triples

    def read_part(self, path: Location) -> Iterator[npt.NDArray[np.int64]]:
        """Yield one file's triples, int64 [rows, 3] per row group, so that one row group is in memory.

        Raises:
            GraphError: the file is damaged, has other columns, or holds an id out of range (row group, row).

        """
        limits = np.array([self.num_entities, self.num_relations, self.num_entities])
        for group, table in enumerate(_row_groups(path, TRIPLES_SCHEMA)):
            rows = np.stack([table.column(column).to_numpy() for column in TRIPLE_COLUMNS], axis=1)
            outside = (rows < 0) | (rows >= limits)
            if outside.any():
                row, column = np.argwhere(outside)[0]
                raise GraphError(
                    f"{path}: row group {group}, row {row} (both from 0): {TRIPLE_COLUMNS[column]} "
                    f"{rows[row, column]} is out of range 0..{limits[column] - 1}; prepare the graph anew"
                )
            yield rows

    def entity_names(self) -> pa.Array:
        """Return the entities' names, string [num_entities]; the index is the id.

        Raises:
            GraphError: a file is damaged, or ids are not dense.

        """
        return self._names(ENTITIES, self.num_entities)

    def relation_names(self) -> pa.Array:
        """Return the relations' names, string [num_relations]; the index is the id.

        Raises:
            GraphError: the file is damaged, or ids are not dense.

        """
        return self._names(RELATIONS, self.num_relations)

    def entity_types(self) -> pa.Table | None:
        """Return (entity int64, type string, label string or null), ordered by entity; None: there are none.

        An entity may have no type, or several.

        Raises:
            GraphError: a file is damaged, or names an entity out of range.

        """
        if not self._under(ENTITY_TYPES):
            return None
        table = pa.concat_tables(self.tables(ENTITY_TYPES))
        entities = table.column("entity").to_numpy()
        if len(entities) and not 0 <= entities.min() <= entities.max() < self.num_entities:
            raise GraphError(f"{self.directory / ENTITY_TYPES} names an entity out of range; prepare the graph anew")
        return table

    def first_types(self) -> tuple[tuple[str, ...], npt.NDArray[np.int32]] | None:
        """Return the types' names, sorted, and each entity's, int32 [num_entities]; None: there are none.

        A type is a place among the names, or -1. Of an entity's types the first by name counts.

        Raises:
            GraphError: a file is damaged, or names an entity out of range.

        """
        table = self.entity_types()
        if table is None:
            return None
        kinds = table.column("type").combine_chunks().dictionary_encode()
        by_name = pc.sort_indices(kinds.dictionary)
        places = np.empty(len(by_name), np.int32)
        places[by_name.to_numpy()] = np.arange(len(by_name))
        entities, types = table.column("entity").to_numpy(), places[kinds.indices.to_numpy()]
        codes = np.full(self.num_entities, len(places), np.int32)
        np.minimum.at(codes, entities, types)
        codes[codes == len(places)] = -1
        return tuple(kinds.dictionary.take(by_name).to_pylist()), codes

    def tables(self, prefix: str) -> Iterator[pa.Table]:
        """Yield the rows of "entities", "relations.parquet" or "entity_types", a row group at a time.

        Raises:
            GraphError: a file is damaged.

        """
        schema = TYPES_SCHEMA if prefix == ENTITY_TYPES else NAMES_SCHEMA
        for path in self._under(prefix):
            yield from _row_groups(path, schema)

    @property
    def lineage(self) -> Mapping[str, Any] | None:
        """What a graph that grew says of the one that it grew out of: see `growth.extend_graph`; None: it did not."""
        return self.facts.get("lineage")

    def _under(self, prefix: str) -> list[Location]:
        return [safe_join(self.directory, name) for name in self.files if name.split("/")[0] == prefix]

    def _names(self, prefix: str, count: int) -> pa.Array:
        table = pa.concat_tables([NAMES_SCHEMA.empty_table(), *self.tables(prefix)])
        ids = table.column("id").to_numpy()
        if not np.array_equal(ids, np.arange(count)):
            raise GraphError(f"{self.directory / prefix}: ids are not 0..{count - 1}; prepare the graph anew")
        names = table.column("name")
        # One chunk of 32-bit offsets holds 2 GiB of names; more names stay as they are.
        return names.combine_chunks() if names.nbytes < 2**31 else names


def graph_exists(directory: Location) -> bool:
    """Tell whether a graph, whole or damaged, is in the way of building one here.

    A local directory appears as a whole, by rename. Elsewhere nothing can be renamed: there the manifest, which is
    written last, is what makes files a graph, and files without one are what an interrupted upload left.

    Raises:
        GraphError: the filesystem cannot be reached, or refuses.

    """
    if isinstance(directory, Path):
        return directory.exists()
    try:
        return (directory / MANIFEST).is_file()
    except (OSError, ValueError) as cause:
        raise GraphError(f"{directory} cannot be reached: {cause}") from None


def open_graph(directory: Location, *, verify: bool = True) -> Graph:
    """Open a graph directory; with `verify` every byte is checked against the manifest first.

    Raises:
        GraphError: it is missing, incomplete, damaged, out of reach, or of another format; names the file.

    """
    manifest = read_manifest(directory, GRAPH_KIND, GRAPH_FORMAT, GraphError)
    if verify:
        verify_files(directory, manifest, GraphError)
    name, entities, relations, triples = _checked_facts(directory, manifest)
    try:
        identity = sha256_of(directory / MANIFEST)
    except (OSError, ValueError) as cause:
        raise GraphError(f"{directory / MANIFEST} cannot be read: {cause}") from None
    return Graph(directory, name, entities, relations, triples, identity, manifest.facts, tuple(sorted(manifest.files)))


def _checked_facts(directory: Location, manifest: Manifest) -> tuple[str, int, int, dict[str, int]]:
    facts = manifest.facts
    name, triples = facts.get("name"), facts.get("num_triples")
    entities, relations = facts.get("num_entities"), facts.get("num_relations")
    if not (isinstance(name, str) and _is_count(entities) and _is_count(relations)):
        raise GraphError(f"{directory / MANIFEST} is damaged: name, num_entities or num_relations is missing")
    if not isinstance(triples, dict) or not all(_is_count(triples.get(split)) for split in SPLITS):
        raise GraphError(f"{directory / MANIFEST} is damaged: num_triples is missing or wrong")
    if not _is_count(triples.get(GROWTH, 0)):
        raise GraphError(f"{directory / MANIFEST} is damaged: num_triples is wrong")
    return name, entities, relations, {split: triples[split] for split in (*SPLITS, GROWTH) if split in triples}


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _row_groups(path: Location, schema: pa.Schema) -> Iterator[pa.Table]:
    where = str(path)
    try:
        with open_parquet(path) as parquet:
            if not parquet.schema_arrow.equals(schema):
                found = ", ".join(f"{field.name} {field.type}" for field in parquet.schema_arrow)
                raise GraphError(f"{path} has columns {found}, not a graph's; prepare the graph anew")
            for group in range(parquet.metadata.num_row_groups):
                where = f"{path}: row group {group} (from 0)"
                yield parquet.read_row_group(group)
    except (pa.ArrowException, OSError) as cause:
        trouble, advice = "damaged or missing", "prepare the graph anew"
        if not isinstance(path, Path):
            trouble, advice = "damaged, missing or out of reach", "try again, or prepare the graph anew"
        raise GraphError(f"{where} is {trouble}: {cause}; {advice}") from None
