"""Choosing what a job leaves open: `python -m medscale.search JOB --vary KEY=VALUE,VALUE ...` tries every combination.

Each trial is the job with other values, trained as any run is, and judged by its best validation MRR: the test split is
not looked at. Finished trials are kept as numbers (`search.json`), and the best one as a job file (`best.yaml`) that
`medscale train` takes.
"""

import argparse
import gc
import itertools
import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from medscale.checkpoint import changed_keys, committed, committed_steps, step_of
from medscale.config import Job
from medscale.errors import CheckpointError, ConfigError, NonFiniteError
from medscale.graph.reader import Graph
from medscale.jobfile import dump_job, job_to_mapping, load_job, with_values
from medscale.logs import console, log
from medscale.options import job_parser, run_command
from medscale.plan import plan, require_fit, size_of
from medscale.prepare import prepare
from medscale.seed import generator
from medscale.storage import run_lock, write_atomic, write_json
from medscale.train import time_limit, train
from medscale.trainer import Outcome

__all__ = ["Trial", "best_of", "combinations", "main", "search"]

#: what a search leaves in its directory, beside the run of a trial that is not finished
_TRIALS, _BEST = "search.json", "best.yaml"
#: the seconds of a trial that was interrupted
_CUT_OFF = "cut_off.json"
#: what is tried where nothing is said
_RATES = "optimizer.lr=0.0001,0.0005,0.001,0.01"
#: a comma that is not inside of a list
_BETWEEN_VALUES = re.compile(r",(?![^\[{]*[\]}])")


@dataclass(frozen=True)
class Trial:
    """One combination of values, and how good the model became."""

    #: key: value, as YAML has it
    values: Mapping[str, str]
    #: the best validation MRR, of `train.watch_dim` or the mean over all dims; None: it diverged, or never validated
    mrr: float | None
    #: the step that had it, and its MRR by dim
    best_step: int | None
    mrr_by_dim: Mapping[str, float]
    #: epochs validated
    epochs: int
    #: by the search's clock, with what it took before it was interrupted
    seconds: float
    #: "finished", "stopped early", "out of time" or "diverged"
    ending: str


_ENDINGS = {
    Outcome.FINISHED: "finished",
    Outcome.STOPPED_EARLY: "stopped early",
    Outcome.INTERRUPTED: "out of time",
}


def combinations(open_values: Mapping[str, Sequence[str]], number: int | None, seed: int) -> list[dict[str, str]]:
    """Return every combination of values, the last key's changing fastest; or `number` of them, drawn by the seed."""
    every = [dict(zip(open_values, chosen, strict=True)) for chosen in itertools.product(*open_values.values())]
    if number is None or number >= len(every):
        return every
    drawn = generator(seed, "search").choice(len(every), number, replace=False)
    return [every[index] for index in sorted(drawn)]


