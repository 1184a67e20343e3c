"""From raw files to a graph directory, out of core.

Batches of names go from Arrow's readers into a temporary on-disk DuckDB database beside the graph, which
numbers the names, joins them to the triples and sorts these by a seeded hash, spilling to disk above
`graph.memory_mib`. Sorting shuffles the rows and brings duplicates together. What comes back is streamed into
Parquet. Memory is bounded by the number of distinct names, not of triples.

The hash is taken from the MD5 of a text (seed and ids; for a split: seed and names), a value that is the same
under every version of DuckDB and any number of threads. A directory appears whole, or not at all.
"""

import contextlib
import dataclasses
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from medscale.config import GraphSection
from medscale.errors import CapacityError, GraphError
from medscale.graph.raw import layout_problems, read_rows
from medscale.graph.reader import Graph, open_graph
from medscale.graph.scan import read_header
from medscale.graph.schema import (
    ENTITIES,
    ENTITY_TYPES,
    GRAPH_FORMAT,
    GRAPH_KIND,
    NAMES_SCHEMA,
    RELATIONS,
    ROW_GROUP_ROWS,
    SPLITS,
    TRIPLE_COLUMNS,
    TRIPLES_SCHEMA,
    TYPES_SCHEMA,
    PartWriter,
    open_parquet,
    open_writer,
)
from medscale.graph.sources import (
    RawFile,
    RawLayout,
    entity_types_layout,
    find_all_files,
    triples_layout,
    type_columns_layouts,
)
from medscale.graph.vocab import number_names
from medscale.logs import Advance, log
from medscale.logs import progress as show_progress
from medscale.manifest import write_manifest
from medscale.storage import commit_directory, staging_directory

__all__ = ["Progress", "ingest", "source_of"]

#: `logs.progress`, or a stand-in with its signature
Progress = Callable[[str, int, str], AbstractContextManager[Advance]]

_MAX_THREADS = 4
#: rows per insertion: large ones go straight into the table's file, small ones through a log of changes first,
#: and one transaction for everything would grow with the number of triples
_INSERT_ROWS = 1 << 19


@dataclass
class _Counts:
    """What was met on the way, for the manifest's facts."""

    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    triples: dict[str, int] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    unseen: dict[str, int] = field(default_factory=dict)
    leaks: dict[str, int] = field(default_factory=dict)
    literals_dropped: int = 0


def ingest(
    section: GraphSection,
    *,
    name: str,
    seed: int,
    data_root: Path,
    directory: Path,
    progress: Progress = show_progress,
    source: Mapping[str, Any] | None = None,
) -> Graph:
    """Build the graph directory `directory`, which must not exist, from a job's raw files; return it opened.

    `seed` decides the order of the rows and, with fractions, the splits. `source` is what the manifest
    records as the graph's origin; default: `source_of` the section.

    Raises:
        GraphError: raw files are missing or wrong; names the file and line or row. Nothing is left behind.
        CapacityError: memory (`graph.memory_mib`) or disk space ran out. Nothing is left behind.

    """
    assert section.synthetic is None, "prepare writes the raw files of a generated graph first"
    files = find_all_files(section, data_root)
    types = files.pop("entity_types")
    layout = triples_layout(section)
    typed = [(file, _types_layout(section, file)) for file in types]
    in_triples = type_columns_layouts(section)
    typed += [(file, where) for where in in_triples for split in SPLITS for file in files[split]]
    _check_layouts([*((file, layout) for split in SPLITS for file in files[split]), *typed])
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (
        _errors_of_the_machine(section, directory.parent),
        _database(section, directory) as database,
        staging_directory(directory) as draft,
    ):
        counts = _Counts()
        _load(database, files, layout, section, seed, counts, progress)
        num_entities, num_relations = _write_names(database, draft, only_seen=section.drop_unseen)
        _write_splits(database, draft, section, seed, counts, progress)
        facts: dict[str, Any] = {
            "name": name,
            "num_entities": num_entities,
            "num_relations": num_relations,
            "num_triples": counts.triples,
            "duplicates": counts.duplicates,
            "unseen": counts.unseen,
            "unseen_policy": "dropped" if section.drop_unseen else "kept",
            "leaks": counts.leaks,
            "literals_dropped": counts.literals_dropped,
            "entity_types": _write_types(database, draft, typed) if typed else None,
            "seed": seed,
            "source": dict(source or source_of(section, seed)),
            "raw_files": _listed(files, types),
        }
        write_manifest(draft, GRAPH_KIND, GRAPH_FORMAT, facts)
        commit_directory(draft, directory)
    _report(facts)
    return open_graph(directory, verify=False)


