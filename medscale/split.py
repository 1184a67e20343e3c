"""Cuts a table into tiers: every tier's columns, names and constants as files, published in one move.

Rows are read a few at a time for all tiers, several shards side by side. `runtime/FORMAT.md` specifies the files,
`shardfiles` writes those of a shard, `versions` publishes the whole.
"""

import itertools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medscale.cluster import tasks_of
from medscale.config import ExportSection
from medscale.errors import ConfigError, ExportError
from medscale.logs import Advance
from medscale.manifest import read_manifest, write_manifest
from medscale.namehash import fnv1a, names_twice, utf8
from medscale.runtime.files import INDEX, RELATIONS, TIER_KIND, shard_names_name
from medscale.runtime.scoring import ExportedScorer, exported_scorer
from medscale.runtime.shards import map_tensors
from medscale.runtime.tier import TIER_FORMAT, Tier
from medscale.shardfiles import (
    Entities,
    Form,
    Shard,
    TableSource,
    TierForm,
    WrittenShard,
    check_finite,
    hash_shard,
    payload_of,
    write_shard,
)
from medscale.storage import safe_join
from medscale.tierfiles import ParquetRows, fixed_size_list, list_type, name_tensors, write_tensors
from medscale.versions import publication

__all__ = [
    "CHUNK_BYTES", "EntityTypes", "Extra", "ModelFacts", "TableSource", "WrittenTier", "check_tiers", "write_export",
]  # fmt: skip

#: bytes of rows that are read at a time; also decides the row groups of the Parquet files
CHUNK_BYTES = 8 << 20
#: threads hold a chunk each, some times over
MOST_THREADS = 16
#: threads that write the files of a shard, where there are cores for more than one
WRITERS = 2

Item = TypeVar("Item")
Result = TypeVar("Result")

