"""A graph that grows: the ids of another one stay, new names get ids after them, new triples join its own.

The graph that grows is read a row group at a time, so memory holds the new triples, their names, and little else. Its
training triples lie in the order of a hash of their ids, and stay in it: new ones are put between them.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from medscale.config import GraphSection
from medscale.errors import GraphError
from medscale.graph.chunks import INTEGER
from medscale.graph.hashing import hashes
from medscale.graph.ingest import Progress, errors_of_the_machine
from medscale.graph.known_triples import KnownTriples
from medscale.graph.raw import layout_problems, read_rows
from medscale.graph.reader import Graph, open_graph
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
    PartWriter,
    open_writer,
)
from medscale.graph.sources import RawFile, find_files, triples_layout
from medscale.graph.vocab import order_of
from medscale.logs import Advance, log
from medscale.logs import progress as show_progress
from medscale.manifest import write_manifest
from medscale.storage import commit_directory, sha256_of, staging_directory

__all__ = ["described_files", "extend_graph", "files_of_new_triples", "others_wanted"]

#: old triples that new vectors are trained beside, at least: few hold too few of the answers that are not theirs
FEWEST_OTHERS = 10_000

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def extend_graph(
    parent: Graph,
    section: GraphSection,
    triples: Sequence[str],
    *,
    name: str,
    data_root: Path,
    directory: Path,
    only_new_names: bool,
    num_others: int,
    source: Mapping[str, Any],
    progress: Progress = show_progress,
) -> Graph:
    """Build the graph directory `directory`, which must not exist: `parent` and the `triples` of raw files.

    The files are read as the section says of its training files. New names are numbered in their order (numerical
    where all of them are integers), after the old ones, so the graph does not depend on the order of the rows. Old
    and new triples that are equal count once. Valid and test stay. The split "growth" holds the training triples that
    mention a new name and, for each, `num_others` that do not (`FEWEST_OTHERS` at least, if any). The manifest's
    `lineage` says what it grew out of: {"graph", "graph_sha256", "num_entities", "num_relations" of the parent,
    "files": [{"file", "bytes", "sha256"}], "lineage" of the parent, or null}.

    Raises:
        GraphError: a file is missing, wrong or empty; nothing in them is new, or no name is and `only_new_names`.
        CapacityError: memory or disk space ran out. Nothing is left behind in any of these cases.

    """
    files = files_of_new_triples(section, triples, data_root)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with errors_of_the_machine(section, directory.parent), staging_directory(directory) as draft:
        news = _News.of(parent, section, files, progress)
        _require_news(news, files, only_new_names)
        _write_names(draft, parent, news)
        with progress("merging", sum(parent.num_triples[split] for split in SPLITS), "triples") as advance:
            num_growth = _write_train(draft, parent, news, num_others, advance)
            met = _write_others(draft, parent, news, advance)
        facts: dict[str, Any] = {
            **parent.facts,
            "name": name,
            "num_entities": news.num_entities,
            "num_relations": news.num_relations,
            "num_triples": {
                **{split: parent.num_triples[split] for split in SPLITS},
                "train": parent.num_triples["train"] + len(news.triples),
                GROWTH: num_growth,
            },
            "duplicates": {split: news.num_duplicates if split == "train" else 0 for split in SPLITS},
            **met,
            "literals_dropped": news.num_literals,
            "source": dict(source),
            "raw_files": [{"role": "train", "file": file.name, "bytes": file.path.stat().st_size} for file in files],
            "lineage": {
                "graph": parent.name,
                "graph_sha256": parent.sha256,
                "num_entities": parent.num_entities,
                "num_relations": parent.num_relations,
                "files": described_files(files),
                "lineage": parent.lineage,
            },
        }
        write_manifest(draft, GRAPH_KIND, GRAPH_FORMAT, facts)
        commit_directory(draft, directory)
    _report(facts, parent, news)
    return open_graph(directory, verify=False)


def files_of_new_triples(section: GraphSection, triples: Sequence[str], data_root: Path) -> list[RawFile]:
    """Return the files that `extend.triples` names.

    Raises:
        GraphError: one is missing, lacks columns, or leads out of the data root.

    """
    files, layout = find_files(triples, section, data_root, "extend.triples"), triples_layout(section)
    problems = [problem for file in files for problem in layout_problems(file, layout)]
    if problems:
        raise GraphError("; ".join(problems))
    return files


def described_files(files: Sequence[RawFile]) -> list[dict[str, Any]]:
    """Return files' names, bytes and SHA-256, as a lineage keeps them."""
    return [
        {"file": file.name, "bytes": file.path.stat().st_size, "sha256": sha256_of(file.path)}
        for file in sorted(files, key=lambda file: file.name)
    ]


# New names and triples


