"""The training loop.

Nothing in it has hidden state: a step's batch, negatives and sub-models are pure functions of (seed, step), so a
run that goes on from a checkpoint repeats an uninterrupted one bit for bit on a CPU.
"""

import contextlib
import enum
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from medscale import errors
from medscale.batches.corruption import CorruptionBatch, CorruptionBatches
from medscale.batches.partitions import Feed, PartitionReader
from medscale.batches.queries import QueryBatch, QueryBatches, query_table
from medscale.checkpoint import (
    Checkpoint,
    Tables,
    changed_keys,
    committed,
    committed_steps,
    find_resumable,
    first_rows,
    layout_facts,
    load,
    newest_checkpoint,
    note_best,
    retain,
    save,
    step_of,
    verify,
)
from medscale.config import DISTANCES, Job
from medscale.distributed import choose_threads, give_back_freed_memory
from medscale.errors import CheckpointError, GraphError, MedscaleError
from medscale.finite import require_finite_gradients, require_finite_terms
from medscale.graph.known_triples import KnownTriples
from medscale.graph.reader import Graph
from medscale.jobfile import dump_job, job_to_mapping
from medscale.lineage import lesson_of, lineage_of, old_sizes, teachers_unit
from medscale.logs import log
from medscale.metrics import Display, RunLog, training_display
from medscale.model.embedding import EntityTable, initial_relations
from medscale.model.encoder import encoder_of
from medscale.model.layout import layout_of
from medscale.objective import Objective, Terms
from medscale.optimizer import Optimizers, fused_optimizer, learning_rate_factor
from medscale.pulse import naming_the_silent
from medscale.sharding import placement_of
from medscale.storage import fault_point, write_atomic
from medscale.telemetry import collective_milliseconds, memory_mib
from medscale.traffic import bytes_per_step
from medscale.validation import Evaluators, Validation, count_committed, mrr_by_dim, watched_mrr
from medscale.workers import ALONE, Workers

__all__ = ["Outcome", "Progress", "Trainer", "batches_of", "initial_scale", "require_same_run", "train_worker"]


#: seconds that evaluators are waited for at a time
_PATIENCE_S = 2.0


class Outcome(enum.Enum):
    """Why training ended."""

    FINISHED = "all epochs are done"
    STOPPED_EARLY = "validation MRR no longer rises"
    INTERRUPTED = "a signal asked to stop"


