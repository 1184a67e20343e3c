"""Checkpoints: committed whole or not at all, verified before a byte is used, never fewer than two.

A step is written by torch.distributed.checkpoint into `step-N.tmp`, with our manifest (bytes and SHA-256 of
every file) last; fsync, rename to `step-N`, fsync of the parent make it count. Reading goes the other way
round: manifest, sizes, hashes, and only then DCP, which would load flipped bits silently and unpickles its own
`.metadata`.
"""

import contextlib
import dataclasses
import itertools
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardMetadata
from torch.distributed.checkpoint.api import CheckpointException

from medscale.config import ModelSection
from medscale.errors import CheckpointError
from medscale.logs import log
from medscale.manifest import Manifest, parse_json, read_manifest, verify_files, write_manifest
from medscale.model.embedding import TableRows
from medscale.model.layout import Block, Layout, layout_of
from medscale.pieces import StoredRows
from medscale.storage import (
    TMP,
    commit_directory,
    fault_point,
    retire_directory,
    staging_directory,
    sweep_leftovers,
    write_json,
)
from medscale.workers import ALONE, Workers

__all__ = [
    "PIECE_BYTES",
    "Checkpoint",
    "ShardRows",
    "Tables",
    "changed_keys",
    "committed",
    "committed_directory",
    "committed_steps",
    "find_resumable",
    "first_rows",
    "layout_facts",
    "layout_from_facts",
    "load",
    "newest_checkpoint",
    "note_best",
    "open_tables",
    "retain",
    "save",
    "step_of",
    "verify",
]

FORMAT = 1
_STEP = re.compile(r"step-(\d{9,})")

#: bytes of a table that lie together in a checkpoint: what writing or reading it copies
PIECE_BYTES = 64 << 20
#: names the best step of a run
_BEST = "best.json"
#: DCP's files of a step lie in a folder of their own
_STATE = "state"


@dataclass(frozen=True)
class Checkpoint:
    """A committed step: where it lies, and what its manifest says."""

    directory: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Steps trained."""
        return int(self.manifest.facts["step"])

    @property
    def facts(self) -> Mapping[str, Any]:
        """Step, model, graph, job and progress, as saved."""
        return self.manifest.facts


def checkpoints_of(run_directory: Path) -> Path:
    """Return the folder that holds a run's steps."""
    return run_directory / "checkpoints"


def committed_steps(run_directory: Path) -> list[Path]:
    """Return the directories of committed steps, oldest first; their contents are not yet checked."""
    folder = checkpoints_of(run_directory)
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _STEP.fullmatch(p.name) and p.is_dir()), key=step_of)


def committed_directory(run_directory: Path, step: int) -> Path:
    """Return where a step lies once it is committed."""
    return checkpoints_of(run_directory) / f"step-{step:09d}"


def committed(run_directory: Path, step: int) -> Checkpoint:
    """Return a committed step that another worker has verified."""
    directory = committed_directory(run_directory, step)
    return Checkpoint(directory, read_manifest(directory, "checkpoint", FORMAT, CheckpointError))


def step_of(directory: Path) -> int:
    """Return the step that a committed directory is named for."""
    return int(directory.name.removeprefix("step-"))


def save(run_directory: Path, state: Mapping[str, Any], facts: Mapping[str, Any], workers: Workers = ALONE) -> Path:
    """Commit `state` (tensors, sharded or not, nested in mappings) as the step that `facts` names.

    A step that is committed already is left as it is: the same step of the same run has the same tensors. Every
    worker calls this and writes its shards; the leader commits, and all return when it has, or raise.

    Raises:
        CheckpointError: it could not be written (a full disk, say); the steps before it are untouched.

    """
    folder = checkpoints_of(run_directory)
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{facts['step']:09d}"
    # The leader's word counts: it may have committed this step before others look.
    if workers.told(final.exists()):
        return final
    with _draft_of(final, workers) as draft:
        with _agreement(final, workers), _quiet():
            dcp.save(_in_pieces(state), checkpoint_id=draft / _STATE)
        with _agreement(final, workers):
            if workers.leads:
                fault_point("after-shard")
                write_manifest(draft, "checkpoint", FORMAT, facts)
                commit_directory(draft, final)
    return final


