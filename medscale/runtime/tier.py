"""A tier as it is shipped: open, verify, upgrade, look up, score. `FORMAT.md` describes the files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medscale.errors import DamagedTierError, ExportError, MedscaleError, TierChainError, UnknownNameError
from medscale.runtime.facts import TierFacts
from medscale.runtime.files import TIER_KIND, TierFiles, shard_name
from medscale.runtime.names import NameTable
from medscale.runtime.query import Query
from medscale.runtime.rows import Rows, Section
from medscale.runtime.scan import all_scores, best, best_of, longest, usable_cores
from medscale.runtime.scoring import Array, Side, compare
from medscale.runtime.verification import Verify, verify
from medscale.storage import safe_join

__all__ = ["TIER_FORMAT", "TIER_KIND", "Answers", "Names", "Tier", "shard_name"]

#: the version that exports are written in
TIER_FORMAT = 2

#: one or many entities or relations: a str is a name, an int is an id
Names = str | int | Sequence[str] | Sequence[int] | NDArray[Any]
#: names, best first, and their scores, float32
Answers = tuple[list[str], NDArray[np.float32]]

#: triples whose rows are held at a time
SCORED_NUMBERS = 1 << 20
#: a reader that meets a version just being replaced turns to the next one
OPEN_ATTEMPTS = 20


class Tier:
    """One exported tier, its tables mapped into memory and read only where they are used.

    Instances are read-only and may be shared by threads. The files must stay as they are while mapped;
    an export never changes a published file, and a replaced version stays readable to whoever has it open.
    """

    def __init__(
        self, facts: TierFacts, rows: Rows, relations: Array, relation_names: NameTable, threads: int, partial: bool
    ) -> None:
        self._facts = facts
        #: the rows of entities
        self.rows = rows
        self._relations = relations
        self._relation_names = relation_names
        #: at most so many scan at a time
        self.threads = threads
        self._partial = partial
        # "modulus" weighs units, the others columns.
        self._weights = np.repeat(facts.weights, 1 if facts.scorer.geometry == "modulus" else facts.unit_columns)

    @classmethod
    def open(
        cls, path: Path | str, verify: Verify = "once", *, partial: bool = False, threads: int | None = None
    ) -> "Tier":
        """Open the tier in directory `path`, such as `runs/NAME/export/phone`.

        `verify` says when every file is read to compare its SHA-256 with the manifest's: "always", "never", or "once",
        which remembers it beside the files (`.verified`, where it may write) and reads a changed file again. Manifest,
        headers and sizes are checked in any case. With `partial`, shards may be missing; who asks for an entity in one
        is told which file to fetch. Scans use `threads` threads (default: one for each core). A delta's base is opened
        too, in the directory beside it.

        Links in `path` are followed once, before anything is read, so that a new export published meanwhile is never
        mixed with this one.

        Raises:
            ExportError: missing, damaged, tampered with, of an unknown format, inconsistent, or without its base.

        """
        for attempt in range(OPEN_ATTEMPTS):
            directory = Path(path).resolve()
            try:
                return cls._opened(directory, verify, partial, threads or usable_cores())
            except (MedscaleError, OSError) as cause:
                replaced = Path(path).resolve() != directory
                if replaced and attempt + 1 < OPEN_ATTEMPTS:
                    continue
                if isinstance(cause, ExportError):
                    raise
                raise DamagedTierError(str(cause)) from None
        raise AssertionError("the last attempt returns or raises")

    @classmethod
    def _opened(cls, directory: Path, when: Verify, partial: bool, threads: int) -> "Tier":
        files = _verified(directory, when, partial)
        facts = files.facts
        if facts.layout == "rows":
            assert facts.base is not None
            raise ExportError(
                f"{directory} holds the rows that joined after tier {facts.base.tier!r} was exported: open that tier, "
                "then call its upgrade with this directory"
            )
        if facts.layout == "delta":
            assert facts.base is not None
            below = _beside(directory, facts.base.tier)
            return cls._opened(below, when, partial, threads)._with_columns(files)
        relations, names = files.relations()
        names = names or files.all_names()[1]
        return cls(facts, Rows([Section.of(files, partial)]), relations, names, threads, partial)

    def upgrade(self, delta_path: Path | str, verify: Verify = "once") -> "Tier":
        """Return the larger tier that a delta on top of this one makes: more columns, or more rows.

        Nothing is copied: the rows of both stay mapped. This tier stays as it is.

        Raises:
            ExportError: it does not go on top of this tier (another run, order, precision, export), or is damaged.

        """
        try:
            files = _verified(Path(delta_path).resolve(), verify, self._partial)
        except (MedscaleError, OSError) as cause:
            if isinstance(cause, ExportError):
                raise
            raise DamagedTierError(str(cause)) from None
        if files.facts.layout == "full":
            raise ExportError(f"{files.directory} is a whole tier (layout full), not a delta: open it by itself")
        return self._with_columns(files) if files.facts.layout == "delta" else self._with_rows(files)

    def _with_columns(self, files: TierFiles) -> "Tier":
        ours, theirs, where = self._facts, files.facts, files.directory
        if len(self.rows.sections) > 1:
            raise TierChainError(f"{where} adds columns to {self.name!r}, which rows have joined: put columns on first")
        _check_goes_together(ours, theirs, where)
        counts = ("num_entities", "num_relations", "shard_rows", "num_shards", "sharding", "reciprocal")
        differs = [key for key in counts if getattr(ours, key) != getattr(theirs, key)]
        assert theirs.base is not None
        if theirs.base.payload != ours.payload or differs:
            why = f"the fact {differs[0]!r} differs" if differs else "their payloads differ"
            raise TierChainError(f"{where} does not go on top of {ours.source}: {why}, so it belongs to another export")
        section = self.rows.sections[0].with_columns(files, self._partial)
        relations = np.concatenate([self._relations, files.relations()[0]], axis=1)
        return Tier(section.facts, Rows([section]), relations, self._relation_names, self.threads, self._partial)

    def _with_rows(self, files: TierFiles) -> "Tier":
        ours, theirs, where = self._facts, files.facts, files.directory
        assert theirs.base is not None
        _check_goes_together(ours, theirs, where)
        same = ("dims", "cuts", "damping", "reciprocal")
        differs = [key for key in same if getattr(ours, key) != getattr(theirs, key)]
        if theirs.base.payload != ours.payload or differs:
            why = f"the fact {differs[0]!r} differs" if differs else "its base's payload is another one"
            raise TierChainError(f"{where} does not go on top of {ours.source}: {why}, so it extends another export")
        if theirs.first_entity != self.num_entities:
            raise TierChainError(
                f"{where} begins at entity {theirs.first_entity}, this tier ends before {self.num_entities}"
            )
        relations, names = files.relations()
        assert names is not None
        rows = Rows([*self.rows.sections, Section.of(files, self._partial)])
        return Tier(replace(theirs, layout="full"), rows, relations, names, self.threads, self._partial)

    @property
    def facts(self) -> Mapping[str, Any]:
        """Everything that the manifest tells about this tier."""
        return self._facts.raw

    @property
    def checked_facts(self) -> TierFacts:
        """The same, in the shape that all formats share."""
        return self._facts

    @property
    def name(self) -> str:
        """The tier's name."""
        return self._facts.tier

    @property
    def dim(self) -> int:
        """Units of every row."""
        return self._facts.dim

    @property
    def columns(self) -> int:
        """Columns of an entity row: `dim` x columns per unit."""
        return self.rows.columns

    @property
    def scorer(self) -> str:
        """The score function's name."""
        return self._facts.scorer_name

    @property
    def damping(self) -> tuple[float, ...]:
        """Kappa, by which each sub-model's score takes in that of the one below."""
        return self._facts.damping

    @property
    def reciprocal(self) -> bool:
        """Whether heads are predicted with an inverse relation's own vector."""
        return self._facts.reciprocal

    @property
    def num_entities(self) -> int:
        """Rows of the entity table, those that joined later included."""
        return self.rows.num_entities

    @property
    def num_relations(self) -> int:
        """Relations of the graph; inverses are not counted."""
        return self._facts.num_relations

    @property
    def entity_types(self) -> tuple[str, ...]:
        """Names of the types of entities; () if the graph has none."""
        return self._facts.entity_types

    @property
    def relations(self) -> NDArray[np.float32]:
        """Relation rows as stored, float32[relation rows, relation columns], read-only; inverses come last."""
        view: NDArray[np.float32] = self._relations.view()
        view.flags.writeable = False
        return view

    def entity_id(self, name: str) -> int:
        """Return an entity's id; UnknownNameError if there is none of that name."""
        return int(_ids(self.rows, name)) if isinstance(name, str) else _refuse_name("entity", name)

    def relation_id(self, name: str) -> int:
        """Return a relation's id; UnknownNameError if there is none of that name."""
        return int(_ids(self._relation_names, name)) if isinstance(name, str) else _refuse_name("relation", name)

    def entity_name(self, entity: int) -> str:
        """Return an entity's name; UnknownNameError if the id is out of range."""
        return self.rows.name(self.rows.check(entity))

    def relation_name(self, relation: int) -> str:
        """Return a relation's name; UnknownNameError if the id is out of range."""
        return self._relation_names.name(relation)

    def entity_type(self, entity: str | int) -> str | None:
        """Return the name of an entity's type, or None; UnknownNameError if there is no such entity."""
        return self.rows.type_of(self._entity(entity))

    def shard_of(self, entity: str | int) -> str:
        """Return the name of the file that holds an entity's row, whether it was fetched or not.

        Raises:
            ExportError: unknown name or id; a MissingShardError where a file has to be fetched first to tell.

        """
        return self.rows.shard_of(self._entity(entity))

    def vector(self, entity: str | int) -> NDArray[np.float32]:
        """Return an entity's row, float32[columns], a copy.

        Raises:
            ExportError: unknown name or id.

        """
        return self.rows.vector(self._entity(entity))

    def vectors(self, entities: Names) -> NDArray[np.float32]:
        """Return entities' rows, float32[..., columns], a copy.

        Raises:
            ExportError: unknown name or id.

        """
        return self.rows.vectors(_ids(self.rows, entities))

    def score(self, head: Names, relation: Names, tail: Names) -> NDArray[np.float32]:
        """Return the scores of triples, float32 in the shape that the three arguments broadcast to.

        Each is a name, an id, or an array of either; higher scores are more plausible. Computed in float64. Of a run
        with inverse relations (`reciprocal`) it is the mean of what `top_k` and `top_k_heads` rank by.

        Raises:
            ExportError: unknown name or id, or shapes that do not broadcast.

        """
        heads, tails = (_ids(self.rows, names) for names in (head, tail))
        relations = _ids(self._relation_names, relation)
        try:
            triples = [array.reshape(-1) for array in np.broadcast_arrays(heads, relations, tails)]
        except ValueError:
            shapes = f"{heads.shape}, {relations.shape} and {tails.shape}"
            raise ExportError(f"heads, relations and tails of shapes {shapes} do not go together") from None
        scores = np.empty(len(triples[0]), np.float32)
        step = max(1, SCORED_NUMBERS // self.columns)
        for start in range(0, len(scores), step):
            part = slice(start, start + step)
            scores[part] = self._score_ids(*(array[part] for array in triples))
        return scores.reshape(np.broadcast_shapes(heads.shape, relations.shape, tails.shape))

    def score_tails(self, head: str | int, relation: str | int) -> NDArray[np.float32]:
        """Return the score of every entity as the tail of (head, relation, ?), float32[num_entities], in float32.

        Raises:
            ExportError: unknown name or id.

        """
        return all_scores(self.query(head, relation, "tail"), self.rows, self.threads)

    def score_heads(self, relation: str | int, tail: str | int) -> NDArray[np.float32]:
        """Return the score of every entity as the head of (?, relation, tail), float32[num_entities], in float32.

        Raises:
            ExportError: unknown name or id.

        """
        return all_scores(self.query(tail, relation, "head"), self.rows, self.threads)

    def top_k(
        self, head: str | int, relation: str | int, k: int,
        *, exclude: Names | None = None, candidates: Names | None = None,
    ) -> Answers:  # fmt: skip
        """Return the names and scores of the k best tails, best first; equal scores by id.

        `exclude` leaves entities out, such as tails that are known; `candidates` names the only ones that count, or,
        as one str, their type. Scores are computed in float64 and rounded to float32; they depend neither on threads
        nor on the layout of the files. With inverse relations they are of the question for tails alone: see `score`.

        Raises:
            ExportError: unknown name, id or type, or k below 1. More than there are gives all.

        """
        return self._named(*self.best(self.query(head, relation, "tail"), k, exclude, candidates))

    def top_k_heads(
        self, relation: str | int, tail: str | int, k: int,
        *, exclude: Names | None = None, candidates: Names | None = None,
    ) -> Answers:  # fmt: skip
        """Return the names and scores of the k best heads, as `top_k` does the best tails.

        Raises:
            ExportError: as `top_k`.

        """
        return self._named(*self.best(self.query(tail, relation, "head"), k, exclude, candidates))

    def neighbours(
        self, entity: str | int, k: int, *, exclude: Names | None = None, candidates: Names | None = None
    ) -> Answers:
        """Return the names of the k nearest other entities, nearest first, and how near each is; equal ones by id.

        What is near is what the scorer trained for, over whole rows: L1 distance for `transe` (norm l1) and `pairre`,
        L2 distance for `transe` (norm l2), the mean complex modulus of differences for `rotate`, and the cosine for
        `distmult`, `complex` and `simple`, where larger is nearer (0 for a row of zeros).

        Raises:
            ExportError: as `top_k`.

        """
        index = self._entity(entity)
        geometry = self._facts.scorer.geometry
        weight = 1 / self.dim if geometry == "modulus" else 1.0
        query = Query(
            "cosine" if geometry == "product" else geometry,
            self.rows.vector(index).astype(np.float64),
            None,
            np.full(len(self._weights), weight),
        )
        others = np.append(self.ids(exclude).reshape(-1) if exclude is not None else np.zeros(0, np.int64), index)
        names, scores = self._named(*self.best(query, k, others, candidates))
        return names, np.abs(scores) if query.is_distance else scores

    def query(self, known: str | int, relation: str | int, side: Side) -> Query:
        """Return the question for the `side` of a triple that is not known: what `best` and `Cascade` answer.

        Raises:
            ExportError: unknown name or id.

        """
        known_row = self.rows.vector(self._entity(known)).astype(np.float64)
        relation_row = self._relation_rows(_one(self._relation_names, relation), side)
        # An inverse relation asks for the tail of (t, inverse of r, ?): the same question, told forwards.
        direction: Side = "tail" if self.reciprocal else side
        scorer = self._facts.scorer
        factor = None if scorer.factor is None else scorer.factor(relation_row, direction)
        return Query(scorer.geometry, scorer.query(known_row, relation_row, direction), factor, self._weights)

    def best(
        self, query: Query, k: int, exclude: Names | None = None, candidates: Names | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return (ids, scores) of the k best answers, int64[k] and float32[k], best first; equal scores by id.

        Raises:
            ExportError: as `top_k`.

        """
        check_k(k)
        excluded = np.unique(self.ids(exclude)) if exclude is not None else np.zeros(0, np.int64)
        if candidates is None:
            return best(query, self.rows, k, excluded=excluded, threads=self.threads, length=self.length(query))
        ids = self.candidate_ids(candidates)
        ids = ids[np.isin(ids, excluded, assume_unique=True, invert=True)]
        return best_of(query, self.rows, k, ids)

    def candidate_ids(self, candidates: Names) -> NDArray[np.int64]:
        """Return ids, int64, rising, of candidates: entities, or all of the type that one str names.

        Raises:
            ExportError: unknown name, id or type.

        """
        if not isinstance(candidates, str):
            return np.unique(self.ids(candidates))
        if candidates not in self.entity_types:
            known = ", ".join(self.entity_types) or "none: the graph was prepared without types"
            raise UnknownNameError(
                f"unknown entity type {candidates!r}; there are {known}. One entity is given as a list"
            )
        return self.rows.type_ids(candidates)

    def ids(self, entities: Names) -> NDArray[np.int64]:
        """Return ids, int64[...], of entities given by name or id; UnknownNameError if one is unknown."""
        return _ids(self.rows, entities)

    def length(self, query: Query) -> float:
        """Return a bound on the Euclidean norms of rows, for queries that need it."""
        return self._length if query.geometry == "product" else 0.0

    @cached_property
    def _length(self) -> float:
        """Found by reading all rows once, with the first query that needs it.

        Raises:
            ExportError: numbers are too large for float32 products.

        """
        length = longest(self.rows, self.threads)
        if not length < 1e15:
            raise DamagedTierError(
                f"{self._facts.source}: a row is longer than 1e15 or not a number; nothing trained is"
            )
        return length

    def _named(self, ids: NDArray[np.int64], scores: NDArray[np.float32]) -> Answers:
        return [self.rows.name(int(i)) for i in ids], scores

    def _entity(self, entity: str | int) -> int:
        return int(_one(self.rows, entity))

    def _score_ids(self, heads: Array, relations: Array, tails: Array) -> Array:
        head_rows, tail_rows = (self.rows.vectors(ids).astype(np.float64) for ids in (heads, tails))
        scores = self._compare(head_rows, self._relation_rows(relations, "tail"), tail_rows)
        if self.reciprocal:
            inverse = self._relation_rows(relations, "head")
            scores = (scores + self._compare(tail_rows, inverse, head_rows)) / 2
        return scores

    def _compare(self, known: Array, relation: Array, rows: Array) -> Array:
        scorer = self._facts.scorer
        query = scorer.query(known, relation, "tail")
        if scorer.factor is not None:
            rows = rows * scorer.factor(relation, "tail")
        return compare(scorer.geometry, query, rows, self._weights)

    def _relation_rows(self, relations: Array, side: Side) -> Array:
        """Return float64[..., relation columns]; with `reciprocal` heads are asked for by inverses."""
        inverse = self.reciprocal and side == "head"
        rows: Array = self._relations[relations + self.num_relations if inverse else relations]
        return rows.astype(np.float64)


def check_k(k: int) -> None:
    """Refuse what is no number of answers.

    Raises:
        ExportError: it is none.

    """
    if type(k) is not int or k < 1:
        raise ExportError(f"k is {k!r}; ask for a number of at least 1")


def _verified(directory: Path, when: Verify, partial: bool) -> TierFiles:
    files = TierFiles.of(directory)
    verify(directory, files.manifest, when, files.optional() if partial else frozenset())
    return files


def _beside(directory: Path, tier: str) -> Path:
    """Return the directory of a delta's base, in the same export."""
    base = safe_join(directory.parent, tier)
    if not base.is_dir():
        raise ExportError(f"{directory} goes on top of tier {tier!r}, which is not beside it: fetch {base}")
    return base


def _check_goes_together(ours: TierFacts, theirs: TierFacts, where: Path) -> None:
    """Say, as far as facts can tell, why a delta does not go on top of a tier."""
    assert theirs.base is not None
    if ours.format == 1:
        raise TierChainError(f"{ours.source} is of format 1, which nothing goes on top of; export it again")
    rows = theirs.layout == "rows"
    if (theirs.scorer_name, theirs.norm) != (ours.scorer_name, ours.norm):
        raise TierChainError(f"{where} is of another run than {ours.source}: its scorer is {theirs.scorer_name}")
    if not rows and (theirs.run, theirs.step, theirs.graph_sha256) != (ours.run, ours.step, ours.graph_sha256):
        raise TierChainError(
            f"{where} is of another run: of {theirs.run!r} at step {theirs.step:,}; {ours.source} is of {ours.run!r} "
            f"at step {ours.step:,}"
        )
    if theirs.base.tier != ours.tier:
        raise TierChainError(
            f"wrong order: {where} goes on top of tier {theirs.base.tier!r}, this is tier {ours.tier!r}"
        )
    if theirs.precision != ours.precision:
        raise TierChainError(f"{where} is of precision {theirs.precision}, {ours.source} of {ours.precision}")


class _Naming(Protocol):
    """What has names and ids: entities or relations."""

    @property
    def what(self) -> str: ...
    def index(self, name: str) -> int: ...
    def check(self, index: int) -> int: ...


def _one(table: _Naming, name: Any) -> NDArray[np.int64]:
    """Return the id of one name or id."""
    ids = _ids(table, name)
    if ids.ndim:
        raise ExportError(f"{table.what}: expected one name (str) or id (int), got {name!r:.80}")
    return ids


def _refuse_name(what: str, name: Any) -> int:
    raise ExportError(f"{what}: expected a name (str), got {name!r:.80}")


def _ids(table: _Naming, names: Any) -> NDArray[np.int64]:
    """Return ids of names or ids, each checked, in the shape given."""
    if isinstance(names, str):
        return np.array(table.index(names), np.int64)
    if type(names) is int:
        return np.array(table.check(names), np.int64)
    try:
        plain = isinstance(names, np.ndarray) and names.dtype.kind in "iu"
        ids = np.asarray(names if plain else _by_name(table, names))
    except ValueError:
        raise ExportError(f"{table.what}: the nested lists given have unequal lengths") from None
    if ids.size and ids.dtype.kind not in "iu":
        raise ExportError(f"{table.what}: expected names (str) or ids (int), one or a list, got {names!r:.80}")
    for index in (ids.min(), ids.max()) if ids.size else ():
        table.check(int(index))
    return ids.astype(np.int64)


def _by_name(table: _Naming, names: Any) -> Any:
    """Replace the names in nested sequences by ids; what is no name is left to be judged as an id."""
    if isinstance(names, str):
        return table.index(names)
    if isinstance(names, np.ndarray):
        names = names.tolist()
    return [_by_name(table, item) for item in names] if isinstance(names, (list, tuple)) else names
