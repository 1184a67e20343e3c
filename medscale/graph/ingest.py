"""From raw files to a graph directory, out of core, by tasks that each hold a small part of it.

    read        some files            chunks: rows of codes, and the names that these stand for
    sort        a chunk's names       in order, with samples
    number      a range of names      places, and from their counts ids
    translate   a chunk               its rows with ids, in the order of a seeded hash
    shuffle     a range of hashes     the triples of each split, in order, without duplicates
    write       a file of the graph

Each stage reads what the one before left on disk beside the graph. Chunks and ranges are as large as
`graph.memory_mib` allows, so memory is bounded whatever there is of triples and of names; and neither they nor the
tasks (in this process, or on a Ray cluster) change a byte of the graph: ids are the order of the names, rows lie in
the order of their hashes. A directory appears whole, or not at all.
"""

import contextlib
import dataclasses
import errno
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from medscale.cluster import Tasks, tasks_of
from medscale.config import GraphSection
from medscale.errors import CapacityError, GraphError
from medscale.graph.chunks import KINDS, ROW_BYTES, Chunk, Kind, Reading, portions_of, read_portion
from medscale.graph.entity_types import Matching, TypesFile, match_types, read_types
from medscale.graph.parts import Part, parts_of, write_part, write_relations
from medscale.graph.raw import layout_problems
from medscale.graph.reader import Graph, open_graph
from medscale.graph.scan import read_header
from medscale.graph.schema import (
    ENTITIES,
    ENTITY_TYPES,
    GRAPH_FORMAT,
    GRAPH_KIND,
    NAMES_SCHEMA,
    RELATIONS,
    SPLITS,
    TRIPLES_SCHEMA,
    TYPES_SCHEMA,
    open_parquet,
)
from medscale.graph.shuffle import Shuffled, Translation, hash_ranges, shuffle, translate
from medscale.graph.sources import (
    RawFile,
    RawLayout,
    entity_types_layout,
    find_all_files,
    triples_layout,
    type_columns_layouts,
)
from medscale.graph.vocab import (
    NumberedRange,
    Piece,
    Range,
    Sorting,
    number_range,
    pieces_of,
    ranges_of,
    sort_names,
)
from medscale.logs import Advance, log
from medscale.logs import progress as show_progress
from medscale.manifest import write_manifest
from medscale.storage import commit_directory, staging_directory

__all__ = ["Progress", "errors_of_the_machine", "ingest", "source_of"]

#: `logs.progress`, or a stand-in with its signature
Progress = Callable[[str, int, str], AbstractContextManager[Advance]]

#: a chunk or a range takes this share of the memory of a task, which holds several times its size while it works on it
_SHARE = 10
#: and no more than Arrow's strings can address with room to spare
_MOST_BYTES = 1 << 30
#: samples of names per range, for each chunk: how even the ranges are
_SAMPLES = 256