def source_of(section: GraphSection, seed: int) -> dict[str, Any]:
    """Return as JSON values all that decides what a graph holds: the section and, where it matters, the seed.

    Name and memory change nothing. The seed matters to generated graphs and splits only; elsewhere it merely
    orders rows, and jobs that differ in the seed share the graph.
    """
    source = dataclasses.asdict(section)
    for key in ("name", "memory_mib"):
        del source[key]
    seeded = section.synthetic is not None or section.valid_fraction or section.test_fraction
    return _as_json({**source, "seed": seed if seeded else None})  # type: ignore[no-any-return]


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_json(inner) for key, inner in value.items()}
    return [_as_json(inner) for inner in value] if isinstance(value, tuple) else value


def _listed(files: Mapping[str, list[RawFile]], types: list[RawFile]) -> list[dict[str, Any]]:
    roles = {**files, "entity_types": types}
    return [
        {"role": role, "file": file.name, "bytes": file.path.stat().st_size}
        for role, found in roles.items()
        for file in found
    ]


def _report(facts: Mapping[str, Any]) -> None:
    sizes = ", ".join(f"{split} {count:,}" for split, count in facts["num_triples"].items())
    log(f"graph {facts['name']}: {facts['num_entities']:,} entities, {facts['num_relations']:,} relations; {sizes}")
    met = {
        "duplicates": "duplicate triples dropped",
        "unseen": f"triples with a name unseen in train, {facts['unseen_policy']}",
        "leaks": "triples that are also in train, kept",
    }
    for key, words in met.items():
        found = [f"{split} {count:,}" for split, count in facts[key].items() if count]
        if found:
            log(f"  {words}: {', '.join(found)}")
    if facts["literals_dropped"]:
        log(f"  triples with a literal, dropped: {facts['literals_dropped']:,}")


# Before reading


def _types_layout(section: GraphSection, file: RawFile) -> RawLayout:
    """Return the layout of a file of entity types, with a label where the file has a third column."""
    num_columns = 2
    if file.format in ("tsv", "csv"):
        num_columns = len(read_header(file))
    elif file.format == "parquet":
        with contextlib.suppress(pa.ArrowException, OSError), open_parquet(file.path) as parquet:
            num_columns = 2 + ("label" in parquet.schema_arrow.names)
    return entity_types_layout(section, min(max(num_columns, 2), 3))


def _check_layouts(files: list[tuple[RawFile, RawLayout]]) -> None:
    problems = [problem for file, layout in files for problem in layout_problems(file, layout)]
    if problems:
        raise GraphError("; ".join(problems))


# The database