#: adds files to a tier that has been written, given open, to its directory; the manifest then names them too
Extra = Callable[[Tier, Path], None]


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What an export says about the model that it was cut from."""

    run: str
    step: int
    graph: str
    graph_sha256: str
    scorer: str
    norm: str
    #: kappa of each level above the first: s_i = B_i + kappa_i s_(i-1)
    damping: tuple[float, ...]
    #: units of each sub-model, increasing
    dims: tuple[int, ...]
    reciprocal: bool


@dataclass(frozen=True)
class EntityTypes:
    """The type of each entity, for candidates of a type."""

    names: tuple[str, ...]
    #: int32[num_entities]: a place in `names`, or -1
    codes: NDArray[np.int32]


@dataclass(frozen=True)
class WrittenTier:
    """One tier as it was written."""

    name: str
    #: units
    dim: int
    #: reals of a whole entity row
    columns: int
    layout: str
    precision: str
    #: of all files
    bytes: int
    #: of the numeric core alone: vectors, scales, norms
    bytes_per_entity: float
    #: number of files, the manifest included
    files: int


def check_tiers(tiers: Mapping[str, int], dims: tuple[int, ...], layout: str = "full") -> None:
    """Check that every tier is a sub-model, and for layout `delta` that no two are the same.

    Raises:
        ConfigError: no tiers, or dims that the model was not trained for; lists each.

    """
    allowed = ", ".join(map(str, dims))
    problems = [
        f"tier {name}: dim {dim} is not one of the checkpoint's sub-models ({allowed})"
        for name, dim in tiers.items()
        if dim not in dims
    ]
    if layout == "delta" and len(set(tiers.values())) < len(tiers):
        problems.append("layout delta needs tiers of different dims: of two equal ones, the second has nothing to add")
    if problems or not tiers:
        raise ConfigError(problems or [f"no tiers to export: name at least one, such as server={dims[-1]}"])


def write_export(
    source: TableSource,
    entity_names: pa.Array | pa.ChunkedArray,
    relation_names: pa.Array | pa.ChunkedArray,
    facts: ModelFacts,
    tiers: Mapping[str, int],
    directory: Path,
    section: ExportSection | None = None,
    *,
    entity_types: EntityTypes | None = None,
    base: Path | None = None,
    extras: Sequence[Extra] = (),
    chunk_bytes: int = CHUNK_BYTES,
    threads: int | None = None,
    advance: Advance | None = None,
) -> tuple[WrittenTier, ...]:
    """Write every tier and publish them together as `directory`, smallest tier first.

    Names are string arrays whose index is the id. Rows are read once, `chunk_bytes` at a time and thread, for all
    tiers; equal tables, names, facts and sizes give equal bytes, whatever the number of threads or tasks. With `base`,
    an export of the run that this one extended, only rows of entities that it lacks are written (layout "rows"); then
    tiers, precision, sharding and rows per shard must be the base's. `extras` are called for each tier once it is
    written, but for those of layout "rows". `advance` is told of rows.

    Raises:
        ConfigError: a tier is not a sub-model.
        ExportError: `directory` exists and is not a published export; names occur twice; columns are not finite, or
            too large; names and tables differ in number; or the rows of `base` have changed since.
        RunLockedError: another export of this run is being written.

    """
    section = section or ExportSection()
    check_tiers(tiers, facts.dims, section.layout)
    tiers = dict(sorted(tiers.items(), key=lambda item: (item[1], item[0])))
    export = _Export(source, entity_names, relation_names, facts, tiers, section, entity_types, chunk_bytes)
    export.threads = threads or min(len(os.sched_getaffinity(0)), MOST_THREADS)
    export.advance = advance or (lambda rows: None)
    with publication(directory, facts.step, section.keep) as draft:
        if base is not None:
            export.put_on(base, draft)
        return export.write(draft, extras)


class _Export:
    """One pass over the tables that fills all tiers of an export."""

    threads = 1
    advance: Advance

    def __init__(
        self,
        source: TableSource,
        entity_names: pa.Array | pa.ChunkedArray,
        relation_names: pa.Array | pa.ChunkedArray,
        facts: ModelFacts,
        tiers: Mapping[str, int],
        section: ExportSection,
        entity_types: EntityTypes | None,
        chunk_bytes: int,
    ) -> None:
        self.source = source
        self.entity_names, self.relation_names = _strings(entity_names), _strings(relation_names)
        self.facts = facts
        self.tiers = tiers
        self.section = section
        self.entity_types = entity_types
        self.scorer = exported_scorer(facts.scorer, facts.norm)
        self.cuts = sorted(set(tiers.values()))
        self.chunk_rows = max(1, chunk_bytes // (self.cuts[-1] * len(self.scorer.entity_unit) * 4))
        #: of the first row that is written
        self.first_entity = 0
        #: by tier: the payload that its rows go on top of, for layout "rows"
        self.base_payloads: dict[str, list[str]] = {}

    @property
    def num_entities(self) -> int:
        """Rows that are written."""
        return len(self.entity_names) - self.first_entity

    def layout(self, tier: str) -> str:
        """Return a tier's layout: the smallest one of deltas has nothing below it."""
        if self.base_payloads:
            return "rows"
        return self.section.layout if self.tiers[tier] > self.cuts[0] else "full"

    # Shards

    def form(self, draft: Path, num_shards: int) -> Form:
        """Return what the shards of this export have in common."""
        unit = len(self.scorer.entity_unit)
        tiers = []
        for name, dim in self.tiers.items():
            last, is_delta = self.cuts.index(dim) + 1, self.layout(name) == "delta"
            tiers.append(TierForm(safe_join(draft, name), last - 1 if is_delta else 0, last, not is_delta))
        return Form(
            source=self.source,
            ends=tuple(dim * unit for dim in self.cuts),
            precision=self.section.precision,
            has_norms=self.scorer.geometry == "product",
            chunk_rows=self.chunk_rows,
            parquet="parquet" in self.section.formats,
            tiers=tuple(tiers),
            num_shards=num_shards,
            has_ids=self.section.sharding == "hash",
            # Tasks count on a core each.
            writers=WRITERS if self.threads > 1 and self.section.tasks == 1 else 0,
        )

    def shard(self, number: int, entities: Entities) -> Shard:
        """Return a shard with its names and types."""
        if isinstance(entities, range):
            names = self.entity_names.slice(entities.start, len(entities)).combine_chunks()
        else:
            names = self.entity_names.take(pa.array(entities)).combine_chunks()
        types = self.entity_types
        return Shard(number, entities, names, None if types is None else types.codes[_index(entities)])

    def shards_of(self, first: int, stop: int, hashes: NDArray[np.uint64]) -> list[Entities]:
        """Return the entities of each shard of those with ids [first, stop)."""
        step = self.section.shard_rows
        if self.section.sharding == "range":
            return [range(start, min(start + step, stop)) for start in range(first, stop, step)]
        shards = _shards_by_hash(hashes[first:stop], step)
        number = -(-(stop - first) // step)
        ends = np.cumsum(np.bincount(shards, minlength=number))
        order = np.argsort(shards, kind="stable") + first
        return [order[start:end] for start, end in itertools.pairwise([0, *ends.tolist()])]

    # What is written

    def write(self, draft: Path, extras: Sequence[Extra]) -> tuple[WrittenTier, ...]:
        """Write all tiers into an empty directory."""
        hashes = self._checked_names()
        shards = self.shards_of(self.first_entity, len(self.entity_names), hashes)
        form = self.form(draft, len(shards))
        for tier in form.tiers:
            tier.directory.mkdir()
        work = [(form, self.shard(number, entities)) for number, entities in enumerate(shards)]
        written = self._run(write_shard, work, draft, max(1, self.threads // WRITERS))
        payload = payload_of([shard.cuts for shard in written])
        return tuple(
            self._finish(name, form.tiers[place], payload, written, place, hashes, extras)
            for place, name in enumerate(self.tiers)
        )

    def _run(
        self, function: Callable[[Item, Advance], Result], items: Sequence[Item], draft: Path, threads: int
    ) -> list[Result]:
        if self.section.tasks == 1:
            return _in_threads(function, items, self.advance, threads)
        with tasks_of(self.section.tasks, draft) as tasks:
            return tasks.run(function, items, self.advance)

    def _checked_names(self) -> NDArray[np.uint64]:
        """Return the hash of each entity's name.

        Raises:
            ExportError: a name occurs twice.

        """
        hashes = fnv1a(self.entity_names)
        for what, names, values in (
            ("entity", self.entity_names, hashes),
            ("relation", self.relation_names, fnv1a(self.relation_names)),
        ):
            if (twice := names_twice(names, values)) is not None:
                raise ExportError(f"the graph has the {what} name {twice!r} more than once")
        return hashes

    def _finish(
        self,
        name: str,
        tier: TierForm,
        payload: Sequence[str],
        shards: Sequence[WrittenShard],
        place: int,
        hashes: NDArray[np.uint64],
        extras: Sequence[Extra],
    ) -> WrittenTier:
        known = {file: digest for shard in shards for file, digest in shard.files[place].items()}
        known |= self._write_relations(tier)
        if self.section.sharding == "hash" and tier.has_names:
            index = _shards_by_hash(hashes[self.first_entity :], self.section.shard_rows)
            known[INDEX] = write_tensors(tier.directory / INDEX, {"shard": index})
        facts = self._tier_facts(name, payload[: tier.last_cut], len(shards))
        manifest = write_manifest(tier.directory, TIER_KIND, TIER_FORMAT, facts, known)
        if extras and not self.base_payloads:
            opened = Tier.open(tier.directory, verify="never")
            for extra in extras:
                extra(opened, tier.directory)
            known |= {file: str(entry["sha256"]) for file, entry in manifest.files.items()}
            manifest = write_manifest(tier.directory, TIER_KIND, TIER_FORMAT, facts, known)
        core = [entry["bytes"] for file, entry in manifest.files.items() if _is_core(file)]
        return WrittenTier(
            name=name,
            dim=self.tiers[name],
            columns=self.tiers[name] * len(self.scorer.entity_unit),
            layout=facts["layout"],
            precision=self.section.precision,
            bytes=sum(path.stat().st_size for path in tier.directory.rglob("*") if path.is_file()),
            bytes_per_entity=sum(core) / self.num_entities,
            files=len(manifest.files) + 1,
        )

    def _write_relations(self, tier: TierForm) -> dict[str, str]:
        """Write the relations of a tier; return the files' hashes by name."""
        unit = len(self.scorer.relation_unit)
        starts = [0, *self.cuts]
        rows = _exported_relations(self.source, self.facts.scorer, starts[tier.last_cut], self.scorer)
        check_finite(rows, range(len(rows)), "relation")
        number, halves = len(self.relation_names), 2 if self.facts.reciprocal else 1
        if len(rows) != number * halves:
            raise ExportError(
                f"the checkpoint has {len(rows)} relation rows, the graph {number} relations "
                f"({'with' if halves == 2 else 'without'} inverses): they do not belong together"
            )
        rows = np.ascontiguousarray(rows[:, starts[tier.first_cut] * unit :])
        names = self.relation_names.combine_chunks()
        tensors = {"vectors": rows} | (name_tensors("relation", names) if tier.has_names else {})
        hashes = {RELATIONS: write_tensors(tier.directory / RELATIONS, tensors)}
        if "parquet" in self.section.formats:
            columns = {
                "id": pa.int64(),
                "name": pa.string(),
                "inverse": pa.bool_(),
                "vector": list_type(pa.float32(), rows.shape[1]),
            }
            file = ParquetRows(tier.directory / "relations.parquet", columns)
            file.append({
                "id": pa.array(np.tile(np.arange(number, dtype=np.int64), halves)),
                "name": pa.concat_arrays([names] * halves),
                "inverse": pa.array(np.arange(len(rows)) >= number),
                "vector": fixed_size_list(rows),
            })  # fmt: skip
            hashes["relations.parquet"] = file.close()
        return hashes

    def _tier_facts(self, name: str, payload: Sequence[str], num_shards: int) -> dict[str, Any]:
        dim, layout = self.tiers[name], self.layout(name)
        entity_unit, relation_unit = self.scorer.entity_unit, self.scorer.relation_unit
        levels = [d for d in self.facts.dims if d <= dim]
        below = [other for other, units in self.tiers.items() if units < dim]
        base = None
        if layout == "delta":
            base = {"tier": below[-1], "payload": list(payload[:-1])}
        elif layout == "rows":
            base = {"tier": name, "payload": self.base_payloads[name]}
        return asdict(self.facts) | {
            "tier": name,
            "dim": dim,
            "tiers": dict(self.tiers),
            "layout": layout,
            "precision": self.section.precision,
            "sharding": self.section.sharding,
            "base": base,
            "cuts": self.cuts[: len(payload)],
            "payload": list(payload),
            "first_entity": self.first_entity,
            "num_entities": self.num_entities,
            "num_relations": len(self.relation_names),
            "shard_rows": self.section.shard_rows,
            "num_shards": num_shards,
            "dims": levels,
            "damping": list(self.facts.damping[: len(levels) - 1]),
            "units": {"entity": list(entity_unit), "relation": list(relation_unit)},
            "unit_columns": len(entity_unit),
            "relation_unit_columns": len(relation_unit),
            "columns": dim * len(entity_unit),
            "relation_columns": dim * len(relation_unit),
            "entity_types": [] if self.entity_types is None else list(self.entity_types.names),
        }

    # Rows on top of another export

    def put_on(self, base: Path, draft: Path) -> None:
        """Leave out the entities of another export, whose rows must be in this table bit for bit.

        Raises:
            ExportError: they are not, their names differ, or the export is of another form.

        """
        manifests = {
            name: read_manifest(safe_join(base, name), TIER_KIND, TIER_FORMAT, ExportError).facts for name in self.tiers
        }
        for name, facts in manifests.items():
            self._check_base(base / name, name, facts)
        smallest, largest = (manifests[name] for name in (next(iter(self.tiers)), list(self.tiers)[-1]))
        number = int(largest["num_entities"])
        if number >= len(self.entity_names):
            raise ExportError(f"{base} has {number} entities, this run {len(self.entity_names)}: none has joined")
        hashes = fnv1a(self.entity_names[:number])
        shards = self.shards_of(0, number, hashes)
        self._check_names(base / smallest["tier"], shards)
        form = self.form(draft, len(shards))
        payload = payload_of(self._run(hash_shard, [(form, entities) for entities in shards], draft, self.threads))
        for name, facts in manifests.items():
            if facts["payload"] != payload[: len(facts["payload"])]:
                raise ExportError(
                    f"{base / name} has other vectors than the first {number} entities of this checkpoint: old rows "
                    "have moved in training, so tiers that were shipped do not stay valid; export in full"
                )
        self.base_payloads = {name: facts["payload"] for name, facts in manifests.items()}
        self.first_entity = number

    def _check_base(self, directory: Path, name: str, facts: Mapping[str, Any]) -> None:
        if facts["layout"] == "rows":
            raise ExportError(
                f"{directory} itself adds rows to another export: put these rows on that one; they will hold both"
            )
        dim = self.tiers[name]
        expected = {
            "dim": dim, "cuts": [cut for cut in self.cuts if cut <= dim], "precision": self.section.precision,
            "sharding": self.section.sharding, "shard_rows": self.section.shard_rows, "scorer": self.facts.scorer,
            "norm": self.facts.norm, "dims": [d for d in self.facts.dims if d <= dim],
            "reciprocal": self.facts.reciprocal,
        }  # fmt: skip
        for key, value in expected.items():
            if facts.get(key) != value:
                raise ExportError(
                    f"{directory}: its {key} is {facts.get(key)!r}, but that of the rows to put on it {value!r}"
                )

    def _check_names(self, directory: Path, shards: Sequence[Entities]) -> None:
        for number, entities in enumerate(shards):
            path = directory / shard_names_name(number, len(shards))
            stored, (data, offsets) = map_tensors(path), utf8(self.shard(number, entities).names)
            same = np.array_equal(stored.get("entity_offsets", ()), offsets)
            if not same or not np.array_equal(stored.get("entity_bytes", ()), data):
                raise ExportError(f"{path} names other entities than this run's graph: it does not extend that export")


def _in_threads(
    function: Callable[[Item, Advance], Result], items: Sequence[Item], advance: Advance, threads: int
) -> list[Result]:
    """Return the function's results in the order of the items; where one raises, the others end soon."""
    lock, failed = threading.Lock(), threading.Event()

    def told(count: int) -> None:
        if failed.is_set():
            raise _StoppedError
        with lock:
            advance(count)

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(function, item, told) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            failed.set()
            for future in futures:
                future.cancel()
    errors = [future.exception() for future in futures if not future.cancelled()]
    for error in errors:
        if error is not None and not isinstance(error, _StoppedError):
            raise error
    return [future.result() for future in futures]


class _StoppedError(Exception):
    """Another shard failed: this one ends, and nobody asks for its result."""


def _shards_by_hash(hashes: NDArray[np.uint64], shard_rows: int) -> NDArray[np.int32]:
    """Return the shard of each entity, int32 [len(hashes)]."""
    number = np.uint64(max(1, -(-len(hashes) // shard_rows)))
    return (hashes % number).astype(np.int32)


def _is_core(name: str) -> bool:
    return name.startswith("entities-") and name.endswith(".safetensors")


def _index(entities: Entities) -> slice | NDArray[np.int64]:
    return slice(entities.start, entities.stop) if isinstance(entities, range) else entities


def _exported_relations(source: TableSource, scorer: str, dim: int, exported: ExportedScorer) -> NDArray[np.float32]:
    """Return relation rows as tiers hold them: as trained, but RotatE's phases as (cos, sin)."""
    if scorer != "rotate":
        return np.ascontiguousarray(source.relations(dim * len(exported.relation_unit)))
    phases = source.relations(dim).astype(np.float64)
    turns = np.stack([np.cos(phases), np.sin(phases)], -1)
    return turns.reshape(len(phases), 2 * dim).astype(np.float32)


def _strings(names: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    """Return names as chunks of plain strings, at least one chunk."""
    chunked = names if isinstance(names, pa.ChunkedArray) else pa.chunked_array([names])
    chunked = chunked.cast(pa.string())
    return chunked if chunked.num_chunks else pa.chunked_array([pa.array([], pa.string())])
