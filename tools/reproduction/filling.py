"""Filling cells: models are trained within their budget, others cropped out of one; what was measured is kept."""

import base64
import hashlib
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment
from numpy.typing import NDArray

from medscale.baselines.crops import arranged
from medscale.baselines.distillation import assistant_dim, chain, student
from medscale.checkpoint import changed_keys, committed, committed_steps, newest_checkpoint, open_tables, step_of
from medscale.config import Job
from medscale.errors import CheckpointError
from medscale.evaluate import PROTOCOL, rank_tables
from medscale.graph.known_triples import KnownTriples
from medscale.graph.reader import Graph
from medscale.jobfile import dump_job, job_to_mapping, load_job, parse_job, with_values
from medscale.logs import log
from medscale.model.encoder import encoder_of
from medscale.model.layout import Layout
from medscale.prepare import prepare
from medscale.ranking import Ranks, count_halves, records_of
from medscale.search import Trial, search
from medscale.storage import write_json
from medscale.train import time_limit, train
from medscale.trainer import Outcome, initial_scale
from reproduction.cells import (
    CROPS,
    DIMS,
    LARGEST,
    LESSONS,
    NUM_TRIALS,
    SHOWN,
    SIXTY_FOUR,
    STAGES,
    Cell,
    best_values,
    mean_mrr,
    rate_of,
    tries_of,
)

__all__ = ["CLOCK", "Reproduction", "Settings", "correct_answers", "curve_of", "cut_short", "figures_of", "minutes_of"]

#: budgets and times are of processor time, all threads together, so that other work on the machine takes little of it
#: (shared caches and memory make a second still worth up to a quarter less); on a GPU, whose work that does not count,
#: of the clock on the wall
CLOCK = time.monotonic if torch.cuda.is_available() else time.process_time

#: in the directory of a run that came to its end: what it took
_END = "trained.json"


@dataclass(frozen=True)
class Settings:
    """What every model of a table is given."""

    #: minutes of processor time
    budget: float
    #: at most, and those of each trial
    epochs: int
    trial_epochs: int

    def __str__(self) -> str:
        """As options of the command."""
        return f"--budget {self.budget:g} --epochs {self.epochs} --trial-epochs {self.trial_epochs}"