def _in_pieces(value: Any) -> Any:
    """Cut sharded tensors by rows, wherever they are nested: DCP copies what lies together to write it, and to read."""
    if isinstance(value, Mapping):
        return {name: _in_pieces(inner) for name, inner in value.items()}
    return _cut(value) if isinstance(value, ShardedTensor) else value


def _cut(tensor: ShardedTensor) -> ShardedTensor:
    local = [
        Shard(shard.tensor[piece.shard_offsets[0] - shard.metadata.shard_offsets[0] :][: piece.shard_sizes[0]], piece)
        for shard in tensor.local_shards()
        for piece in _pieces(shard.metadata, shard.tensor.element_size())
    ]
    whole, number_bytes = tensor.metadata(), tensor.dtype.itemsize
    metadata = dataclasses.replace(
        whole, shards_metadata=[piece for shard in whole.shards_metadata for piece in _pieces(shard, number_bytes)]
    )
    return ShardedTensor._init_from_local_shards_and_global_metadata(local, metadata)


def first_rows(tensor: ShardedTensor, num_rows: int) -> ShardedTensor:
    """Return the first rows of a sharded tensor, sharing memory with it: a smaller table's loads into them."""

    def kept(shard: ShardMetadata) -> list[ShardMetadata]:
        rows = min(shard.shard_sizes[0], num_rows - shard.shard_offsets[0])
        sizes = [rows, *shard.shard_sizes[1:]]
        return [ShardMetadata(shard.shard_offsets, sizes, placement=shard.placement)] if rows > 0 else []

    whole = tensor.metadata()
    local = [Shard(s.tensor[: part.shard_sizes[0]], part) for s in tensor.local_shards() for part in kept(s.metadata)]
    metadata = dataclasses.replace(
        whole,
        shards_metadata=[part for shard in whole.shards_metadata for part in kept(shard)],
        size=torch.Size([num_rows, *whole.size[1:]]),
    )
    return ShardedTensor._init_from_local_shards_and_global_metadata(local, metadata)