@dataclass
class Progress:
    """What a checkpoint knows of a run beside its tensors."""

    step: int = 0
    best_mrr: float | None = None
    best_step: int | None = None
    #: validations since the best one
    stale: int = 0
    #: the validation whose result does not count yet: {"step", "mrr": {dim: MRR}, or None while evaluators rank}
    waiting: dict[str, Any] | None = None
    #: one record per validation: {"step", "epoch", "mrr": {dim: MRR}}
    validations: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """One run of a job on one graph: model, batches, optimizers, progress."""

    def __init__(
        self, job: Job, graph: Graph, run_directory: Path, device: torch.device, workers: Workers = ALONE,
        *, stop_wanted: Callable[[], bool] | None = None, feed: Feed | None = None,
        evaluators: Evaluators | None = None,
    ) -> None:  # fmt: skip
        self.job, self.graph, self.run_directory, self.device = job, graph, run_directory, device
        self.workers = workers
        self.layout = layout_of(job.model, graph.num_entities, graph.num_relations)
        self.placement = placement_of(self.layout, job.runtime)
        #: what this run grew out of, as its checkpoints tell; see `lineage.lineage_of`
        self.lineage: Mapping[str, Any] | None = None
        num_frozen, frozen_relations = old_sizes(graph) if job.freezes else (0, 0)
        self.table = EntityTable(
            self.layout,
            *fused_optimizer(job.optimizer, device),
            device=device,
            workers=workers,
            placement=self.placement,
            num_frozen=num_frozen,
            tier_factors=job.optimizer.tier_factors,
        )
        self.relations = torch.nn.Parameter(
            torch.empty(self.layout.num_relation_rows, self.layout.num_relation_columns, device=device)
        )
        self.objective = Objective(job, self.layout, device, workers)
        #: composes the rows that are trained; the table then holds what it composed when it was last saved or ranked
        self.encoder = encoder_of(job.encoder, graph, self.layout.num_columns, initial_scale(job), job.seed, device)
        self.optimizers = Optimizers(
            job.optimizer, self.table, self.relations, self.objective.scaling.values, job.med.weights_lr,
            self.layout.relation_rows_of(frozen_relations), self.encoder, job.encoder.lr,
        )  # fmt: skip
        self.validate_every = _validate_every(job, graph)
        self.batches = batches_of(job, graph, workers, feed)
        self.total_steps = job.train.epochs * self.batches.steps_per_epoch
        self.progress = Progress()
        self.validation = Validation(job, graph, self.layout, workers)
        self.evaluators = evaluators
        #: seconds that steps have waited for their batches since the last one that was logged
        self._waited = 0.0
        #: the signal that asked to stop
        self.signal_number: int | None = None
        self._stop_wanted = stop_wanted

    # -- beginning ----------------------------------------------------------------------------------------

    def initialise(self) -> None:
        """Draw the initial model."""
        scale = initial_scale(self.job)
        self.table.initialise(self.job.seed, scale)
        self.relations.data.copy_(initial_relations(self.layout, self.job.seed, scale))

    def seat(self, teacher: Tables) -> None:
        """Take over the rows of the run that teaches as the last level's columns; the student's stay as drawn.

        Distances come in the job's units. (Relations move columns by as much in TransE, and turn or stretch them else.)

        Raises:
            CheckpointError: its model does not fit beside the student, or is of another graph.

        """
        self.lineage = lesson_of(self.job, self.graph, teacher)
        start, relation_start = self._first_of_teacher()
        unit = teachers_unit(self.job, teacher)
        relation_unit = unit if self.layout.scorer.name == "transe" else 1.0
        self.table.fill(start, lambda *part: unit * teacher.entity_columns(*part))
        number = self.relations.shape[1] - relation_start
        self.relations.data[:, relation_start:] = relation_unit * teacher.relation_table[:, :number]
        if self.job.distill.learns_after is not None:
            # It goes on at the pace that it had come to; without its state it would leap away. Its gradients by larger
            # columns are smaller.
            self.table.fill_state(start, lambda column: teacher.row_state(column) / unit**2)
            sums = teacher.relation_state()[:, :number] / relation_unit**2
            self.optimizers.dense_state()["sum"][:, relation_start:] = sums

    def grow(self, parent: Checkpoint) -> None:
        """Take over the rows of a verified checkpoint of the run that this one grows out of; new rows stay as drawn.

        Adagrad's state of the rows comes along, if both runs use the same. Adam's begins anew: it counts its steps for
        all rows together.

        Raises:
            CheckpointError: the parent has another model, or is not of the graph that this run's grew out of.

        """
        self.lineage = lineage_of(self.job, self.graph, parent)
        num_entities, num_relations = old_sizes(self.graph)

        def old(tables: Mapping[str, ShardedTensor]) -> dict[str, ShardedTensor]:
            return {name: first_rows(table, num_entities) for name, table in tables.items()}

        # Inverse relations lie behind all relations, so the rows of old ones are not the first of this table.
        rows = self.layout.relation_rows_of(num_relations)
        here = [self.relations.data]
        if parent.facts["job"]["optimizer"]["kind"] == self.job.optimizer.kind != "adam":
            here.append(self.optimizers.dense_state()["sum"])
        before = [torch.empty_like(table[: len(rows)]) for table in here]
        state: dict[str, Any] = {
            "entities": old(self.table.weights()),
            "dense": {"relations": before[0], "scaling": self.objective.scaling.values.data},
        }
        if len(here) > 1:
            state |= {"fused": old(self.table.optimizer_state()), "dense_optimizer": {"sum": before[1]}}
        load(parent, {name: tensors for name, tensors in state.items() if tensors}, collective=True)
        for table, old_rows in zip(here, before, strict=True):
            table[rows] = old_rows

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take over tables, optimizer state and progress of a verified checkpoint.

        Raises:
            CheckpointError: it belongs to another job or graph; lists every key that differs.

        """
        require_same_run(checkpoint, self.job, self.graph)
        load(checkpoint, self._state(), collective=True)
        self.lineage = checkpoint.facts.get("lineage")
        self.progress = Progress(**checkpoint.facts["progress"])
        self.table.set_optimizer_step(self.progress.step)
        best = self.progress.best_step
        if best is not None and best not in map(step_of, committed_steps(self.run_directory)):
            # The best step was retired after this one was saved, and this run then went back to it.
            self.progress.best_mrr = self.progress.best_step = None
        if self.workers.leads:
            # Steps after this one may have been better, and are gone or will come again.
            note_best(self.run_directory, self.progress.best_step, self.progress.best_mrr)

    # -- the loop -----------------------------------------------------------------------------------------

    def fit(self) -> Outcome:
        """Train until the epochs are done, quality no longer rises, or a signal asks to stop."""
        steps_per_epoch = self.batches.steps_per_epoch
        outcome = Outcome.FINISHED
        with (
            contextlib.closing(self._run_log()) as run_log,
            training_display(self.total_steps, steps_per_epoch) as display,
            self._signals(),
        ):
            self._settle(run_log, display)
            if self._stale():
                return Outcome.STOPPED_EARLY
            clock, trained = time.monotonic(), 0.0
            losses: Mapping[str, float] = {}
            for batch in self._prefetched():
                step = self.progress.step + 1
                logged = self._logged(step)
                with collective_milliseconds(wanted=logged and self.workers.size > 1) as collectives:
                    terms = self.train_step(batch)
                trained += batch.num_triples
                rate = trained / (time.monotonic() - clock)
                if logged or display.due():
                    losses = terms.means() if terms.whole else losses
                    display.update(step, rate, losses)
                if logged:
                    spent = self._spent(len(batch.entities_U), collectives)
                    run_log.write("train", step, {**self._described(terms), "triples_per_s": round(rate, 1), **spent})
                    if self.workers.size > 1:
                        give_back_freed_memory()
                    clock, trained = time.monotonic(), 0.0
                if self._validation_due():
                    self._settle(run_log, display, now=True)
                    self._validate()
                    clock, trained = time.monotonic(), 0.0
                self._settle(run_log, display)
                if self._save_due():
                    self.save()
                if self._asked_to_stop():
                    self.save()
                    outcome = Outcome.INTERRUPTED
                    break
                if self._stale():
                    outcome = Outcome.STOPPED_EARLY
                    break
        return outcome

    def train_step(self, batch: CorruptionBatch | QueryBatch) -> Terms:
        """Do one update; return the terms of all workers, whole in the first step and in those that are logged.

        Raises:
            NonFiniteError: the loss or a gradient is not finite, on whichever worker; nothing was updated.

        """
        step = self.progress.step
        self.optimizers.set_rates(learning_rate_factor(self.job.optimizer, step, self.total_steps))
        looked_up_UC = (self.encoder or self.table.rows)(batch.entities_U)
        # The update of the tables is fused into their backward pass, so the guard stands between the two halves.
        rows = self.objective.rows(looked_up_UC)
        share: Terms = self.objective(batch, rows, self.relations, step, losses=step == 0 or self._logged(step + 1))
        terms = share.over(self.workers)
        require_finite_terms(step + 1, share, terms, self.layout, self.workers)
        share.total.backward()
        require_finite_gradients(step + 1, self._summed_gradients(rows.gradient()), terms, self.layout, self.workers)
        looked_up_UC.backward(rows.gradient())
        self.optimizers.step_dense()
        self.objective.scaling.clamp()
        self.progress.step += 1
        fault_point("step")
        return terms

    # -- during training ----------------------------------------------------------------------------------

    def save(self) -> None:
        """Commit a checkpoint of this step, unless there is one, and retire old ones."""
        facts = {
            "step": self.progress.step,
            "job_name": self.job.name,
            "job": job_to_mapping(self.job),
            "graph_name": self.graph.name,
            "graph_sha256": self.graph.sha256,
            "progress": asdict(self.progress),
            **layout_facts(self.layout, self.job.model.norm),
            **({"lineage": self.lineage} if self.lineage else {}),
        }
        self._compose()
        save(self.run_directory, self._state(), facts, self.workers)
        if self.workers.leads:
            waiting = self.progress.waiting or {}
            retain(self.run_directory, self.job.checkpoint.keep, {self.progress.best_step, waiting.get("step")})

    def frozen_sha256(self) -> str:
        """Return a hash of the rows that stay as they are, of this worker's part."""
        frozen_relations = self.relations.data[self.optimizers.frozen].cpu().numpy()
        return self.table.sha256(self.table.num_frozen) + hashlib.sha256(frozen_relations.data).hexdigest()

    def _state(self) -> dict[str, Any]:
        """Return every tensor of the run that this worker knows of, sharing memory."""
        state: dict[str, Any] = {
            "entities": self.table.weights(),
            "fused": self.table.optimizer_state(),
            "dense": {"relations": self.relations.data, "scaling": self.objective.scaling.values.data},
            "dense_optimizer": self.optimizers.dense_state(),
            "encoder": self.optimizers.encoder_state(),
        }
        # A worker that holds no block has no fused state, and DCP takes an empty mapping for a tensor that is missing.
        return {name: tensors for name, tensors in state.items() if tensors}

    def _compose(self) -> None:
        """Fill the table with the rows that an encoder composes now."""
        if self.encoder is not None:
            self.table.fill(0, self.encoder.all_columns)

    def _validate(self) -> None:
        """Rank the validation triples with the model of this step, or commit it for evaluators to rank with."""
        step = self.progress.step
        assert self.progress.waiting is None, "results count before the next validation"
        if self.evaluators is None:
            start = time.monotonic()
            self._compose()
            mrr = self.validation.mrr(self.table.rows_to_rank(), self.relations.data)
            self.progress.waiting = {"step": step, "mrr": mrr, "seconds": time.monotonic() - start}
        else:
            self.progress.waiting = {"step": step, "mrr": None}
            self.save()

    def _settle(self, run_log: RunLog, display: Display, *, now: bool = False) -> None:
        """Let the waiting validation's result count, if its step has come, or `now`; wait for evaluators if need be."""
        progress, waiting = self.progress, self.progress.waiting
        if waiting is None:
            return
        step, mrr = waiting["step"], waiting["mrr"]
        if mrr is None and self.evaluators is not None and self.workers.leads:
            self.evaluators.begin(step)
        if not now and progress.step < min(step + self.job.train.validation_lag, self.total_steps):
            return
        start = time.monotonic()
        if mrr is None:
            mrr = self._evaluated(step)
            waiting["seconds"] = time.monotonic() - start
        seconds = round(waiting["seconds"], 2)
        watched = watched_mrr(mrr, self.job.train.watch_dim)
        progress.waiting = None
        if progress.best_mrr is None or watched > progress.best_mrr:
            progress.best_mrr, progress.best_step, progress.stale = watched, step, 0
            if self.workers.leads:
                note_best(self.run_directory, step, watched)
        else:
            progress.stale += 1
        epoch = step // self.batches.steps_per_epoch
        progress.validations.append({"step": step, "epoch": epoch, "mrr": mrr})
        run_log.write("valid", step, {"epoch": epoch, "mrr": mrr, "seconds": seconds})
        display.validated(*self._told(step, mrr, seconds))

    def _evaluated(self, step: int) -> dict[str, float]:
        """Return the MRR that evaluators find for a committed step; without them the workers rank with it."""
        if self.evaluators is None:
            parts = self.workers.rank, self.workers.size
            counted = torch.from_numpy(count_committed(self.job, self.graph, self.run_directory, step, *parts))
            return mrr_by_dim(self.layout.dims, self.workers.sum(counted.to(self.device)).cpu().numpy())
        # All wait together, a little at a time: ranking may take longer than a worker is waited for.
        while not self.workers.told(self.workers.leads and self.evaluators.done(_PATIENCE_S)):
            pass
        mrr, failure = None, None
        if self.workers.leads:
            try:
                mrr = mrr_by_dim(self.layout.dims, self.evaluators.counted())
            except MedscaleError as cause:
                failure = [type(cause).__name__, str(cause)]
        mrr, failure = self.workers.told([mrr, failure])
        if failure is not None:
            name, message = failure
            raise getattr(errors, name)(message)
        return mrr  # type: ignore[no-any-return]

    def _told(self, step: int, mrr: Mapping[str, float], seconds: float) -> tuple[str, str]:
        """Return (a line, a few words) about a validation."""
        (smallest, low), (largest, high) = ((dim, mrr[str(dim)]) for dim in (self.layout.dims[0], self.layout.dims[-1]))
        words = f"valid MRR {low:.4f} @{smallest} {high:.4f} @{largest}"
        mean = sum(mrr.values()) / len(mrr)
        epoch = step // self.batches.steps_per_epoch
        return f"epoch {epoch}  step {step:,}  {words}  mean {mean:.4f}  (training stood still {seconds:.1f} s)", words

    def _run_log(self) -> RunLog:
        waiting = self.progress.waiting or {}
        return RunLog(self.run_directory, self.progress.step, waiting.get("step"), leads=self.workers.leads)

    def _described(self, terms: Terms) -> Mapping[str, Any]:
        hard = dict(zip(map(str, terms.dims), (round(v, 6) for v in terms.hard.tolist()), strict=True))
        scaling = {}
        if self.job.med.weights == "learnable":
            scaling = dict(zip(("w1", "w2", "w3"), self.objective.scaling.values.tolist(), strict=True))
        epoch = (self.progress.step - 1) // self.batches.steps_per_epoch + 1
        return {"epoch": epoch, **terms.means(), **scaling, "hard_by_dim": hard}

    def _spent(self, num_rows: int, collectives: dict[str, float]) -> dict[str, Any]:
        """Return what this step, or all since the last that was logged, cost each worker, by rank. Collective."""
        own = {"batch_wait_s": round(self._waited, 4), "rows": num_rows, **memory_mib(self.device)}
        own |= {f"{kind}_ms": milliseconds for kind, milliseconds in collectives.items()}
        self._waited = 0.0
        by_rank = list(enumerate(self.workers.all_of(own)))
        spent = {name: {str(rank): each.get(name, 0.0) for rank, each in by_rank} for name in own}
        sent = bytes_per_step(self.layout, self.placement, [each["rows"] for _, each in by_rank])
        spent["sent_mib"] = {str(rank): round(traffic.total / 2**20, 3) for rank, traffic in enumerate(sent)}
        return {**spent, **self.batches.described()}

    def _prefetched(self) -> Iterator[CorruptionBatch | QueryBatch]:
        """Yield the remaining batches, each prepared by a thread while the one before is trained on."""
        if self.progress.step >= self.total_steps:
            return
        with ThreadPoolExecutor(1) as pool:
            prepare: Callable[[int], CorruptionBatch | QueryBatch] = self.batches.batch
            coming = pool.submit(prepare, self.progress.step)
            for step in range(self.progress.step, self.total_steps):
                start = time.monotonic()
                batch = coming.result()
                self._waited += time.monotonic() - start
                if step + 1 < self.total_steps:
                    coming = pool.submit(prepare, step + 1)
                yield batch.to(self.device)

    def _asked_to_stop(self) -> bool:
        """Whether someone asks to stop: whichever worker heard it, all stop after the same step."""
        wanted = self.signal_number is not None or (self._stop_wanted is not None and self._stop_wanted())
        return bool(self.workers.where(flag=wanted))

    def _first_of_teacher(self) -> tuple[int, int]:
        """Return where the teacher's columns begin, of entities and of relations."""
        scorer, units = self.layout.scorer, self.layout.dims[-2]
        return units * scorer.unit_columns, units * scorer.relation_unit_columns

    def _summed_gradients(self, of_entities_UC: Tensor) -> dict[str, Tensor]:
        """Add up the gradients of the parameters that every worker keeps; return all gradients by name."""
        if self.job.keeps_teacher(self.progress.step) and self.relations.grad is not None:
            # Without weight decay or momentum of their own, numbers with a gradient of +0 keep every bit.
            start, relation_start = self._first_of_teacher()
            of_entities_UC[:, start:], self.relations.grad[:, relation_start:] = 0.0, 0.0
        gradients = {"entities": of_entities_UC}
        for name, parameter in (("relations", self.relations), ("scaling", self.objective.scaling.values)):
            if parameter.requires_grad:
                gradients[name] = parameter.grad = self.workers.sum(
                    torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                )
        return gradients

    def _due(self, every: int) -> bool:
        return every > 0 and self.progress.step % every == 0

    def _save_due(self) -> bool:
        if self.progress.step == self.total_steps or self._validation_due():
            return True
        return self._due(self.job.checkpoint.every_steps or self.batches.steps_per_epoch)

    def _validation_due(self) -> bool:
        """Whether to validate now: every so many epochs, and at the end, which may be the best."""
        if not self.validate_every:
            return False
        last = self.progress.step == self.total_steps
        return last or self._due(self.validate_every * self.batches.steps_per_epoch)

    def _logged(self, step: int) -> bool:
        """Whether a line of metrics.jsonl tells of a step; counted from 1."""
        return step % self.job.train.log_every == 0 or step == self.total_steps

    def _stale(self) -> bool:
        patience = self.job.train.patience
        return patience is not None and self.progress.stale >= patience

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn the first Ctrl-C or SIGTERM into a request that the loop honours after its step.

        Only a process's main thread hears signals; elsewhere (Ray's workers) `stop_wanted` takes their place.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request(number: int, frame: FrameType | None) -> None:
            if self.signal_number is not None:
                raise KeyboardInterrupt
            self.signal_number = number
            # Printing may be what the signal came in the middle of, and must not be entered twice.
            name = signal.Signals(number).name
            os.write(2, f"{name}: saving after this step; once more ends at once, unsaved\n".encode())

        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def require_same_run(checkpoint: Checkpoint, job: Job, graph: Graph) -> None:
    """Refuse a checkpoint that is not of this job and graph.

    Raises:
        CheckpointError: lists every key that differs.

    """
    changed = changed_keys(checkpoint.facts["job"], job_to_mapping(job))
    if checkpoint.facts["graph_sha256"] != graph.sha256:
        changed.append(f"graph: {graph.directory} is not the graph that was trained on")
    if changed:
        raise CheckpointError(
            f"{checkpoint.directory} was trained by another job; it differs in " + "; ".join(changed)
            + "; change the job back, or give it another name"
        )  # fmt: skip