@contextlib.contextmanager
def _database(section: GraphSection, directory: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    # Beside the graph, where there is room for it, and with a name that says that it may be deleted.
    with staging_directory(directory.with_name(directory.name + ".scratch")) as scratch:
        settings = {
            "memory_limit": f"{section.memory_mib}MiB",
            "temp_directory": str(scratch / "spill"),
            "threads": min(os.cpu_count() or 1, _MAX_THREADS),
            "preserve_insertion_order": False,
            "autoinstall_known_extensions": False,
        }
        with duckdb.connect(scratch / "ingest.duckdb", config=settings) as database:
            yield database
        shutil.rmtree(scratch)


@contextlib.contextmanager
def _errors_of_the_machine(section: GraphSection, parent: Path) -> Iterator[None]:
    try:
        yield
    except duckdb.OutOfMemoryException as cause:
        raise CapacityError(
            f"preparing needs more than graph.memory_mib = {section.memory_mib}, or more disk to spill to "
            f"under {parent}; raise it or make room ({_first_line(cause)})"
        ) from cause
    except (duckdb.IOException, duckdb.TransactionException, duckdb.FatalException) as cause:
        raise CapacityError(f"cannot write under {parent}: {_first_line(cause)}; make room there") from cause
    except OSError as cause:
        if cause.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise CapacityError(f"cannot write under {parent}: {cause}; make room there") from cause


def _first_line(cause: Exception) -> str:
    return str(cause).partition("\n")[0]


def _number(result: duckdb.DuckDBPyConnection) -> int:
    row = result.fetchone()
    assert row is not None
    return int(row[0])


def _hash(seed: int, purpose: str, columns: str) -> str:
    """Return SQL for 64 bits that depend on seed, purpose and the values of columns (separated by tabs)."""
    return f"md5_number_lower(concat_ws(chr(9), '{purpose}', {seed}, {columns}))"


# Raw rows in


def _load(
    database: duckdb.DuckDBPyConnection,
    files: Mapping[str, list[RawFile]],
    layout: RawLayout,
    section: GraphSection,
    seed: int,
    counts: _Counts,
    progress: Progress,
) -> None:
    database.execute("CREATE TABLE raw (split UTINYINT, head VARCHAR, relation VARCHAR, tail VARCHAR)")
    total = sum(file.path.stat().st_size for found in files.values() for file in found)
    with progress("reading", total, "bytes") as advance:
        for split, found in files.items():
            which = _split_choice(section, seed) if split == "train" else str(SPLITS.index(split))
            for file in found:
                counts.literals_dropped += _load_file(database, file, layout, section.literals, which, advance)
    for index, split in enumerate(SPLITS):
        counts.rows[split] = _number(database.execute("SELECT count(*) FROM raw WHERE split = ?", [index]))
    if not counts.rows["train"]:
        names = ", ".join(file.name for file in files["train"])
        raise GraphError(f"no training triples in {names}: check graph.train and the fractions")


def _split_choice(section: GraphSection, seed: int) -> str:
    """Return SQL that tells a row's split from its names: duplicates and later additions move no triple."""
    if not section.valid_fraction and not section.test_fraction:
        return "0"
    test = round(section.test_fraction * 2**64)
    valid = test + round(section.valid_fraction * 2**64)
    position = _hash(seed, "split", "head, relation, tail")
    return f"CASE WHEN {position} < {test} THEN 2 WHEN {position} < {valid} THEN 1 ELSE 0 END"


def _load_file(
    database: duckdb.DuckDBPyConnection,
    file: RawFile,
    layout: RawLayout,
    literals: str,
    split: str,
    advance: Advance,
) -> int:
    dropped = position = 0
    what = f"raw SELECT {split}, head, relation, tail"
    waiting: list[pa.Table] = []
    for rows in read_rows(file, layout, literals=literals):
        waiting.append(pa.table(rows.names))
        if sum(map(len, waiting)) >= _INSERT_ROWS:
            _insert(database, waiting, what)
        dropped += rows.literals_dropped
        advance(rows.position - position)
        position = rows.position
    _insert(database, waiting, what)
    advance(file.path.stat().st_size - position)
    return dropped


def _insert(database: duckdb.DuckDBPyConnection, waiting: list[pa.Table], what: str) -> None:
    """Insert all that waits, and empty the list."""
    if waiting:
        database.register("waiting", pa.concat_tables(waiting))
        database.execute(f"INSERT INTO {what} FROM waiting")
        database.unregister("waiting")
        waiting.clear()


# Names and triples out


def _write_names(database: duckdb.DuckDBPyConnection, draft: Path, *, only_seen: bool) -> tuple[int, int]:
    with PartWriter(draft / ENTITIES, NAMES_SCHEMA) as entities:
        num_entities = number_names(
            database, "entities", only_seen=only_seen,
            write=lambda ids, names: entities.append({"id": ids, "name": names}),
        )  # fmt: skip
    with open_writer(draft / RELATIONS, NAMES_SCHEMA) as relations:
        num_relations = number_names(
            database, "relations", only_seen=only_seen,
            write=lambda ids, names: relations.write_table(pa.table([ids, names], schema=NAMES_SCHEMA)),
        )  # fmt: skip
    return num_entities, num_relations


def _write_splits(
    database: duckdb.DuckDBPyConnection,
    draft: Path,
    section: GraphSection,
    seed: int,
    counts: _Counts,
    progress: Progress,
) -> None:
    with progress("shuffling and writing", sum(counts.rows.values()), "triples") as advance:
        for split in SPLITS:
            drop = section.drop_unseen and split != "train"
            _write_split(database, draft, split, seed, counts, drop_unseen=drop, advance=advance)
    for split in ("valid", "test"):
        counts.leaks[split] = _count_leaks(database, draft, split) if counts.triples[split] else 0


def _write_split(
    database: duckdb.DuckDBPyConnection,
    draft: Path,
    split: str,
    seed: int,
    counts: _Counts,
    *,
    drop_unseen: bool,
    advance: Advance,
) -> None:
    unseen = distinct = 0
    with PartWriter(draft / split, TRIPLES_SCHEMA) as writer:
        for triples, seen, num_rows in _distinct(_shuffled(database, split, seed)):
            distinct += len(triples)
            unseen += len(seen) - int(np.count_nonzero(seen))
            kept = triples[seen] if drop_unseen else triples
            writer.append({column: kept[:, i] for i, column in enumerate(TRIPLE_COLUMNS)})
            advance(num_rows)
        counts.triples[split] = writer.num_rows
    counts.duplicates[split] = counts.rows[split] - distinct
    if split != "train":
        counts.unseen[split] = unseen


def _shuffled(database: duckdb.DuckDBPyConnection, split: str, seed: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a split as (head, relation, tail, seen), ordered by a seeded hash, ties by ids."""
    query = f"""
        SELECT h.id AS head, r.id AS relation, t.id AS tail, h.seen AND r.seen AND t.seen AS seen
        FROM raw JOIN entities h ON raw.head = h.name JOIN relations r ON raw.relation = r.name
        JOIN entities t ON raw.tail = t.name
        WHERE raw.split = {SPLITS.index(split)}
        ORDER BY {_hash(seed, "order", "h.id, r.id, t.id")}, h.id, r.id, t.id
    """
    yield from database.execute(query).to_arrow_reader(ROW_GROUP_ROWS)


def _distinct(
    batches: Iterator[pa.RecordBatch],
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], int]]:
    """Drop rows that repeat the one before, as equal triples do: (int64[n, 3], seen bool[n], rows taken)."""
    last = np.full((1, 3), -1, dtype=np.int64)
    for batch in batches:
        triples = np.stack([np.asarray(batch.column(i)) for i in range(3)], axis=1)
        seen = np.asarray(batch.column(3).cast(pa.uint8())).astype(bool)
        before = np.concatenate([last, triples[:-1]])
        fresh = (triples != before).any(axis=1)
        last = triples[-1:]
        yield triples[fresh], seen[fresh], len(triples)


def _count_leaks(database: duckdb.DuckDBPyConnection, draft: Path, split: str) -> int:
    query = "SELECT count(*) FROM read_parquet(?) SEMI JOIN read_parquet(?) USING (head, relation, tail)"
    globs = [str(draft / name / "*.parquet") for name in (split, "train")]
    return _number(database.execute(query, globs))


# Entity types


def _write_types(
    database: duckdb.DuckDBPyConnection, draft: Path, typed: list[tuple[RawFile, RawLayout]]
) -> dict[str, int]:
    """Write the types of the graph's entities, ordered by entity; count the rows of entities it lacks."""
    database.execute("CREATE TABLE raw_types (entity VARCHAR, type VARCHAR, label VARCHAR)")
    num_rows = 0
    for file, layout in typed:
        roles = ", ".join(layout.roles)
        for rows in read_rows(file, layout):
            # Type columns of triples repeat an entity's type with every triple of it.
            distinct = pa.table(rows.names).group_by(list(layout.roles)).aggregate([])
            num_rows += len(distinct)
            _insert(database, [distinct], f"raw_types ({roles}) SELECT {roles}")
    known = "raw_types JOIN entities ON raw_types.entity = entities.name"
    num_unknown = num_rows - _number(database.execute(f"SELECT count(*) FROM {known}"))
    query = f"SELECT DISTINCT id, type, label FROM {known} ORDER BY id, type, label"
    with PartWriter(draft / ENTITY_TYPES, TYPES_SCHEMA) as writer:
        for batch in database.execute(query).to_arrow_reader(ROW_GROUP_ROWS):
            writer.append(dict(zip(TYPES_SCHEMA.names, batch.columns, strict=True)))
        return {"rows": writer.num_rows, "rows_of_unknown_entities": num_unknown}
