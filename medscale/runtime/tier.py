"""A tier as it is shipped: open, verify, look up, score.

## Format 1, byte for byte

A tier is a directory; all numbers are little-endian, all rows are in id order, and every name of a file is
listed with its bytes and SHA-256 in `manifest.json`, which is written last:

    manifest.json                          {"kind": "tier", "format": 1, "facts": {...}, "files": {...}}
    entities-00000-of-0000N.safetensors    tensor "vectors", F32 [rows, columns]
    ...                                    shard_rows rows each, the last one the rest
    relations.safetensors                  tensor "vectors", F32 [relation rows, relation columns]
    names.safetensors                      see below
    entities.parquet                       id int64, name string, vector fixed_size_list<float>[columns]
    relations.parquet                      id int64, name string, inverse bool, vector as above

A safetensors file is: 8 bytes, the length H of the header as an unsigned integer; H bytes of JSON, padded
with spaces to a multiple of 8, {"name": {"dtype": "F32" | "I64" | "U8", "shape": [...], "data_offsets":
[start, stop]}, ...} with offsets counted from byte 8 + H; then the tensors' bytes in row-major order, without
gaps.

Columns are interleaved by unit: columns [u x unit_columns, (u + 1) x unit_columns) are unit u, so the first d
units of a row are its first d x unit_columns columns. `facts["units"]` says what they are, per scorer:

    scorer                entity unit           relation unit
    transe, distmult      value                 value
    pairre                value                 head factor, tail factor
    rotate                re, im                cos, sin (of the phase)
    complex               re, im                re, im
    simple                as head, as tail      forward, inverse

With `reciprocal` the relation rows are [r_0 .. r_(R-1), inverse of r_0 .. inverse of r_(R-1)], else the first
half only. `medscale.runtime.scoring` states the scores; with `reciprocal` tails are scored by s(h, r, t),
heads by s(t, inverse of r, h), and a triple by the mean of both.

names.safetensors holds for X = entity and X = relation: "X_order" I64 [n], the ids sorted by their names'
bytes; "X_offsets" I64 [n + 1]; "X_bytes" U8: name i is the UTF-8 bytes [offsets[i], offsets[i + 1]).

facts: run, step, graph, graph_sha256 (where it comes from); tier, dim (units), tiers {name: dim} of the whole
chain; scorer, norm, dims (boundaries of the levels up to `dim`), damping (one kappa per level above the first:
a level's own sum + kappa x the score of the level below), reciprocal; unit_columns,
relation_unit_columns, units, columns, relation_columns; dtype ("float32"); num_entities, num_relations,
shard_rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medscale.errors import ExportError
from medscale.manifest import Manifest, read_manifest, verify_files
from medscale.runtime.names import NameTable
from medscale.runtime.scoring import Array, Side, compare, exported_scorer, unit_weights
from medscale.runtime.shards import map_tensors
from medscale.storage import safe_join

__all__ = ["TIER_FORMAT", "TIER_KIND", "Names", "Tier", "shard_name"]

TIER_KIND = "tier"
TIER_FORMAT = 1

#: one or many entities or relations: a str is a name, an int is an id
Names = str | int | Sequence[str] | Sequence[int] | NDArray[Any]

#: numbers of a table that one step of a scan works on: about a core's cache
SCAN_ELEMENTS = 1 << 18
#: counts in facts are below this, so that int64 arithmetic on them cannot wrap
LARGEST = 1 << 48
#: a reader that meets a version just being replaced turns to the next one
OPEN_ATTEMPTS = 20


def shard_name(index: int, count: int) -> str:
    """Return the file name of an entity shard."""
    return f"entities-{index:05d}-of-{count:05d}.safetensors"


class Tier:
    """One exported tier, its tables mapped into memory and read only where they are used.

    Instances are read-only and may be shared by threads. The files must stay as they are while mapped;
    an export never changes a published file, and a replaced version stays readable to whoever has it open.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        facts = manifest.facts
        self._facts: Mapping[str, Any] = MappingProxyType(dict(facts))
        _check_facts(directory, facts)
        self._scorer = exported_scorer(facts["scorer"], facts["norm"])
        files = _Files(directory, manifest)
        self._shard_rows: int = facts["shard_rows"]
        self._shards = list(_entity_shards(files, facts))
        rows = self.num_relations * (2 if self.reciprocal else 1)
        self._relations = files.vectors("relations.safetensors", (rows, facts["relation_columns"]))
        self._entity_names = files.names("entity", self.num_entities)
        self._relation_names = files.names("relation", self.num_relations)
        weights = unit_weights(facts["dims"], self.damping)
        per_column = 1 if self._scorer.geometry == "modulus" else len(self._scorer.entity_unit)
        self._weights = np.repeat(weights, per_column)

    @classmethod
    def open(cls, path: Path | str, verify: bool = True) -> "Tier":
        """Open the tier in directory `path`, such as `runs/NAME/export/phone`.

        `verify` reads every file once to compare its SHA-256 with the manifest's; without it only the
        manifest, the headers and the sizes are checked. Links in `path` are followed once, before anything is
        read, so that a new export published meanwhile is never mixed with this one.

        Raises:
            ExportError: missing, damaged, tampered with, of an unknown format, or inconsistent.

        """
        for attempt in range(OPEN_ATTEMPTS):
            directory = Path(path).resolve()
            try:
                manifest = read_manifest(directory, TIER_KIND, TIER_FORMAT, ExportError)
                if verify:
                    verify_files(directory, manifest, ExportError)
                return cls(directory, manifest)
            except (ExportError, OSError) as cause:
                replaced = Path(path).resolve() != directory
                if replaced and attempt + 1 < OPEN_ATTEMPTS:
                    continue
                raise ExportError(str(cause)) from None
        raise AssertionError("the last attempt returns or raises")

    @property
    def facts(self) -> Mapping[str, Any]:
        """Everything that the manifest tells about this tier."""
        return self._facts

    @property
    def name(self) -> str:
        """The tier's name."""
        return str(self._facts["tier"])

    @property
    def dim(self) -> int:
        """Units of every row."""
        return int(self._facts["dim"])

    @property
    def columns(self) -> int:
        """Columns of an entity row: `dim` x columns per unit."""
        return int(self._facts["columns"])

    @property
    def scorer(self) -> str:
        """The score function's name."""
        return str(self._facts["scorer"])

    @property
    def damping(self) -> tuple[float, ...]:
        """Kappa, by which each sub-model's score takes in that of the one below."""
        return tuple(self._facts["damping"])

    @property
    def reciprocal(self) -> bool:
        """Whether heads are predicted with an inverse relation's own vector."""
        return bool(self._facts["reciprocal"])

    @property
    def num_entities(self) -> int:
        """Rows of the entity table."""
        return int(self._facts["num_entities"])

    @property
    def num_relations(self) -> int:
        """Relations of the graph; inverses are not counted."""
        return int(self._facts["num_relations"])

    def entity_id(self, name: str) -> int:
        """Return an entity's id; ExportError if there is none of that name."""
        return self._entity_names.index(name)

    def relation_id(self, name: str) -> int:
        """Return a relation's id; ExportError if there is none of that name."""
        return self._relation_names.index(name)

    def entity_name(self, entity: int) -> str:
        """Return an entity's name; ExportError if the id is out of range."""
        return self._entity_names.name(entity)

    def relation_name(self, relation: int) -> str:
        """Return a relation's name; ExportError if the id is out of range."""
        return self._relation_names.name(relation)

    def vector(self, entity: str | int) -> NDArray[np.float32]:
        """Return an entity's row, float32[columns], a copy.

        Raises:
            ExportError: unknown name or id.

        """
        return self.vectors(entity)

    def vectors(self, entities: Names) -> NDArray[np.float32]:
        """Return entities' rows, float32[..., columns], a copy.

        Raises:
            ExportError: unknown name or id.

        """
        return self._rows(_ids(self._entity_names, entities))

    def score(self, head: Names, relation: Names, tail: Names) -> NDArray[np.float32]:
        """Return the scores of triples, float32 in the shape that the three arguments broadcast to.

        Each is a name, an id, or an array of either; higher scores are more plausible. Computed in float64.

        Raises:
            ExportError: unknown name or id, or shapes that do not broadcast.

        """
        heads, tails = (_ids(self._entity_names, names) for names in (head, tail))
        relations = _ids(self._relation_names, relation)
        try:
            triples = [array.reshape(-1) for array in np.broadcast_arrays(heads, relations, tails)]
        except ValueError:
            shapes = f"{heads.shape}, {relations.shape} and {tails.shape}"
            raise ExportError(f"heads, relations and tails of shapes {shapes} do not go together") from None
        scores = np.empty(len(triples[0]), np.float32)
        for part in _parts(len(scores), self.columns):
            scores[part] = self._score_ids(*(array[part] for array in triples))
        return scores.reshape(np.broadcast_shapes(heads.shape, relations.shape, tails.shape))

    def score_tails(self, head: str | int, relation: str | int) -> NDArray[np.float32]:
        """Return the score of every entity as the tail of (head, relation, ?), float32[num_entities].

        Raises:
            ExportError: unknown name or id.

        """
        return self._scan(head, relation, "tail")

    def score_heads(self, relation: str | int, tail: str | int) -> NDArray[np.float32]:
        """Return the score of every entity as the head of (?, relation, tail), float32[num_entities].

        Raises:
            ExportError: unknown name or id.

        """
        return self._scan(tail, relation, "head")

    def top_k(self, head: str | int, relation: str | int, k: int) -> tuple[list[str], NDArray[np.float32]]:
        """Return the names and scores of the k best tails, best first; equal scores by id.

        Raises:
            ExportError: unknown name or id, or k below 1. More than there are gives all.

        """
        return self._best(self.score_tails(head, relation), k)

    def top_k_heads(self, relation: str | int, tail: str | int, k: int) -> tuple[list[str], NDArray[np.float32]]:
        """Return the names and scores of the k best heads, best first; equal scores by id.

        Raises:
            ExportError: unknown name or id, or k below 1. More than there are gives all.

        """
        return self._best(self.score_heads(relation, tail), k)

    def _score_ids(self, heads: Array, relations: Array, tails: Array) -> Array:
        head_rows, tail_rows = (self._rows(ids).astype(np.float64) for ids in (heads, tails))
        scores = self._compare(head_rows, self._relation_rows(relations, "tail"), tail_rows, "tail")
        if self.reciprocal:
            inverse = self._relation_rows(relations, "head")
            scores = (scores + self._compare(tail_rows, inverse, head_rows, "tail")) / 2
        return scores

    def _scan(self, known: str | int, relation: str | int, side: Side) -> NDArray[np.float32]:
        known_row = self.vector(known).astype(np.float64)
        relation_row = self._relation_rows(_ids(self._relation_names, relation), side)
        # An inverse relation asks for the tail of (t, inverse of r, ?): the same question, told forwards.
        direction: Side = "tail" if self.reciprocal else side
        query = self._scorer.query(known_row, relation_row, direction).astype(np.float32)
        factor = self._scorer.factor and self._scorer.factor(relation_row, direction).astype(np.float32)
        weights = self._weights.astype(np.float32)
        scores = np.empty(self.num_entities, np.float32)
        for index, shard in enumerate(self._shards):
            shard_scores = scores[index * self._shard_rows :]
            for part in _parts(len(shard), self.columns):
                rows = shard[part] if factor is None else shard[part] * factor
                shard_scores[part] = compare(self._scorer.geometry, query, rows, weights)
        return scores

    def _compare(self, known: Array, relation: Array, rows: Array, side: Side) -> Array:
        query = self._scorer.query(known, relation, side)
        if self._scorer.factor is not None:
            rows = rows * self._scorer.factor(relation, side)
        return compare(self._scorer.geometry, query, rows, self._weights)

    def _relation_rows(self, relations: Array, side: Side) -> Array:
        """Return float64[..., relation columns]; with `reciprocal` heads are asked for by inverses."""
        inverse = self.reciprocal and side == "head"
        rows: Array = self._relations[relations + self.num_relations if inverse else relations]
        return rows.astype(np.float64)

    def _rows(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        if ids.ndim == 0:  # the look-up of one vector: nothing to gather
            shard, row = divmod(int(ids), self._shard_rows)
            vector: NDArray[np.float32] = self._shards[shard][row].copy()
            return vector
        rows = np.empty((*ids.shape, self.columns), np.float32)
        shards, within = np.divmod(ids, self._shard_rows)
        for shard in np.unique(shards):
            here = shards == shard
            rows[here] = self._shards[shard][within[here]]
        return rows

    def _best(self, scores: NDArray[np.float32], k: int) -> tuple[list[str], NDArray[np.float32]]:
        if k < 1:
            raise ExportError(f"k is {k}; ask for at least 1")
        k = min(k, len(scores))
        threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
        above = np.flatnonzero(scores > threshold)
        equal = np.flatnonzero(scores == threshold)[: k - len(above)]
        ids = np.concatenate([above[np.argsort(-scores[above], kind="stable")], equal])
        return [self.entity_name(int(i)) for i in ids], scores[ids]


class _Files:
    """The tensors of a tier's files, each checked to be what the facts promise."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest

    def tensors(self, name: str) -> dict[str, Array]:
        if name not in self.manifest.files:
            raise ExportError(f"{self.directory} is incomplete: its manifest does not list {name}")
        return map_tensors(safe_join(self.directory, name))

    def vectors(self, name: str, shape: tuple[int, int]) -> Array:
        vectors = self.tensors(name).get("vectors")
        if vectors is None or vectors.dtype != np.float32 or vectors.shape != shape:
            found = "no such tensor" if vectors is None else f"{vectors.dtype} {list(vectors.shape)}"
            raise ExportError(f"{self.directory / name}: 'vectors' should be float32 {list(shape)}, found {found}")
        return vectors

    def names(self, what: str, number: int) -> NameTable:
        file = "names.safetensors"
        tensors = self.tensors(file)
        missing = [key for key in ("bytes", "offsets", "order") if f"{what}_{key}" not in tensors]
        if missing:
            raise ExportError(f"{self.directory / file} lacks the tensor {what}_{missing[0]}")
        data, offsets, order = (tensors[f"{what}_{key}"] for key in ("bytes", "offsets", "order"))
        table = NameTable(what, str(self.directory), data, offsets, order)
        if len(table) != number:
            raise ExportError(f"{self.directory / file} names {len(table)} {what} ids; the tier has {number}")
        return table


def _entity_shards(files: _Files, facts: Mapping[str, Any]) -> Iterator[Array]:
    count = -(-facts["num_entities"] // facts["shard_rows"])
    for index in range(count):
        rows = min(facts["shard_rows"], facts["num_entities"] - index * facts["shard_rows"])
        yield files.vectors(shard_name(index, count), (rows, facts["columns"]))


def _check_facts(directory: Path, facts: Mapping[str, Any]) -> None:
    """Refuse facts that are missing, of another type, or contradict each other."""
    wrong = next(_wrong_facts(facts), None)
    if wrong is not None:
        raise ExportError(f"{directory}: the manifest's {wrong} is missing or makes no sense")


def _wrong_facts(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of facts that cannot be used."""
    for key in ("dim", "columns", "relation_columns", "num_entities", "num_relations", "shard_rows"):
        if type(facts.get(key)) is not int or not 0 < facts[key] < LARGEST:
            yield key
    damping, dims, dim = facts.get("damping"), facts.get("dims"), facts.get("dim")
    if not _rising(dims) or dims[-1] != dim:  # type: ignore[index]
        yield "dims"
    elif not _kappas(damping, len(dims) - 1):  # type: ignore[arg-type]
        yield "damping"
    if type(facts.get("reciprocal")) is not bool:
        yield "reciprocal"
    yield from (key for key in ("tier", "run", "graph") if not isinstance(facts.get(key), str))
    if facts.get("dtype") != "float32":
        yield "dtype"
    wrong = _wrong_columns(facts)
    if wrong is not None:
        yield wrong


def _kappas(damping: Any, count: int) -> bool:
    if not isinstance(damping, list) or len(damping) != count:
        return False
    return all(type(kappa) in (int, float) and 0 < kappa <= 1 for kappa in damping)


def _rising(dims: Any) -> bool:
    if not isinstance(dims, list) or not dims or not all(type(dim) is int for dim in dims):
        return False
    return all(a < b for a, b in zip([0, *dims[:-1]], dims, strict=True))


def _wrong_columns(facts: Mapping[str, Any]) -> str | None:
    try:
        scorer = exported_scorer(str(facts.get("scorer")), str(facts.get("norm")))
    except KeyError:
        return "scorer or norm"
    if facts.get("columns") != facts.get("dim") * len(scorer.entity_unit):  # type: ignore[operator]
        return "columns"
    if facts.get("relation_columns") != facts.get("dim") * len(scorer.relation_unit):  # type: ignore[operator]
        return "relation_columns"
    return None


def _ids(table: NameTable, names: Names) -> NDArray[np.int64]:
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
        raise ExportError(f"{table.what}: expected names (str) or ids (int), got {names!r:.80}")
    for index in (ids.min(), ids.max()) if ids.size else ():
        table.check(int(index))
    return ids.astype(np.int64)


def _by_name(table: NameTable, names: Any) -> Any:
    """Replace the names in nested sequences by ids; what is no name is left to be judged as an id."""
    if isinstance(names, str):
        return table.index(names)
    if isinstance(names, np.ndarray):
        names = names.tolist()
    return [_by_name(table, item) for item in names] if isinstance(names, (list, tuple)) else names


def _parts(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of rows that are small enough to stay in a core's cache."""
    step = max(1, SCAN_ELEMENTS // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