def train_worker(
    job: Job, graph: Graph, run_directory: Path, device: torch.device, workers: Workers, resume: str,
    *, local_workers: int = 1, stop_wanted: Callable[[], bool] | None = None, feed: Feed | None = None,
    evaluators: Evaluators | None = None,
) -> tuple[Outcome, int | None]:  # fmt: skip
    """Do one worker's part of a run, in its process group; the only worker's part is all of it.

    `local_workers` share this machine's cores; `stop_wanted` is asked after each step, beside signals. `feed` brings
    training triples (default: this worker reads them), `evaluators` validate (default: the workers do). Returns why
    training ended, and the number of the signal that asked for it, if this worker got one.

    Raises:
        CheckpointError, NonFiniteError: on every worker, whichever found it.
        WorkerError: another worker died or hangs.

    """
    threads = choose_threads(job.runtime, local_workers)
    trainer = Trainer(
        job, graph, run_directory, device, workers, stop_wanted=stop_wanted, feed=feed, evaluators=evaluators
    )
    with naming_the_silent(run_directory / "workers", workers, lambda: trainer.progress.step):
        checkpoint = _found(run_directory, lambda: find_resumable(run_directory, resume), workers)
        if checkpoint is None:
            if (run_directory / "metrics.jsonl").exists():
                log(f"{run_directory} was begun before, but holds no checkpoint: starting at step 0")
            trainer.initialise()
            if job.extend.run is not None:
                parent = _found_source(job.extend.run, job.extend.step, run_directory, workers)
                trainer.grow(parent)
                log(f"growing out of {parent.directory}; its rows are {job.extend.rows}")
            if job.distill.teacher is not None:
                teacher = Tables(_found_source(job.distill.teacher, job.distill.step, run_directory, workers))
                trainer.seat(teacher)
                log(f"learning from {teacher.checkpoint.directory}")
        else:
            trainer.resume(checkpoint)
            log(f"going on from {checkpoint.directory.name}")
        if workers.leads:
            write_atomic(run_directory / "job.yaml", dump_job(job).encode())
        count = "" if workers.size == 1 else f"{workers.size} workers with "
        log(
            f"training {job.name}: {graph.num_triples[job.trained_split]:,} triples, {graph.num_entities:,} entities, "
            f"{len(job.model.dims)} sub-models up to {job.model.dims[-1]} units, {trainer.total_steps:,} steps "
            f"on {device.type}, {count}{threads} threads"
        )
        frozen = trainer.frozen_sha256() if job.freezes else None
        outcome = trainer.fit()
        assert frozen is None or trainer.frozen_sha256() == frozen, "a frozen row moved"
    log(f"training ended at step {trainer.progress.step:,}: {outcome.value}")
    return outcome, trainer.signal_number