@dataclass(frozen=True)
class _News:
    """What raw files hold that a graph lacks."""

    num_rows: int
    #: int64[n, 3], distinct, none of them in the graph's train; in the order of their hashes
    triples: Ints
    #: uint64[n], ascending
    hashes: npt.NDArray[np.uint64]
    #: in the order of their ids
    entities: pa.Array
    relations: pa.Array
    num_literals: int
    #: bool[num_entities], bool[num_relations]: whether the grown train mentions them
    seen_entities: Flags
    seen_relations: Flags
    #: bool[n]: triples that mention a new entity or relation
    mentions_new: Flags

    @property
    def num_duplicates(self) -> int:
        return self.num_rows - len(self.triples)

    @property
    def num_entities(self) -> int:
        return len(self.seen_entities)

    @property
    def num_relations(self) -> int:
        return len(self.seen_relations)

    @classmethod
    def of(cls, parent: Graph, section: GraphSection, files: Sequence[RawFile], progress: Progress) -> Self:
        rows, num_literals = _read(section, files, progress)
        head, relation, tail = (rows[role] for role in TRIPLE_COLUMNS)
        entities, (heads, tails) = _numbered(parent, ENTITIES, parent.num_entities, head, tail)
        relations, (labels,) = _numbered(parent, RELATIONS, parent.num_relations, relation)
        num_entities, num_relations = parent.num_entities + len(entities), parent.num_relations + len(relations)
        triples = np.unique(np.stack([heads, labels, tails], axis=1), axis=0)
        seen_entities, seen_relations = np.zeros(num_entities, dtype=bool), np.zeros(num_relations, dtype=bool)
        there, old = KnownTriples([triples], num_entities=num_entities, num_relations=num_relations), []
        for part in _rows(parent, "train"):
            old.append(part[there.contains(*part.T)])
            _mark(part, seen_entities, seen_relations)
        known = KnownTriples(old, num_entities=num_entities, num_relations=num_relations)
        triples = triples[~known.contains(*triples.T)]
        _mark(triples, seen_entities, seen_relations)
        hashed = _hashes(parent, triples)
        order = np.argsort(hashed, kind="stable")  # equal hashes stay in the order of the ids
        triples = triples[order]
        return cls(
            num_rows=len(heads), triples=triples, hashes=hashed[order], entities=entities, relations=relations,
            num_literals=num_literals, seen_entities=seen_entities, seen_relations=seen_relations,
            mentions_new=np.any(triples >= [parent.num_entities, parent.num_relations, parent.num_entities], axis=1),
        )  # fmt: skip


def _read(
    section: GraphSection, files: Sequence[RawFile], progress: Progress
) -> tuple[dict[str, pa.ChunkedArray], int]:
    """Return all rows of raw files by column, and how many triples with a literal were passed over."""
    layout, found, num_literals = triples_layout(section), list[dict[str, pa.Array]](), 0
    with progress("reading", sum(file.path.stat().st_size for file in files), "bytes") as advance:
        for file in files:
            position = 0
            for rows in read_rows(file, layout, literals=section.literals):
                found.append(rows.names)
                num_literals += rows.literals_dropped
                advance(rows.position - position)
                position = rows.position
    return {
        role: pa.chunked_array([names[role].cast(pa.string()) for names in found], pa.string())
        for role in TRIPLE_COLUMNS
    }, num_literals


def _numbered(
    parent: Graph, prefix: str, num_old: int, *columns: pa.ChunkedArray
) -> tuple[pa.Array, list[Ints]]:  # fmt: skip
    """Return the names that the graph lacks, in the order of their ids, and each column's ids, int64[n]."""
    together = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())
    names = together.unique()
    ids = np.full(len(names), -1, dtype=np.int64)
    for table in parent.tables(prefix):
        places = pc.index_in(table.column("name"), value_set=names)
        there = np.asarray(pc.is_valid(places))
        ids[np.asarray(places.drop_null())] = table.column("id").to_numpy()[there]
    new = np.flatnonzero(ids < 0)
    new_names = names.take(pa.array(new))
    numerical = bool(len(new_names)) and bool(pc.all(pc.match_substring_regex(new_names, INTEGER)).as_py())
    order = order_of(new_names, numerical=numerical)
    ids[new[order]] = num_old + np.arange(len(new))
    codes = [np.asarray(pc.index_in(column, value_set=names)) for column in columns]
    return new_names.take(pa.array(order)), [ids[code] for code in codes]


def _hashes(parent: Graph, triples: Ints, purpose: str = "order") -> npt.NDArray[np.uint64]:
    """Return what decides the order of triples, uint64[n]; that of train is an ingest's."""
    return hashes(parent.facts["seed"], purpose, dict(zip(TRIPLE_COLUMNS, triples.T, strict=True)))


def _rows(graph: Graph, split: str) -> Iterator[Ints]:
    for path in graph.parts(split):
        yield from graph.read_part(path)


def _mark(triples: Ints, entities: Flags, relations: Flags) -> None:
    entities[triples[:, [0, 2]]] = True
    relations[triples[:, 1]] = True