@dataclass
class _Counts:
    """What was met on the way, for the manifest's facts."""

    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    triples: dict[str, int] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    unseen: dict[str, int] = field(default_factory=dict)
    leaks: dict[str, int] = field(default_factory=dict)
    literals_dropped: int = 0

    def add(self, split: str, found: Sequence[Shuffled]) -> None:
        """Count what all ranges held of a split."""
        self.triples[split] = sum(met.num_written for met in found)
        self.duplicates[split] = sum(met.num_rows - met.num_distinct for met in found)
        if split != "train":
            self.unseen[split] = sum(met.num_unseen for met in found)
            self.leaks[split] = sum(met.num_leaks for met in found)


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
        CapacityError: memory or disk space ran out. Nothing is left behind.
        WorkerError: a task on the Ray cluster died each time it was run. Nothing is left behind.

    """
    assert section.synthetic is None, "prepare writes the raw files of a generated graph first"
    # As other processes, with other working directories, name them.
    data_root, directory = data_root.absolute(), directory.absolute()
    files = find_all_files(section, data_root)
    types = files.pop("entity_types")
    layout = triples_layout(section)
    typed = [(file, _types_layout(section, file)) for file in types]
    in_triples = type_columns_layouts(section)
    typed += [(file, where) for where in in_triples for split in SPLITS for file in files[split]]
    _check_layouts([*((file, layout) for split in SPLITS for file in files[split]), *typed])
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (
        errors_of_the_machine(section, directory.parent),
        # Beside the graph, where all nodes see it, and with a name that says that it may be deleted.
        staging_directory(directory.with_name(directory.name + ".scratch")) as scratch,
        staging_directory(directory) as draft,
        tasks_of(section.tasks, scratch) as tasks,
    ):
        stages = _Stages(section, seed, scratch, draft, tasks, progress)
        counts = _Counts()
        chunks = stages.read(files, layout, counts)
        names = stages.number(chunks)
        stages.write_names(names)
        type_counts = stages.write_types(typed, names["entities"]) if typed else None
        stages.write_triples(chunks, names, counts)
        facts: dict[str, Any] = {
            "name": name,
            "num_entities": names["entities"].num_names,
            "num_relations": names["relations"].num_names,
            "num_triples": counts.triples,
            "duplicates": counts.duplicates,
            "unseen": counts.unseen,
            "unseen_policy": "dropped" if section.drop_unseen else "kept",
            "leaks": counts.leaks,
            "literals_dropped": counts.literals_dropped,
            "entity_types": type_counts,
            "seed": seed,
            "source": dict(source or source_of(section, seed)),
            "raw_files": _listed(files, types),
        }
        write_manifest(draft, GRAPH_KIND, GRAPH_FORMAT, facts)
        commit_directory(draft, directory)
        shutil.rmtree(scratch)
    _report(facts)
    return open_graph(directory, verify=False)


def source_of(section: GraphSection, seed: int) -> dict[str, Any]:
    """Return as JSON values all that decides what a graph holds: the section and, where it matters, the seed.

    Name, memory and tasks change nothing. The seed matters to generated graphs and splits only; elsewhere it merely
    orders rows, and jobs that differ in the seed share the graph.
    """
    source = dataclasses.asdict(section)
    for key in ("name", "memory_mib", "tasks"):
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


# Errors


@contextlib.contextmanager
def errors_of_the_machine(section: GraphSection, parent: Path) -> Iterator[None]:
    """Run a block that writes under `parent`; say what is missing where memory, the disk or a file gives out.

    Raises:
        CapacityError, GraphError: in its stead.

    """
    try:
        yield
    except (MemoryError, duckdb.OutOfMemoryException) as cause:
        raise CapacityError(
            f"preparing ran out of memory ({_first_line(cause)}); it aims at graph.memory_mib = {section.memory_mib} "
            "beside what libraries take: lower it, or make room"
        ) from cause
    except FileNotFoundError as cause:
        if section.tasks == 1:
            raise
        raise GraphError(
            f"a task does not see a file ({cause}); all nodes of the cluster must see the raw files and {parent}, or "
            "graph.tasks must be 1"
        ) from cause
    except OSError as cause:
        if cause.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise CapacityError(f"cannot write under {parent}: {cause}; make room there") from cause


def _first_line(cause: Exception) -> str:
    return str(cause).partition("\n")[0]


# Stages


@dataclass(frozen=True)
class _Names:
    """The names of a kind, in order and numbered, on disk."""

    ranges: list[Range]
    numbered: list[NumberedRange]
    #: by chunk
    sorted: list[Path]
    pieces: list[tuple[Piece, ...]]

    @property
    def num_names(self) -> int:
        return sum(counts.num_names for counts in self.numbered)

    @property
    def runs(self) -> list[tuple[Path, int]]:
        return [(one.names, counts.num_names) for one, counts in zip(self.ranges, self.numbered, strict=True)]


@dataclass(frozen=True)
class _Stages:
    """What is done, one stage after the other; each stage's tables have a directory of their own."""

    section: GraphSection
    seed: int
    scratch: Path
    draft: Path
    tasks: Tasks
    progress: Progress

    @property
    def num_bytes(self) -> int:
        """Size of a chunk or a range."""
        return min(self.section.memory_mib * 2**20 // self.tasks.number // _SHARE, _MOST_BYTES)

    def directory(self, name: str) -> Path:
        path = self.scratch / name
        path.mkdir(exist_ok=True)
        return path

    def read(self, files: Mapping[str, list[RawFile]], layout: RawLayout, counts: _Counts) -> list[Chunk]:
        section = self.section
        reading = Reading(
            self.directory("chunks"), layout, section.literals, self.seed, section.valid_fraction,
            section.test_fraction, self.num_bytes,
        )  # fmt: skip
        total = sum(file.path.stat().st_size for found in files.values() for file in found)
        with self.progress("reading", total, "bytes") as advance:
            results = self.tasks.run(read_portion, portions_of(reading, files, self.tasks.number), advance)
        chunks = [chunk for found, _ in results for chunk in found]
        counts.literals_dropped = sum(dropped for _, dropped in results)
        for index, split in enumerate(SPLITS):
            counts.rows[split] = sum(chunk.num_rows[index] for chunk in chunks)
        if not counts.rows["train"]:
            names = ", ".join(file.name for file in files["train"])
            raise GraphError(f"no training triples in {names}: check graph.train and the fractions")
        return chunks

    def number(self, chunks: list[Chunk]) -> dict[Kind, _Names]:
        """Return all names, sorted and numbered."""
        total = sum(chunk.num_names[kind] for chunk in chunks for kind in KINDS)
        with self.progress("numbering", total, "names of chunks") as advance:
            return {kind: self._number(kind, chunks, advance) for kind in KINDS}

    def _number(self, kind: Kind, chunks: list[Chunk], advance: Advance) -> _Names:
        numerical, step = all(chunk.integers[kind] for chunk in chunks), max(self.num_bytes // _SAMPLES, 1)
        source, target = self.directory("chunks"), self.directory("sorted")
        paths = [target / f"{chunk.name}.{kind}" for chunk in chunks]
        items = [Sorting(source / path.name, path, numerical, step) for path in paths]
        samples = self.tasks.run(sort_names, items, _silent)
        ranges = ranges_of(
            kind, samples, _SAMPLES, paths, self.directory("places"), numerical=numerical,
            only_seen=self.section.drop_unseen,
        )  # fmt: skip
        numbered = self.tasks.run(number_range, ranges, advance)
        return _Names(ranges, numbered, paths, pieces_of(ranges, numbered))

    def write_names(self, names: Mapping[Kind, _Names]) -> None:
        self.tasks.run(write_part, parts_of(self.draft / ENTITIES, NAMES_SCHEMA, names["entities"].runs), _silent)
        write_relations(self.draft / RELATIONS, names["relations"].runs)

    def write_types(self, typed: Sequence[tuple[RawFile, RawLayout]], entities: _Names) -> dict[str, int]:
        """Write the types of the graph's entities, ordered by entity; count the rows of entities it lacks."""
        directory, numerical = self.directory("types"), entities.ranges[0].numerical
        items = [
            TypesFile(file, layout, directory, number, numerical, self.num_bytes)
            for number, (file, layout) in enumerate(typed)
        ]
        found = self.tasks.run(read_types, items, _silent)
        sources = tuple(path for paths, _ in found for path in paths)
        firsts = itertools.accumulate((counts.num_names for counts in entities.numbered), initial=0)
        matchings = [
            Matching(one, first, sources, directory / f"{number:06d}")
            for number, (one, first) in enumerate(zip(entities.ranges, firsts, strict=False))
        ]
        matched = self.tasks.run(match_types, matchings, _silent)
        runs = [(one.target, rows) for one, (rows, _) in zip(matchings, matched, strict=True)]
        self.tasks.run(write_part, parts_of(self.draft / ENTITY_TYPES, TYPES_SCHEMA, runs), _silent)
        shutil.rmtree(directory)
        unknown = sum(rows for _, rows in found) - sum(rows for _, rows in matched)
        return {"rows": sum(rows for _, rows in runs), "rows_of_unknown_entities": unknown}

    def write_triples(self, chunks: list[Chunk], names: Mapping[Kind, _Names], counts: _Counts) -> None:
        total = sum(counts.rows.values())
        translations = [
            Translation(
                self.directory("chunks") / f"{chunk.name}.rows",
                {kind: (names[kind].sorted[index], names[kind].pieces[index]) for kind in KINDS},
                self.directory("translated") / chunk.name,
                self.seed,
            )
            for index, chunk in enumerate(chunks)
        ]  # fmt: skip
        with self.progress("translating", total, "triples") as advance:
            self.tasks.run(translate, translations, advance)
        for done in ("chunks", "sorted", "places"):
            shutil.rmtree(self.directory(done))
        ranges = hash_ranges(
            -(-total * ROW_BYTES // self.num_bytes), [one.target for one in translations],
            self.directory("shuffled"), drop_unseen=self.section.drop_unseen,
        )  # fmt: skip
        with self.progress("shuffling", total, "triples") as advance:
            shuffled = self.tasks.run(shuffle, ranges, advance)
        shutil.rmtree(self.directory("translated"))
        parts: list[Part] = []
        for index, split in enumerate(SPLITS):
            found = [by_split[index] for by_split in shuffled]
            counts.add(split, found)
            runs = [(one.targets[index], met.num_written) for one, met in zip(ranges, found, strict=True)]
            parts += parts_of(self.draft / split, TRIPLES_SCHEMA, runs)
        with self.progress("writing", sum(counts.triples.values()), "triples") as advance:
            self.tasks.run(write_part, parts, advance)


def _silent(count: int) -> None:
    """Advance nothing: short beside the stages that are shown."""