def _found(run_directory: Path, find: Callable[[], Checkpoint | None], workers: Workers) -> Checkpoint | None:
    """Return the checkpoint of a run to start from: the leader finds and verifies it, and tells the others."""
    checkpoint, failure = None, None
    if workers.leads:
        try:
            checkpoint = find()
        except CheckpointError as cause:
            failure = str(cause)
    step, failure = workers.told([checkpoint and checkpoint.step, failure])
    if failure is not None:
        raise CheckpointError(failure)
    if checkpoint is None and step is not None:
        checkpoint = committed(run_directory, step)
    return checkpoint


def _found_source(run: str, step: int | None, run_directory: Path, workers: Workers) -> Checkpoint:
    """Return the checkpoint of another run that this one begins with."""
    directory = run_directory.parent / run
    source = _found(directory, lambda: verify(newest_checkpoint(directory, step)), workers)
    assert source is not None
    return source


def _validate_every(job: Job, graph: Graph) -> int:
    """Return the epochs between validations; 0 where there is nothing to validate on.

    Raises:
        GraphError: the job wants to stop early, but no triple can tell when.

    """
    if graph.num_triples["valid"]:
        return job.train.validate_every
    if job.train.patience is not None:
        raise GraphError(
            f"{graph.directory} has no validation triples, which train.patience needs; give graph.valid, or "
            "graph.valid_fraction"
        )
    if job.train.validate_every:
        log(f"{graph.name} has no validation triples: training goes on without validating")
    return 0