def search(
    job: Job, graph: Graph, directory: Path, chosen: Sequence[Mapping[str, str]], *, minutes: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[list[Trial], int | None]:  # fmt: skip
    """Try the job with each of the chosen values, but for those tried before; return all trials of the directory.

    `minutes`, by the clock on the wall or another, end a trial's training, which is then judged as it is. A trial that
    was cut off goes on from its newest step; it begins anew where its time is limited, and where it was killed outright
    and another clock than that on the wall tells the time. The second result is the number of the signal that ended the
    search early, if one did.

    Raises:
        ConfigError: the job never validates, or a value is wrong.
        CheckpointError: the directory holds the search of another job.
        RunLockedError: another search runs there.

    """
    if job.train.validate_every == 0:
        raise ConfigError(["train.validate_every: is 0, and trials are compared by validation MRR; allowed: 1 or more"])
    jobs = [with_values(job, values, job.name) for values in chosen]
    with run_lock(directory):
        trials = _trials_of(directory, job, minutes)
        for number, (values, tried) in enumerate(zip(chosen, jobs, strict=True), 1):
            if any(trial.values == values for trial in trials):
                continue
            log(f"trial {number} of {len(chosen)}: " + ", ".join(f"{key}={value}" for key, value in values.items()))
            # beside the other runs, where jobs find those that they grow out of or learn from
            run_directory = directory.with_name(f"{directory.name}-trial")
            trial, signal_number = _try(tried, graph, run_directory, values, minutes, clock, directory / _CUT_OFF)
            if trial is None:
                return trials, signal_number
            trials.append(trial)
            _write(directory, job, minutes, trials)
    return trials, None


def _try(
    job: Job, graph: Graph, run_directory: Path, values: Mapping[str, str], minutes: float | None,
    clock: Callable[[], float], cut_off: Path,
) -> tuple[Trial | None, int | None]:  # fmt: skip
    begun = run_directory / "job.yaml"
    # What was killed outright told no time: by the clock on the wall it counts from here on, by another all counts.
    unknown = clock is not time.monotonic and not cut_off.exists()
    if run_directory.exists() and (minutes is not None or unknown or not begun.exists() or load_job(begun) != job):
        shutil.rmtree(run_directory)
    goes_on = run_directory.exists() and cut_off.exists()
    start = clock() - (json.loads(cut_off.read_text())["seconds"] if goes_on else 0.0)
    cut_off.unlink(missing_ok=True)
    try:
        with time_limit(minutes, clock) as rang:
            outcome, signal_number = train(job, graph, run_directory)
        if outcome is Outcome.INTERRUPTED and not rang.is_set():
            write_json(cut_off, {"seconds": clock() - start})
            return None, signal_number or signal.SIGTERM
        progress = committed(run_directory, step_of(committed_steps(run_directory)[-1])).facts["progress"]
        ending = _ENDINGS[outcome]
    except NonFiniteError as error:
        log(str(error))
        progress, ending = {"best_mrr": None, "best_step": None, "validations": []}, "diverged"
    validations = progress["validations"]
    trial = Trial(
        dict(values), progress["best_mrr"], progress["best_step"],
        next((v["mrr"] for v in validations if v["step"] == progress["best_step"]), {}),
        validations[-1]["epoch"] if validations else 0, round(clock() - start, 1), ending,
    )  # fmt: skip
    # TorchRec's objects refer to each other in circles: tables would pile up, trial by trial.
    gc.collect()
    shutil.rmtree(run_directory)
    return trial, None


def _trials_of(directory: Path, job: Job, minutes: float | None) -> list[Trial]:
    path = directory / _TRIALS
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        trials = [Trial(**trial) for trial in found["trials"]]
        changed = changed_keys(found["job"], job_to_mapping(job))
        changed += [] if found["minutes"] == minutes else [f"minutes: {found['minutes']} -> {minutes}"]
    except (ValueError, TypeError, KeyError) as cause:
        raise CheckpointError(f"{path} cannot be read ({cause}); remove it to search anew") from None
    if changed:
        raise CheckpointError(
            f"{path} is the search of another job; it differs in {'; '.join(changed)}; change the job back, or give it "
            "another name"
        )
    return trials


def _write(directory: Path, job: Job, minutes: float | None, trials: Sequence[Trial]) -> None:
    best = best_of(trials)
    if best is not None:
        write_atomic(directory / _BEST, dump_job(with_values(job, best.values, job.name)).encode())
    found = {"job": job_to_mapping(job), "minutes": minutes, "trials": [asdict(trial) for trial in trials]}
    write_json(directory / _TRIALS, found)


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """Return the trial with the highest MRR, the first of equal ones; None if none was validated."""
    judged = [trial for trial in trials if trial.mrr is not None]
    return max(judged, key=lambda trial: trial.mrr or 0.0, default=None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = job_parser(
        "search",
        "Train the job with every combination of some keys' values and compare them by validation MRR; the best one is "
        "written as a job file. Trials are kept as numbers, not as checkpoints; the same command goes on where it "
        "stopped, and more values add trials.",
    )
    parser.add_argument(
        "--vary", action="append", default=[], metavar="KEY=VALUE,VALUE",
        help=f"values of a key to try; again for other keys (default: the paper's {_RATES})",
    )  # fmt: skip
    parser.add_argument("--trials", type=int, metavar="N", help="try so many combinations, drawn by the job's seed")
    parser.add_argument("--minutes", type=float, metavar="M", help="end each trial's training after so long")
    arguments = parser.parse_args(argv)
    open_values: dict[str, list[str]] = {}
    for words in arguments.vary or [_RATES]:
        key, equals, values = words.partition("=")
        if not equals or not all(_BETWEEN_VALUES.split(values)):
            parser.error(f"--vary {words}: allowed: KEY=VALUE,VALUE, such as optimizer.lr=0.1,0.03")
        open_values.setdefault(key, []).extend(value.strip() for value in _BETWEEN_VALUES.split(values))
    if arguments.trials is not None and arguments.trials < 1:
        parser.error("--trials must be at least 1")
    if arguments.minutes is not None and not arguments.minutes > 0:
        parser.error("--minutes must be above 0")
    return run_command(lambda: _main(arguments, open_values))


def _main(arguments: argparse.Namespace, open_values: Mapping[str, Sequence[str]]) -> int:
    job = load_job(arguments.job)
    chosen = combinations(open_values, arguments.trials, job.seed)
    for values in chosen:
        with_values(job, values, str(arguments.job))  # all mistakes before anything runs
    require_fit(job, plan(job, size_of(job, arguments.graphs_dir, arguments.data_dir)), arguments.runs_dir)
    graph = prepare(job, data_root=arguments.data_dir, graphs_root=arguments.graphs_dir)
    directory = arguments.runs_dir / f"{job.name}-search"
    trials, signal_number = search(job, graph, directory, chosen, minutes=arguments.minutes)
    if trials:
        _print(job, trials)
    if signal_number is not None:
        log("run the same command again to go on from there")
        return 128 + signal_number
    if best_of(trials) is None:
        log(f"{job.name}: no trial was validated: they diverged, or their time was over before")
        return NonFiniteError.exit_code
    log(f"medscale train {directory / _BEST} trains the best one")
    return 0


def _print(job: Job, trials: Sequence[Trial]) -> None:
    watched = "mean over all dims" if job.train.watch_dim is None else f"dim {job.train.watch_dim}"
    table = Table(title=f"{job.name}: {len(trials)} trials", caption=f"best validation MRR, {watched}; filtered")
    keys = sorted({key for trial in trials for key in trial.values})
    # What one tier likes best another may not: `optimizer.tier_factors` and the like give each its own.
    tiers = dict(sorted(job.model.tiers.items(), key=lambda tier: tier[1])) if len(job.model.tiers) > 1 else {}
    for heading in (*keys, "MRR", *tiers, "epochs", "seconds", "ending"):
        table.add_column(heading, justify="right")
    for trial in sorted(trials, key=lambda trial: -1.0 if trial.mrr is None else trial.mrr, reverse=True):
        mrr = "" if trial.mrr is None else f"{trial.mrr:.4f}"
        of_tiers = (trial.mrr_by_dim.get(str(dim)) for dim in tiers.values())
        by_tier = ("" if value is None else f"{value:.4f}" for value in of_tiers)
        figures = (mrr, *by_tier, f"{trial.epochs:,}", f"{trial.seconds:,.0f}", trial.ending)
        table.add_row(*(trial.values.get(key, "") for key in keys), *figures)
    console().print(table)


if __name__ == "__main__":
    sys.exit(main())
