"""Cuts a table into tiers: every tier's columns, names and constants as files, published in one move.

`export` in a run directory is a link to one version under `export-versions/`. A new version is written beside
it, made durable, and takes the link over by one rename, so a reader sees the old export or the new one.
`medscale.runtime.tier` describes the files.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medscale.errors import ConfigError, ExportError
from medscale.logs import Advance
from medscale.manifest import write_manifest
from medscale.runtime.scoring import ExportedScorer, exported_scorer
from medscale.runtime.shards import safetensors_header
from medscale.runtime.tier import TIER_FORMAT, TIER_KIND, shard_name
from medscale.storage import (
    commit_directory,
    fault_point,
    fsync_directory,
    retire_directory,
    run_lock,
    safe_join,
    staging_directory,
    sweep_leftovers,
)

__all__ = ["CHUNK_BYTES", "ModelFacts", "TableSource", "WrittenTier", "check_tiers", "write_export"]

#: rows of one safetensors shard
SHARD_ROWS = 1_000_000
#: bytes of rows held at a time; also decides the row groups of the Parquet files
CHUNK_BYTES = 32 << 20

_FLOAT32 = np.dtype("<f4")


class TableSource(Protocol):
    """Where the rows of a trained model come from, a few at a time."""

    def entity_columns(self, start: int, stop: int, num_columns: int) -> NDArray[np.float32]:
        """Return the first columns of entities [start, stop), float32[stop - start, num_columns]."""
        ...

    def relations(self, num_columns: int) -> NDArray[np.float32]:
        """Return the first columns of all relation rows, inverses included, as they are trained."""
        ...


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
class WrittenTier:
    """One tier as it was written."""

    name: str
    #: units
    dim: int
    #: reals of an entity row
    columns: int
    #: of all files
    bytes: int
    #: number of files, the manifest included
    files: int


def check_tiers(tiers: Mapping[str, int], dims: tuple[int, ...]) -> None:
    """Check that every tier is a sub-model.

    Raises:
        ConfigError: no tiers, or dims that the model was not trained for; lists each.

    """
    allowed = ", ".join(map(str, dims))
    problems = [
        f"tier {name}: dim {dim} is not one of the checkpoint's sub-models ({allowed})"
        for name, dim in tiers.items()
        if dim not in dims
    ]
    if problems or not tiers:
        raise ConfigError(problems or [f"no tiers to export: name at least one, such as server={dims[-1]}"])


def write_export(
    source: TableSource,
    entity_names: pa.Array | pa.ChunkedArray,
    relation_names: pa.Array | pa.ChunkedArray,
    facts: ModelFacts,
    tiers: Mapping[str, int],
    directory: Path,
    *,
    shard_rows: int = SHARD_ROWS,
    chunk_bytes: int = CHUNK_BYTES,
    advance: Advance | None = None,
) -> tuple[WrittenTier, ...]:
    """Write every tier and publish them together as `directory`, smallest tier first.

    Names are string arrays whose index is the id. Rows are read once, `chunk_bytes` at a time, for all tiers;
    equal tables, names, facts and sizes give equal bytes. `advance` is told of every chunk's rows.

    Raises:
        ConfigError: a tier is not a sub-model.
        ExportError: `directory` exists and is not a published export; names occur twice; columns are not
            finite; or names and tables differ in number.
        RunLockedError: another export of this run is being written.

    """
    check_tiers(tiers, facts.dims)
    tiers = dict(sorted(tiers.items(), key=lambda item: (item[1], item[0])))
    if directory.exists() and not directory.is_symlink():
        raise ExportError(f"{directory} was not made by an export: move it away, then export again")
    versions = directory.with_name(f"{directory.name}-versions")
    with run_lock(versions):
        sweep_leftovers(versions)
        final = _next_version(versions, facts.step)
        with staging_directory(final) as draft:
            writing = _Export(source, entity_names, relation_names, facts, tiers, shard_rows)
            written = writing.write(draft, chunk_bytes, advance or (lambda rows: None))
            commit_directory(draft, final)
        _point(directory, final)
        _retire_others(versions, final)
    return written


def _next_version(versions: Path, step: int) -> Path:
    """Return the path of a version that sorts after all there are."""
    numbers = [int(match[1]) for path in versions.iterdir() if (match := re.fullmatch(r"(\d+)-step-\d+", path.name))]
    return versions / f"{max(numbers, default=0) + 1:06d}-step-{step}"


def _point(link: Path, version: Path) -> None:
    """Make `link` lead to `version`, in one step for whoever looks."""
    draft = link.with_name(f"{link.name}.tmp")
    draft.unlink(missing_ok=True)
    draft.symlink_to(version.relative_to(link.parent), target_is_directory=True)
    draft.replace(link)
    fsync_directory(link.parent)


def _retire_others(versions: Path, current: Path) -> None:
    for path in sorted(versions.iterdir()):
        if path.is_dir() and path != current:
            # The new export stands whatever happens here; the next one tries again.
            with contextlib.suppress(OSError):
                retire_directory(path)


class _Export:
    """One pass over the tables that fills all tiers of an export."""

    def __init__(
        self,
        source: TableSource,
        entity_names: pa.Array | pa.ChunkedArray,
        relation_names: pa.Array | pa.ChunkedArray,
        facts: ModelFacts,
        tiers: Mapping[str, int],
        shard_rows: int,
    ) -> None:
        self.source = source
        self.entity_names = entity_names
        self.relation_names = relation_names
        self.facts = facts
        self.tiers = tiers
        self.shard_rows = shard_rows
        self.scorer = exported_scorer(facts.scorer, facts.norm)
        self.num_entities = len(entity_names)
        self.columns = {name: dim * len(self.scorer.entity_unit) for name, dim in tiers.items()}

    def write(self, draft: Path, chunk_bytes: int, advance: Advance) -> tuple[WrittenTier, ...]:
        for name in self.tiers:
            safe_join(draft, name).mkdir()
        self._write_entities(draft, chunk_bytes, advance)
        names = _name_tensors("entity", self.entity_names) | _name_tensors("relation", self.relation_names)
        for name, dim in self.tiers.items():
            _write_tensors(draft / name / "names.safetensors", names)
            self._write_relations(draft / name, dim)
        return tuple(self._finish(draft / name, name) for name in self.tiers)

    def _write_entities(self, draft: Path, chunk_bytes: int, advance: Advance) -> None:
        widest = max(self.columns.values())
        step = max(1, chunk_bytes // (widest * _FLOAT32.itemsize))
        with contextlib.ExitStack() as stack:
            writers = [
                stack.enter_context(_EntityFiles(draft / name, columns, self.num_entities, self.shard_rows))
                for name, columns in self.columns.items()
            ]
            for start, stop in _chunks(self.num_entities, self.shard_rows, step):
                rows = self.source.entity_columns(start, stop, widest)
                assert (rows.shape, rows.dtype) == ((stop - start, widest), _FLOAT32)
                _check_finite(rows, start, "entity")
                names = self.entity_names[start:stop]
                for writer in writers:
                    writer.write(start, rows, names)
                advance(stop - start)

    def _write_relations(self, directory: Path, dim: int) -> None:
        rows = _exported_relations(self.source, self.facts.scorer, dim, self.scorer)
        _check_finite(rows, 0, "relation")
        number, halves = len(self.relation_names), 2 if self.facts.reciprocal else 1
        if len(rows) != number * halves:
            raise ExportError(
                f"the checkpoint has {len(rows)} relation rows, the graph {number} relations "
                f"({'with' if halves == 2 else 'without'} inverses): they do not belong together"
            )
        _write_tensors(directory / "relations.safetensors", {"vectors": rows})
        columns = {
            "id": pa.array(np.tile(np.arange(number, dtype=np.int64), halves)),
            "name": pa.concat_arrays(_strings(self.relation_names).chunks * halves),
            "inverse": pa.array(np.arange(len(rows)) >= number),
            "vector": _fixed_size_list(rows),
        }
        table = pa.table(columns)
        with _parquet(directory / "relations.parquet", table.schema) as file:
            file.write_table(table)

    def _finish(self, directory: Path, name: str) -> WrittenTier:
        dim = self.tiers[name]
        manifest = write_manifest(directory, TIER_KIND, TIER_FORMAT, self._tier_facts(name, dim))
        total = sum(path.stat().st_size for path in directory.iterdir())
        return WrittenTier(name, dim, self.columns[name], total, len(manifest.files) + 1)

    def _tier_facts(self, name: str, dim: int) -> dict[str, Any]:
        entity_unit, relation_unit = self.scorer.entity_unit, self.scorer.relation_unit
        levels = [d for d in self.facts.dims if d <= dim]
        return asdict(self.facts) | {
            "tier": name,
            "dim": dim,
            "tiers": dict(self.tiers),
            "dims": levels,
            "damping": list(self.facts.damping[: len(levels) - 1]),
            "units": {"entity": list(entity_unit), "relation": list(relation_unit)},
            "unit_columns": len(entity_unit),
            "relation_unit_columns": len(relation_unit),
            "columns": dim * len(entity_unit),
            "relation_columns": dim * len(relation_unit),
            "dtype": "float32",
            "num_entities": self.num_entities,
            "num_relations": len(self.relation_names),
            "shard_rows": self.shard_rows,
        }


class _EntityFiles:
    """One tier's entity files, filled row by row: safetensors shards, and a Parquet file with names."""

    def __init__(self, directory: Path, columns: int, num_entities: int, shard_rows: int) -> None:
        self.directory = directory
        self.columns = columns
        self.num_entities = num_entities
        self.shard_rows = shard_rows
        self.shard: BinaryIO | None = None
        vector = pa.list_(pa.float32(), columns)
        self.schema = pa.schema([("id", pa.int64()), ("name", pa.string()), ("vector", vector)])
        self.parquet = _parquet(directory / "entities.parquet", self.schema)

    def __enter__(self) -> "_EntityFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_shard()
        self.parquet.close()

    def write(self, start: int, rows: NDArray[np.float32], names: pa.Array | pa.ChunkedArray) -> None:
        """Append rows, which begin at id `start` and lie within one shard."""
        if start % self.shard_rows == 0:
            self._open_shard(start // self.shard_rows)
        crop = np.ascontiguousarray(rows[:, : self.columns])
        assert self.shard is not None
        self.shard.write(crop.data)
        ids = pa.array(np.arange(start, start + len(rows), dtype=np.int64))
        text = pa.concat_arrays(_strings(names).chunks)
        self.parquet.write_table(pa.table([ids, text, _fixed_size_list(crop)], schema=self.schema))

    def _open_shard(self, index: int) -> None:
        self._close_shard()
        count = -(-self.num_entities // self.shard_rows)
        rows = min(self.shard_rows, self.num_entities - index * self.shard_rows)
        self.shard = (self.directory / shard_name(index, count)).open("xb")
        self.shard.write(safetensors_header({"vectors": (_FLOAT32, (rows, self.columns))}))

    def _close_shard(self) -> None:
        if self.shard is not None:
            self.shard.close()
            fault_point("after-shard")
            self.shard = None


def _chunks(rows: int, shard_rows: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of at most `step` rows, none of which crosses a shard's end."""
    for shard in range(0, rows, shard_rows):
        end = min(shard + shard_rows, rows)
        for start in range(shard, end, step):
            yield start, min(start + step, end)


def _exported_relations(source: TableSource, scorer: str, dim: int, exported: ExportedScorer) -> NDArray[np.float32]:
    """Return relation rows as tiers hold them: as trained, but RotatE's phases as (cos, sin)."""
    if scorer != "rotate":
        return np.ascontiguousarray(source.relations(dim * len(exported.relation_unit)))
    phases = source.relations(dim).astype(np.float64)
    turns = np.stack([np.cos(phases), np.sin(phases)], -1)
    return turns.reshape(len(phases), 2 * dim).astype(np.float32)


def _check_finite(rows: NDArray[np.float32], start: int, what: str) -> None:
    broken = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if broken.size:
        raise ExportError(
            f"{what} {start + int(broken[0])} has a column that is NaN or infinite: the checkpoint cannot be "
            "exported; resume from the one before it"
        )


def _name_tensors(what: str, names: pa.Array | pa.ChunkedArray) -> dict[str, NDArray[Any]]:
    """Return the order (int64), offsets (int64) and bytes (uint8) of names; see `runtime.names`."""
    text = _strings(names).cast(pa.large_string())
    order = pc.sort_indices(text).to_numpy().astype(np.int64)
    in_order = text.take(pa.array(order))
    twice = pc.equal(in_order[1:], in_order[:-1]).to_numpy().nonzero()[0]
    if twice.size:
        raise ExportError(f"the graph has the {what} name {in_order[int(twice[0])].as_py()!r} more than once")
    lengths = pc.binary_length(text).to_numpy().astype(np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    data = np.concatenate([_bytes_of(chunk) for chunk in text.chunks])
    return {f"{what}_order": order, f"{what}_offsets": offsets, f"{what}_bytes": data}


def _strings(names: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    """Return names as chunks of plain strings, at least one chunk."""
    chunked = names if isinstance(names, pa.ChunkedArray) else pa.chunked_array([names])
    chunked = chunked.cast(pa.string())
    return chunked if chunked.num_chunks else pa.chunked_array([pa.array([], pa.string())])


def _bytes_of(chunk: pa.LargeStringArray) -> NDArray[np.uint8]:
    """Return the UTF-8 bytes of a chunk's strings, one after the other."""
    _, offsets, data = chunk.buffers()
    ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
    if data is None or ends[0] == ends[-1]:
        return np.zeros(0, np.uint8)
    return np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]


def _write_tensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write a safetensors file; wider types first, so that each tensor begins where its type may."""
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    kinds = {name: (array.dtype, array.shape) for name, array in ordered.items()}
    with path.open("xb") as file:
        file.write(safetensors_header(kinds))
        for array in ordered.values():
            file.write(np.ascontiguousarray(array).data)
    fault_point("after-shard")


def _fixed_size_list(rows: NDArray[np.float32]) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])


def _parquet(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    # Flipped bits pass unseen without page checksums. Trained columns do not compress; names do.
    return pq.ParquetWriter(
        path,
        schema,
        compression={"id": "zstd", "name": "zstd"},
        use_dictionary=False,
        write_statistics=["id", "name"],
        write_page_checksum=True,
    )