def batches_of(
    job: Job, graph: Graph, workers: Workers = ALONE, feed: Feed | None = None
) -> CorruptionBatches | QueryBatches:
    """Return the batches that a job's loss trains on; `feed` brings the triples of binary losses, default: read here.

    Raises:
        GraphError: there are no training triples.

    """
    split = job.trained_split
    if not graph.num_triples.get(split):
        raise GraphError(f"{graph.directory} has no training triples{'' if split == 'train' else ' of new names'}")
    if job.loss.kind == "softmax":
        table = query_table(
            graph.triples(split), graph.num_relations, reciprocal=job.model.reciprocal, max_tails=job.train.max_tails
        )
        return QueryBatches(table, graph.num_entities, job.negatives, job.train.batch_size, job.seed, workers)
    known = None
    if job.negatives.filter_known:
        known = KnownTriples.of_graph(graph, ["train"])
    return CorruptionBatches(
        feed=feed or Feed.of(PartitionReader(graph, job.seed, split=split)), num_entities=graph.num_entities,
        num_relations=graph.num_relations, section=job.negatives, batch_size=job.train.batch_size,
        reciprocal=job.model.reciprocal, seed=job.seed, known=known, workers=workers,
    )  # fmt: skip


def initial_scale(job: Job) -> float:
    """Return the size of the initial columns, such that every prefix starts with scores of a sane size.

    Distances: half-width (margin + 2) / d_n (Sun et al., 2019), so distances start near the margin. Softmax
    over products: 0.001, where all scores start equal. Binary losses over products: d_n^(-1/6), which gives
    scores of the largest sub-model, sums of products of three, a size near 1, and those of smaller ones less.
    """
    if job.model.init_scale is not None:
        return job.model.init_scale
    largest = job.model.dims[-1]
    if job.model.scorer in DISTANCES:
        return (job.loss.margin + 2) / largest
    # what an encoder composes is multiplied by this, and has no use for a factor near 0
    starts_equal = job.loss.kind == "softmax" and job.encoder.kind == "none"
    return 1e-3 if starts_equal else float(largest ** (-1 / 6))