class Reproduction:
    """The cells of a directory: fills what is missing."""

    def __init__(
        self, out: Path, runs_dir: Path, data_dir: Path, budget: float, epochs: int | None, trial_epochs: int | None
    ) -> None:
        """Take directories, minutes of processor time, and epochs (default: what suits a cell)."""
        self.cells, self.runs_dir, self.data_dir = out / "cells", runs_dir, data_dir
        self.budget, self.epochs, self.trial_epochs = budget, epochs, trial_epochs
        self.cells.mkdir(parents=True, exist_ok=True)

    def settings(self, cell: Cell) -> Settings:
        """Return what a cell's model is given."""
        return Settings(self.budget, self.epochs or cell.epochs, self.trial_epochs or cell.trial_epochs)

    def found(self, cell: Cell) -> dict[str, Any] | None:
        """Return what was measured of a cell."""
        path = self.cells / f"{cell.name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def fill(self, cell: Cell) -> dict[str, Any]:
        """Train a cell's model, or crop the largest directly trained one; return what was measured, then or before.

        Raises:
            CheckpointError: it was trained before, with other settings, or as another job.

        """
        if (found := self.found(cell)) is not None:
            self._require_same(cell, found)
            return found
        if cell.method in CROPS:
            self._crop(cell)
        elif cell.method in LESSONS:
            self._teach(cell)
        else:
            self._write_run(cell, *self._tuned(cell.job, cell.name, self.settings(cell)))
        found = self.found(cell)
        assert found is not None
        return found

    def _require_same(self, cell: Cell, found: Mapping[str, Any]) -> None:
        differs = [
            f"of another {name}"
            for name, figures in found.get("made_of", {}).items()
            if (path := self.cells / f"{name}.json").exists() and figures_of(json.loads(path.read_text())) != figures
        ]
        # a crop has no settings but its model's
        if cell.method not in CROPS and (then := Settings(**found["settings"])) != (now := self.settings(cell)):
            differs.append(f"{then} -> {now}")
        if cell.method not in (*CROPS, *LESSONS):
            then_job = parse_job(found["job"], cell.name)
            job = cell.job(then_job.train.epochs)
            changes = changed_keys(job_to_mapping(then_job), job_to_mapping(job))
            tried = {*tries_of(job)[0], "optimizer.tier_factors"}
            differs += [change for change in changes if change.partition(":")[0] not in tried]
        if differs:
            raise CheckpointError(
                f"{self.cells / cell.name}.json was made otherwise: {'; '.join(differs)}; ask for what was, give "
                "another --out and --runs-dir, or remove it, and what is made of its model, to train it anew"
            )

    # -- training -----------------------------------------------------------------------------------------

    def _teach(self, cell: Cell) -> None:
        """Train a student of the largest directly trained model, and what stands between them."""
        assert cell.dim is not None
        method, teacher, teacher_dim, settings = LESSONS[cell.method], cell.teacher.name, LARGEST, self.settings(cell)
        self._run_of(cell.teacher)
        made_of = [cell.teacher]
        earlier, earlier_trials, cut_short = 0.0, 0.0, False

        def job_of(epochs: int, dim: int = cell.dim, name: str = cell.name) -> Job:
            direct = cell.job(epochs, dim)
            steps = epochs * -(-self._graph(direct).num_triples["train"] // direct.train.batch_size)
            stage = STAGES.get(method, 0)
            return student(method, direct, name, teacher, teacher_dim, stage_steps=round(stage * steps))

        if method == "iterde":
            # Those between have half the epochs, and the teacher's own learning rate.
            multiple = self._multiple(cell.teacher)
            for dim in chain(cell.dim, teacher_dim)[1:-1]:
                job = job_of(max(1, settings.epochs // 2), dim, f"{cell.name}_over_{dim}")
                job = with_values(job, rate_of(job, multiple), job.name)
                _, seconds, rang = self._trained(job, 1.1 * self.budget)
                earlier, teacher, teacher_dim, cut_short = earlier + seconds, job.name, dim, cut_short or rang
        elif method == "ta":
            between = [dim for dim in DIMS if cell.dim < dim < LARGEST] or [(cell.dim + LARGEST) // 20 * 10]
            of_dims = {dim: Cell(cell.dataset, cell.scorer, "DT", dim) for dim in (cell.dim, *between, LARGEST)}
            mrr_of = {dim: max(v["mrr"][str(dim)] for v in self.fill(c)["validations"]) for dim, c in of_dims.items()}
            teacher_dim = assistant_dim(mrr_of, cell.dim, teacher_dim)
            assistant = Cell(cell.dataset, cell.scorer, "BKD", teacher_dim)
            taught = self.fill(assistant)
            made_of.append(assistant)
            earlier, cut_short, teacher = taught["seconds"], taught["out_of_time"], self._run_of(assistant).name
            earlier_trials = sum(trial["seconds"] for trial in taught["trials"])
        job, seconds, out_of_time, trials = self._tuned(job_of, cell.name, settings)
        self._write_run(
            cell, job, seconds, out_of_time, trials, teacher=teacher, made_of=self._figures(made_of),
            earlier_seconds=round(earlier, 1), earlier_trial_seconds=round(earlier_trials, 1),
            earlier_out_of_time=cut_short,
        )  # fmt: skip

    def _multiple(self, cell: Cell) -> float:
        """Return the learning rate of a trained cell as a multiple of the size of its initial columns."""
        job = parse_job(self.fill(cell)["job"], cell.name)
        return job.optimizer.lr / initial_scale(job)

    def _tuned(
        self, job_of: Callable[[int], Job], name: str, settings: Settings
    ) -> tuple[Job, float, bool, list[dict[str, Any]]]:
        """Train with the best of all learning rates for as many epochs as are wanted and the budget has time for.

        `job_of` gives the job by epochs. Returns the job, the seconds, whether they ran out, and the trials.
        """
        trials, values = self._trials(job_of(settings.trial_epochs), name)
        # told in tenths, of which a trial on a toy graph has none
        seconds = max(0.1, statistics.median(trial.seconds for trial in trials if trial.mrr is not None))
        job = job_of(max(1, min(settings.epochs, int(60 * settings.budget / seconds * settings.trial_epochs))))
        watch_dim = job.train.watch_dim
        job, seconds, rang = self._trained(with_values(job, values, name), 1.1 * settings.budget)
        return job, seconds, rang or job.train.epochs < settings.epochs, [tried(trial, watch_dim) for trial in trials]

    def _trials(self, job: Job, name: str) -> tuple[list[Trial], dict[str, str]]:
        """Try a job's learning rates; return all trials, and what to train it with."""
        tries = tries_of(job)
        number = len(tries) if job.loss.kind == "softmax" else min(NUM_TRIALS, len(tries))
        while True:
            directory = self.runs_dir / f"{name}-search"
            trials, stopped = search(job, self._graph(job), directory, tries[:number], clock=CLOCK)
            if stopped is not None:
                sys.exit(128 + stopped)
            judged = [trial for trial in trials if trial.mrr is not None]
            if not judged:
                sys.exit(f"{name}: all trials diverged")
            best = max(judged, key=lambda trial: mean_mrr(trial, job.train.watch_dim))
            if best.values != tries[len(trials) - 1] or len(trials) == len(tries):
                return trials, best_values(job, trials)
            number = len(trials) + 1

    def _is_begun(self, job: Job) -> bool:
        """Whether the run directory is this very job's."""
        begun = self.runs_dir / job.name / "job.yaml"
        return begun.exists() and load_job(begun) == job

    def _trained(self, job: Job, minutes: float | None) -> tuple[Job, float, bool]:
        """Train a job until its time is over, or find it trained; return it, the seconds, and whether they ran out.

        A job fits its budget by its trials' pace, which is forgiven a tenth. What was interrupted goes on; what was
        killed outright told no time, and begins anew.
        """
        run_directory, budget = self.runs_dir / job.name, self.budget
        end, cut_off = run_directory / _END, run_directory / "cut_off.json"
        same = self._is_begun(job)
        trained = json.loads(end.read_text()) if same and end.exists() else None
        if trained is not None and trained["budget"] == budget:
            return job, trained["seconds"], trained["out_of_time"]
        earlier = json.loads(cut_off.read_text())["seconds"] if same and cut_off.exists() else 0.0
        if run_directory.exists() and not earlier:
            shutil.rmtree(run_directory)
        cut_off.unlink(missing_ok=True)
        start = CLOCK() - earlier
        with time_limit(None if minutes is None else minutes - earlier / 60, CLOCK) as rang:
            outcome, number = train(job, self._graph(job), run_directory)
        seconds = CLOCK() - start
        if outcome is Outcome.INTERRUPTED and not rang.is_set():
            write_json(cut_off, {"seconds": seconds})
            sys.exit(128 + (number or 15))
        write_json(end, {"budget": budget, "seconds": seconds, "out_of_time": rang.is_set()})
        return job, seconds, rang.is_set()

    def _write_run(
        self, cell: Cell, job: Job, seconds: float, out_of_time: bool, trials: list[dict[str, Any]], **more: Any
    ) -> None:
        run_directory = self.runs_dir / job.name
        graph, tables = self._graph(job), open_tables(newest_checkpoint(run_directory))
        newest = committed(run_directory, step_of(committed_steps(run_directory)[-1]))
        ranks = rank_tables(job, graph, tables, graph.triples("test"), "test")
        if cell.method in LESSONS:  # the last level is the teacher
            ranks = Ranks(ranks.dims[:-1], ranks.head[:-1], ranks.tail[:-1])
        self._write(cell, ranks, {
            "job": dump_job(job), "settings": asdict(self.settings(cell)), "seconds": round(seconds, 1),
            "out_of_time": out_of_time, "step": tables.facts["step"],
            "parameters_million": {str(d): _num_parameters(job, graph, tables.layout, d) / 1e6 for d in ranks.dims},
            "validations": newest.facts["progress"]["validations"], "trials": trials, **more,
        })  # fmt: skip

    # -- cropping -----------------------------------------------------------------------------------------

    def _crop(self, cell: Cell) -> None:
        largest = cell.teacher
        directory = self._run_of(largest)
        job = parse_job(self.fill(largest)["job"], largest.name)
        graph, tables = self._graph(job), open_tables(newest_checkpoint(directory))
        triples = graph.triples("test")
        start = CLOCK()
        rows_EC = tables.rows().slice(0, graph.num_entities)
        model = arranged(
            CROPS[cell.method], job, rows_EC, tables.relation_table, tables.layout, graph.triples("valid")
        ).cropped(SIXTY_FOUR)
        seconds = CLOCK() - start
        known = KnownTriples.of_graph(graph, about=triples)
        halves_2nT = count_halves(triples, model.table(), model.relations_RC, model.layout, known)
        ranks = Ranks.of_halves(model.layout.dims, halves_2nT)
        self._write(cell, ranks, {"made_of": self._figures([largest]), "seconds": round(seconds, 1)})

    def vectors(self, cell: Cell, dim: int) -> tuple[Graph, NDArray[np.float32]]:
        """Return the graph, and the entities' first columns [E, C] of a cell's model of a dim, trained if need be."""
        largest = cell.teacher if cell.method in CROPS else cell
        directory = self._run_of(largest)
        job = parse_job(self.fill(largest)["job"], largest.name)
        graph, tables = self._graph(job), open_tables(newest_checkpoint(directory))
        rows_EC = tables.rows().slice(0, graph.num_entities)
        if cell.method in CROPS:
            valid = graph.triples("valid")
            rows_EC = arranged(CROPS[cell.method], job, rows_EC, tables.relation_table, tables.layout, valid).rows_EC
        columns_EC: NDArray[np.float32] = rows_EC[:, : dim * tables.layout.scorer.unit_columns].numpy()
        return graph, columns_EC

    # -- both ---------------------------------------------------------------------------------------------

    def _figures(self, cells: Sequence[Cell]) -> dict[str, str]:
        """Return the names of cells that another is made of, and which figures they had then."""
        return {cell.name: figures_of(self.fill(cell)) for cell in cells}

    def _graph(self, job: Job) -> Graph:
        return prepare(job, data_root=self.data_dir, graphs_root=self.runs_dir / "graphs")

    def _run_of(self, cell: Cell) -> Path:
        """Return the run directory of a cell that others need: what was measured may be there without its model."""
        job = parse_job(self.fill(cell)["job"], cell.name)
        run_directory = self.runs_dir / cell.name
        if not (self._is_begun(job) and (run_directory / _END).exists()):
            if cell.method in LESSONS:
                self._run_of(cell.teacher)
            log(f"{cell.name}: trained anew, for its model is not under {self.runs_dir}, and others are made of it")
            self._trained(job, None)  # whose epochs are what its budget allowed
        return run_directory

    def _write(self, cell: Cell, ranks: Ranks, measured: Mapping[str, Any]) -> None:
        records = field_records(ranks)
        write_json(self.cells / f"{cell.name}.json", {
            "environment": environment(f"python tools/reproduce.py (cell {cell.name})", len(os.sched_getaffinity(0))),
            "dataset": cell.dataset, "scorer": cell.scorer, "method": cell.method, "dim": cell.dim,
            "protocol": PROTOCOL, **measured, "records": records, "answered": answered(ranks),
        })  # fmt: skip
        log(
            f"{cell.name}: "
            + ", ".join(f"{r['mrr']:.3f} @{r['dim']}" for r in records if cell.dim or r["dim"] in SHOWN)
        )


def figures_of(found: Mapping[str, Any]) -> str:
    """Return a short hash of a model's figures on test, which differ where the model does."""
    return hashlib.sha256(json.dumps(found["records"]).encode()).hexdigest()[:12]


def tried(trial: Trial, watch_dim: int | None) -> dict[str, Any]:
    """Return what a trial tried, and how good it was on validation; None where it diverged."""
    mrr = None if trial.mrr is None else round(mean_mrr(trial, watch_dim), 4)
    by_dim = {dim: round(value, 4) for dim, value in trial.mrr_by_dim.items() if int(dim) in SHOWN}
    value = " ".join(value for key, value in trial.values.items() if key != "optimizer.relation_lr")  # which goes along
    return {"value": value, "mrr": mrr, "mrr_by_dim": by_dim, "seconds": trial.seconds}


def _num_parameters(job: Job, graph: Graph, layout: Layout, dim: int) -> int:
    """Return the numbers that a sub-model of a job is made of."""
    encoder = encoder_of(job.encoder, graph, layout.num_columns, 1.0, job.seed, torch.device("cpu"))
    if encoder is None:
        return layout.num_parameters(dim)
    return encoder.num_parameters + layout.num_relation_rows * layout.num_relation_columns


def field_records(ranks: Ranks) -> list[dict[str, Any]]:
    """Return figures per dim by the field's protocol, both sides."""
    wanted = ("dim", "mrr", "hits@1", "hits@3", "hits@10", "mean_rank", "num_queries")
    records = (r for r in records_of(ranks, "test") if (r["protocol"], r["side"]) == ("field", "both"))
    return [{key: record[key] for key in wanted} for record in records]


def answered(ranks: Ranks) -> dict[str, str]:
    """Return, per dim that tables show, which queries are answered among the first ten: bits, in base 64."""
    correct_nQ = ranks.of("both") <= 10
    return {
        str(dim): base64.b64encode(np.packbits(correct_Q).tobytes()).decode()
        for dim, correct_Q in zip(ranks.dims, correct_nQ, strict=True)
        if dim in DIMS
    }


def correct_answers(found: Mapping[str, Any]) -> dict[int, NDArray[np.bool_]]:
    """Return what `answered` wrote: bool [Q] by dim."""
    number = found["records"][0]["num_queries"]
    return {
        int(dim): np.unpackbits(np.frombuffer(base64.b64decode(bits), np.uint8), count=number).astype(bool)
        for dim, bits in found["answered"].items()
    }


def minutes_of(found: Mapping[str, Any]) -> float:
    """Return the minutes that a cell's model took, with what stood between it and its teacher."""
    return float(found["seconds"] + found.get("earlier_seconds", 0)) / 60


def cut_short(found: Mapping[str, Any]) -> str:
    """Say how a budget cut a model short: epochs that its pace did not allow, or a training that was stopped."""
    if not found.get("out_of_time"):
        return "its teacher" if found.get("earlier_out_of_time") else ""
    epochs, done = parse_job(found["job"], found["method"]).train.epochs, found["validations"][-1]["epoch"]
    how = {"fewer epochs": epochs < found["settings"]["epochs"], "stopped": done < epochs}
    return ", ".join(name for name, is_so in how.items() if is_so)


def curve_of(found: Mapping[str, Any], dim: int) -> tuple[list[float], list[float]]:
    """Return minutes and validation MRR of a dim; epochs are taken to be equally long."""
    validations = [v for v in found["validations"] if str(dim) in v["mrr"]]
    per_epoch = minutes_of(found) / found["validations"][-1]["epoch"]
    return [v["epoch"] * per_epoch for v in validations], [v["mrr"][str(dim)] for v in validations]