def _pieces(shard: ShardMetadata, number_bytes: int) -> Iterator[ShardMetadata]:
    """Yield metadata of a shard's pieces."""
    (first, *rest), (num_rows, *widths) = shard.shard_offsets, shard.shard_sizes
    step = max(1, PIECE_BYTES // (number_bytes * math.prod(widths)))
    for start in range(0, num_rows, step):
        sizes = [min(step, num_rows - start), *widths]
        yield ShardMetadata([first + start, *rest], sizes, placement=shard.placement)


@contextlib.contextmanager
def _draft_of(final: Path, workers: Workers) -> Iterator[Path]:
    """Yield the directory that all workers write to; the leader makes it, and removes it when the block fails."""
    if workers.leads:
        with staging_directory(final) as draft:
            workers.wait()
            yield draft
    else:
        workers.wait()
        yield final.with_name(final.name + TMP)


@contextlib.contextmanager
def _agreement(final: Path, workers: Workers) -> Iterator[None]:
    """Run a block of every worker; fail on all where it fails on one.

    Raises:
        CheckpointError: it failed somewhere; names worker and cause.

    """
    failure: str | None = None
    try:
        yield
    except (OSError, CheckpointException) as cause:
        failure = _root_cause(cause)
    failures = {rank: text for rank, text in enumerate(workers.all_of(failure)) if text is not None}
    if failures:
        rank, text = next(iter(failures.items()))
        where = "" if workers.size == 1 else f"worker {rank}: "
        raise CheckpointError(f"{final} could not be written: {where}{text}; older steps are whole")


def _root_cause(error: BaseException) -> str:
    """Return what went wrong in words; DCP wraps each rank's error, with its traceback, in one of its own."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
    return str(error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what DCP says of itself: that it reads without a process group, as asked, and what it will deprecate."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        warnings.filterwarnings("ignore", message="Please use DTensor", category=FutureWarning)
        yield


def load(checkpoint: Checkpoint, state: dict[str, Any], *, collective: bool) -> None:
    """Fill the tensors of `state` in place from a verified checkpoint.

    Raises:
        CheckpointError: DCP cannot match the tensors.

    """
    try:
        with _quiet():
            dcp.load(state, checkpoint_id=checkpoint.directory / _STATE, no_dist=not collective)
    except (CheckpointException, OSError, RuntimeError, ValueError) as cause:
        raise CheckpointError(f"{checkpoint.directory} cannot be loaded: {_root_cause(cause)}") from cause


def verify(directory: Path) -> Checkpoint:
    """Check every byte of a committed step against its manifest.

    Raises:
        CheckpointError: anything is damaged, missing, extra, or from another step; names the file.

    """
    try:
        return _verified(directory)
    except FileNotFoundError as gone:
        raise CheckpointError(
            f"{gone.filename} went away while it was read: a running job retired it; try again"
        ) from None


def _verified(directory: Path) -> Checkpoint:
    manifest = read_manifest(directory, "checkpoint", FORMAT, CheckpointError)
    if directory.name != f"step-{manifest.facts.get('step', -1):09d}":
        raise CheckpointError(f"{directory} holds the files of step {manifest.facts.get('step')}: it was renamed")
    verify_files(directory, manifest, CheckpointError)
    return Checkpoint(directory, manifest)


def find_resumable(run_directory: Path, resume: str) -> Checkpoint | None:
    """Return the checkpoint to go on from, or None for a run directory that holds none.

    Raises:
        CheckpointError: the newest step is damaged, or `resume: never` meets steps. Never a silent fresh start.

    """
    sweep_leftovers(checkpoints_of(run_directory))
    steps = committed_steps(run_directory)
    folder = checkpoints_of(run_directory)
    if not steps and folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(
            f"{folder} holds no committed step, but other files, so this run cannot go on; move {run_directory} away "
            "to start afresh"
        )
    if not steps:
        return None
    if resume == "never":
        raise CheckpointError(
            f"{run_directory} already holds {steps[-1].name}; use checkpoint.resume: auto, or another job name"
        )
    if resume == "previous":
        return _previous(steps)
    try:
        return verify(steps[-1])
    except CheckpointError as damage:
        way_out = (
            f"to go on from {steps[-2].name}, run the same command with --resume previous"
            if len(steps) > 1
            else "no older step is left: move the run directory away to start afresh"
        )
        raise CheckpointError(f"{damage}; {way_out}") from None


def _previous(steps: list[Path]) -> Checkpoint:
    """Return the newest whole step before the newest one, and set aside every later one."""
    damage: list[str] = []
    for number in range(len(steps) - 2, -1, -1):
        try:
            checkpoint = verify(steps[number])
        except CheckpointError as cause:
            damage.append(str(cause))
            continue
        for later in steps[number + 1 :]:
            aside = _free_name(later.with_name(later.name + ".aside"))
            later.rename(aside)
            log(f"{later.name} is set aside as {aside.name}")
        return checkpoint
    why = "; ".join(damage) or "there is no other step"
    raise CheckpointError(f"no usable step is left before {steps[-1].name}: {why}")


def _free_name(path: Path) -> Path:
    """Return the path, or the first of path-2, path-3, ... that is not taken."""
    taken = {p.name for p in path.parent.iterdir()}
    names = (path.name if number == 1 else f"{path.name}-{number}" for number in itertools.count(1))
    return path.with_name(next(name for name in names if name not in taken))


def retain(run_directory: Path, keep: int, needed: Collection[int | None]) -> None:
    """Retire all but the newest `keep` steps and those needed; a step that cannot be deleted is a warning."""
    assert keep >= 2, "the newest step may be the one that a crash finds half-used"
    for directory in committed_steps(run_directory)[:-keep]:
        if step_of(directory) in needed:
            continue
        try:
            retire_directory(directory)
        except OSError as cause:
            log(f"warning: {directory} could not be deleted ({cause}); it stays")


def note_best(run_directory: Path, step: int | None, mrr: float | None) -> None:
    """Note the best step so far, or that there is none; it may be known only after later steps were committed."""
    if step is None:
        (run_directory / _BEST).unlink(missing_ok=True)
    else:
        write_json(run_directory / _BEST, {"step": step, "valid_mrr": mrr})


def newest_checkpoint(run_directory: Path, step: int | None = None) -> Path:
    """Return the directory of the best step of a run (by validation MRR), or of the newest, or of `step`.

    Raises:
        CheckpointError: there is none.

    """
    steps = {step_of(directory): directory for directory in committed_steps(run_directory)}
    if not steps:
        raise CheckpointError(f"{run_directory} holds no committed checkpoint; train the job first")
    if step is not None and step not in steps:
        raise CheckpointError(f"{run_directory} has no step {step}; it has {', '.join(p.name for p in steps.values())}")
    # A best step that is gone was set aside, and the run has not gone on since.
    best = _best_step(run_directory)
    return steps[step if step is not None else best if best in steps else max(steps)]


def _best_step(run_directory: Path) -> int | None:
    path = run_directory / _BEST
    if not path.exists():
        return None
    try:
        return int(parse_json(path.read_text(encoding="utf-8"))["step"])
    except (ValueError, TypeError, KeyError) as cause:
        raise CheckpointError(f"{path} cannot be read ({cause}); delete it to use the newest step") from None


class Tables:
    """The tables of a checkpoint, read without a process group, as they are asked for. It may be pickled."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.facts = checkpoint.facts
        self.layout: Layout = layout_from_facts(checkpoint.facts)

    def __reduce__(self) -> tuple[type["Tables"], tuple[Checkpoint]]:
        return Tables, (self.checkpoint,)

    def rows(self) -> TableRows:
        """Return the whole entity table."""
        return TableRows([self._read(b) for b in self.layout.blocks], self.layout.num_columns)

    @cached_property
    def relation_table(self) -> Tensor:
        """float32[rows, R]: the relation table."""
        layout = self.layout
        table = torch.empty(layout.num_relation_rows, layout.num_relation_columns)
        load(self.checkpoint, {"dense": {"relations": table}}, collective=False)
        return table

    def row_state(self, column: int) -> Tensor:
        """float32[E]: row-wise Adagrad's state of all rows in the block that holds a column.

        Raises:
            CheckpointError: the run had another optimizer.

        """
        self._require_rowwise_adagrad()
        (block,) = (b for b in self.layout.blocks if b.start <= column < b.start + b.width)
        state = torch.empty(self.layout.num_entities)
        load(self.checkpoint, {"fused": {f"{block.name}.momentum1": state}}, collective=False)
        return state

    def relation_state(self) -> Tensor:
        """float32[rows, R]: Adagrad's state of the relation table.

        Raises:
            CheckpointError: the run had another optimizer.

        """
        self._require_rowwise_adagrad()
        state = torch.empty_like(self.relation_table)
        load(self.checkpoint, {"dense_optimizer": {"sum": state}}, collective=False)
        return state

    def shard(self, part: slice, others: NDArray[np.int64]) -> "ShardRows":
        """Return the rows of a part of the entities, and single ones of others by id (sorted)."""
        start, stop, _ = part.indices(self.layout.num_entities)
        parts = [torch.from_numpy(self._stored.read(_key(b), start, stop)) for b in self.layout.blocks]
        single = torch.from_numpy(self.entity_rows(others, self.layout.num_columns))
        return ShardRows(TableRows(parts, self.layout.num_columns), start, torch.from_numpy(others), single)

    def entity_columns(self, start: int, stop: int, num_columns: int) -> NDArray[np.float32]:
        """Return the first columns of rows [start, stop), float32[stop - start, num_columns]; threads may ask at once.

        Raises:
            CheckpointError: the step went away meanwhile.

        """
        return self._columns(lambda table: self._stored.read(table, start, stop), stop - start, num_columns)

    def entity_rows(self, entities: NDArray[np.int64], num_columns: int) -> NDArray[np.float32]:
        """Return the first columns of rows by id (rising), float32[len(entities), num_columns], as `entity_columns`."""
        return self._columns(lambda table: self._stored.pick(table, entities), len(entities), num_columns)

    def relations(self, num_columns: int) -> NDArray[np.float32]:
        """Return the first `num_columns` columns of the relation table."""
        columns: NDArray[np.float32] = self.relation_table[:, :num_columns].contiguous().numpy()
        return columns

    def _columns(
        self, rows_of: Callable[[str], NDArray[np.float32]], num_rows: int, num_columns: int
    ) -> NDArray[np.float32]:
        columns = np.empty((num_rows, num_columns), np.float32)
        for block in self.layout.blocks:
            if block.start < num_columns:
                part = columns[:, block.start : block.start + block.width]
                part[:] = rows_of(_key(block))[:, : part.shape[1]]
        return columns

    def _require_rowwise_adagrad(self) -> None:
        kind = self.facts["job"]["optimizer"]["kind"]
        if kind != "rowwise_adagrad":
            raise CheckpointError(f"{self.checkpoint.directory} was trained by {kind}, not by rowwise_adagrad")

    @cached_property
    def _stored(self) -> StoredRows:
        widths = {_key(block): block.width for block in self.layout.blocks}
        return StoredRows(self.checkpoint.directory / _STATE, widths, self.layout.num_entities)

    def _read(self, block: Block) -> Tensor:
        rows = torch.empty(self.layout.num_entities, block.width)
        load(self.checkpoint, {"entities": {block.name: rows}}, collective=False)
        return rows


def _key(block: Block) -> str:
    """Return the name that DCP gives to the table of a block."""
    return f"entities.{block.name}"


@dataclass(frozen=True)
class ShardRows:
    """Some of the entities as candidates, and the rows that queries need wherever they lie."""

    rows: TableRows
    first: int
    #: int64[M], sorted
    others_M: Tensor
    others_MC: Tensor

    @property
    def candidates(self) -> range:
        """The entities whose rows are all here."""
        return range(self.first, self.first + self.rows.num_entities)

    def gather(self, entities: Tensor) -> Tensor:
        """Return rows [U, C] by id [U], which must be among `others_M`."""
        return self.others_MC[torch.searchsorted(self.others_M, entities)]

    def slice(self, start: int, stop: int) -> Tensor:
        """Return rows [stop - start, C] of candidates."""
        return self.rows.slice(start - self.first, stop - self.first)

    def to(self, device: torch.device) -> "ShardRows":
        """Return the rows on a device."""
        rows = TableRows([block.to(device) for block in self.rows.blocks], self.rows.num_columns)
        return ShardRows(rows, self.first, self.others_M.to(device), self.others_MC.to(device))


def open_tables(directory: Path) -> Tables:
    """Verify a committed step and open its tables.

    Raises:
        CheckpointError: it is damaged.

    """
    return Tables(verify(directory))


def layout_facts(layout: Layout, norm: str) -> dict[str, Any]:
    """Return what a checkpoint or an export must say so that its columns can be read."""
    return {
        "scorer": layout.scorer.name,
        "norm": norm,
        "dims": list(layout.dims),
        "tiers": dict(layout.tiers),
        "damping": list(layout.damping),
        "block_units": layout.block_units,
        "reciprocal": layout.reciprocal,
        "num_entities": layout.num_entities,
        "num_relations": layout.num_relations,
        "unit_columns": layout.scorer.unit_columns,
        "relation_unit_columns": layout.scorer.relation_unit_columns,
    }


def layout_from_facts(facts: Mapping[str, Any]) -> Layout:
    """Return the layout that `layout_facts` described."""
    section = ModelSection(
        scorer=facts["scorer"],
        norm=facts["norm"],
        dims=tuple(facts["dims"]),
        tiers=facts["tiers"],
        reciprocal=facts["reciprocal"],
        damping=tuple(facts["damping"]) or (1.0,),
        block_units=facts.get("block_units"),
    )
    return layout_of(section, facts["num_entities"], facts["num_relations"])


#: keys that may change between runs of one run directory: none of them touches what a step computes, but for
#: rounding (another device, other kernels, or another number of threads, add in another order)
MUTABLE_KEYS = frozenset({
    "train.epochs", "train.patience", "train.log_every", "train.validate_every", "train.valid_triples",
    "train.watch_dim", "train.validation_lag", "checkpoint.every_steps", "checkpoint.keep", "checkpoint.resume",
    "evaluate.split", "evaluate.max_triples", "evaluate.memory_mib", "runtime.device", "runtime.threads",
    "runtime.memory_gib", "runtime.kernels", "runtime.workers", "runtime.readers", "runtime.evaluators",
    "runtime.table_memory", "runtime.cache_fraction", "runtime.placement", "runtime.timeout_s", "graph.memory_mib",
    "graph.tasks", "export.layout", "export.precision", "export.sharding", "export.shard_rows", "export.formats",
    "export.tasks", "export.keep",
})  # fmt: skip


def changed_keys(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return `key: saved -> current` for every key that differs and must not; both are resolved jobs."""
    before, now = _flat(saved), _flat(current)
    keys = sorted((before.keys() | now.keys()) - MUTABLE_KEYS)
    # How a run would be extended is no part of it.
    if before.get("extend.run") is None and now.get("extend.run") is None:
        keys = [k for k in keys if not k.startswith("extend.")]
    # The end of a linear schedule is part of what every step computes.
    if now.get("optimizer.schedule") == "linear":
        keys.append("train.epochs")
    return [f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in keys if before.get(k) != now.get(k)]


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