def _require_news(news: _News, files: Sequence[RawFile], only_new_names: bool) -> None:
    names = ", ".join(file.name for file in files)
    if not news.num_rows:
        raise GraphError(f"extend.triples: no triples in {names}")
    if not len(news.triples):
        raise GraphError(f"extend.triples: all {news.num_rows:,} triples of {names} are in the graph already")
    if only_new_names and not news.mentions_new.any():
        raise GraphError(
            f"extend.triples: the triples of {names} mention no entity or relation that the graph lacks, and with "
            "extend.rows: frozen only the vectors of new ones are trained; use extend.rows: trained"
        )


# Writing


def _write_names(draft: Path, parent: Graph, news: _News) -> None:
    with PartWriter(draft / ENTITIES, NAMES_SCHEMA) as writer:
        for table in itertools.chain(parent.tables(ENTITIES), [_named(news.entities, parent.num_entities)]):
            writer.append({name: table.column(name) for name in NAMES_SCHEMA.names})
    relations = [*parent.tables(RELATIONS), _named(news.relations, parent.num_relations)]
    with open_writer(draft / RELATIONS, NAMES_SCHEMA) as file:
        file.write_table(pa.concat_tables(relations).combine_chunks())
    with PartWriter(draft / ENTITY_TYPES, TYPES_SCHEMA) as writer:
        for table in parent.tables(ENTITY_TYPES):
            writer.append({name: table.column(name) for name in TYPES_SCHEMA.names})


def others_wanted(num_new: int, num_others: int) -> int:
    """Return how many training triples without a new name go with so many that have one: `num_others` for each."""
    return max(num_others * num_new, FEWEST_OTHERS) if num_others else 0


def _write_train(draft: Path, parent: Graph, news: _News, num_others: int, advance: Advance) -> int:
    """Write the old triples with the new ones between them, and those that new names learn from; count the latter."""
    new_names, old_names = news.triples[news.mentions_new], news.triples[~news.mentions_new]
    # The first ones in the order of a hash are drawn as evenly as any.
    others, wanted, done = list[Ints](), others_wanted(len(new_names), num_others), 0
    with PartWriter(draft / "train", TRIPLES_SCHEMA) as writer:
        for rows in _rows(parent, "train"):
            old = _hashes(parent, rows)
            until = max(done, int(np.searchsorted(news.hashes, old.max(), side="right")))
            both = np.concatenate([rows, news.triples[done:until]])
            order = np.argsort(np.concatenate([old, news.hashes[done:until]]), kind="stable")
            writer.append(_columns(both[order]))
            others.append(rows[:wanted])
            wanted -= len(others[-1])
            done = until
            advance(len(rows))
        writer.append(_columns(news.triples[done:]))
    growth = np.concatenate([new_names, *others, old_names[:wanted]])
    growth = growth[np.argsort(_hashes(parent, growth, "growth"), kind="stable")]
    with PartWriter(draft / GROWTH, TRIPLES_SCHEMA) as writer:
        writer.append(_columns(growth))
    return len(growth)


def _write_others(draft: Path, parent: Graph, news: _News, advance: Advance) -> dict[str, dict[str, int]]:
    """Copy valid and test; return how many of their triples have a name unseen in train, and are in train."""
    added = KnownTriples([news.triples], num_entities=news.num_entities, num_relations=news.num_relations)
    unseen, leaks = dict[str, int](), dict[str, int](parent.facts["leaks"])
    for split in SPLITS[1:]:
        unseen[split] = 0
        with PartWriter(draft / split, TRIPLES_SCHEMA) as writer:
            for rows in _rows(parent, split):
                head, relation, tail = rows.T
                seen = news.seen_entities[head] & news.seen_relations[relation] & news.seen_entities[tail]
                unseen[split] += int(np.count_nonzero(~seen))
                leaks[split] += int(np.count_nonzero(added.contains(head, relation, tail)))
                writer.append(_columns(rows))
                advance(len(rows))
    return {"unseen": unseen, "leaks": leaks}


def _named(names: pa.Array, first: int) -> pa.Table:
    return pa.table([pa.array(np.arange(first, first + len(names))), names], schema=NAMES_SCHEMA)


def _columns(triples: Ints) -> dict[str, Ints]:
    return {name: triples[:, i] for i, name in enumerate(TRIPLE_COLUMNS)}


def _report(facts: Mapping[str, Any], parent: Graph, news: _News) -> None:
    log(
        f"graph {facts['name']}: {news.num_entities:,} entities, {len(news.entities):,} of them new; "
        f"{news.num_relations:,} relations, {len(news.relations):,} new; train {facts['num_triples']['train']:,}, "
        f"{len(news.triples):,} new, {np.count_nonzero(news.mentions_new):,} of these with a new name"
    )
    if news.num_duplicates:
        log(f"  new triples that were there already, or twice, dropped: {news.num_duplicates:,}")
    leaks = {split: facts["leaks"][split] - parent.facts["leaks"][split] for split in SPLITS[1:]}
    if any(leaks.values()):
        found = ", ".join(f"{split} {count:,}" for split, count in leaks.items() if count)
        log(f"  triples that are now also in train, kept: {found}")
    if news.num_literals:
        log(f"  triples with a literal, dropped: {news.num_literals:,}")
