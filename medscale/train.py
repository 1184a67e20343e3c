"""The whole job: `python -m medscale.train JOB` prepares the graph, trains, evaluates and exports.

With `--extend FILES` it does so for a run that grows out of the job's own by new triples.
"""

import argparse
import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from medscale.config import Job
from medscale.distributed import choose_device, process_group
from medscale.evaluate import evaluate, print_table
from medscale.export import export_run
from medscale.extend import extended_job, tell_change
from medscale.graph.reader import Graph
from medscale.jobfile import load_job
from medscale.logs import log
from medscale.model.kernels.library import library
from medscale.options import job_parser, run_command
from medscale.plan import plan, require_fit, size_of
from medscale.prepare import prepare
from medscale.storage import run_lock
from medscale.trainer import Outcome, train_worker

__all__ = ["main", "time_limit", "train"]


def train(job: Job, graph: Graph, run_directory: Path, *, resume: str | None = None) -> tuple[Outcome, int | None]:
    """Train a job on a prepared graph into its run directory, going on from a checkpoint where there is one.

    One worker trains in this process, several in processes of Ray's. `resume` overrides the job's checkpoint.resume
    for this once. Returns why training ended, and the number of the signal that asked for it, if one did.

    Raises:
        RunLockedError: another process writes to this run directory.
        CheckpointError: the checkpoint is damaged or of another job.
        NonFiniteError: training diverged; the last checkpoint stands.
        WorkerError: a worker died or hung, more often than Ray replaces it.

    """
    resume = resume or job.checkpoint.resume
    with run_lock(run_directory):
        if max(job.runtime.workers, job.runtime.readers + 1, job.runtime.evaluators + 1) > 1:
            # Imported here: one worker alone needs no Ray.
            from medscale.launch import train_on_ray

            return train_on_ray(job, graph, run_directory, resume)
        device = choose_device(job.runtime)
        with process_group(device) as workers:
            return train_worker(job, graph, run_directory, device, workers, resume)


@contextlib.contextmanager
def time_limit(minutes: float | None, clock: Callable[[], float] = time.monotonic) -> Iterator[threading.Event]:
    """Ask a `train` inside of the block to save and stop after some minutes; yields what tells whether it was asked.

    `clock` tells the seconds: that on the wall, or `time.process_time`, which other work on the machine does not hurry.
    """
    rang, over = threading.Event(), threading.Event()
    end = clock() + 60 * (minutes or 0)

    def watch() -> None:
        while not over.wait(min(1.0, max(0.0, end - clock()))):
            if clock() >= end:
                rang.set()
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watcher = threading.Thread(target=watch, name="time limit", daemon=True)
    if minutes is not None:
        watcher.start()
    try:
        yield rang
    finally:
        over.set()
        if minutes is not None:
            watcher.join()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = job_parser(
        "train",
        "Run a whole job: prepare its graph the first time, train all sub-models at once (going on from the newest "
        "checkpoint), evaluate each, and export the tiers.",
    )
    parser.add_argument("--resume", choices=("auto", "previous", "never"), help="overrides the job's checkpoint.resume")
    growth = parser.add_argument_group(
        "growth",
        "A new run begins with the vectors of the job's run, and adds entities, relations and triples. The job's key "
        "extend.rows says whether old vectors stay as they are. The same command again goes on with that run.",
    )
    growth.add_argument(
        "--extend",
        nargs="+",
        metavar="FILE",
        help="files of new triples, relative to the data root and of the form of the job's graph.train",
    )
    growth.add_argument("--name", help="name of the new run (default: NAME-extended-1, or the next free number)")
    growth.add_argument("--step", type=int, metavar="N", help="checkpoint to begin with (default: the best one)")
    arguments = parser.parse_args(argv)
    if arguments.extend is None and (arguments.name is not None or arguments.step is not None):
        parser.error("--name and --step go with --extend")
    return run_command(lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    job = load_job(arguments.job)
    if arguments.extend is not None:
        job = extended_job(
            job, arguments.extend, name=arguments.name, step=arguments.step, runs_dir=arguments.runs_dir,
            graphs_dir=arguments.graphs_dir, data_root=arguments.data_dir,
        )  # fmt: skip
        log(f"extending {job.extend.run}, step {job.extend.step:,}: {arguments.runs_dir / job.name}")
    # What the graph will hold can be known before it is built, so a job that cannot fit is refused first.
    size = size_of(job, arguments.graphs_dir, arguments.data_dir)
    require_fit(job, plan(job, size), arguments.runs_dir)
    if job.runtime.workers == 1 and job.runtime.kernels == "auto" and choose_device(job.runtime).type == "cpu":
        library()  # a missing compiler shows now, not after hours of preparing
    graph = prepare(job, data_root=arguments.data_dir, graphs_root=arguments.graphs_dir)
    run_directory = arguments.runs_dir / job.name
    outcome, signal_number = train(job, graph, run_directory, resume=arguments.resume)
    if outcome is Outcome.INTERRUPTED:
        log("run the same command again to go on from there")
        # A node that is taken away asks without a signal that this process hears.
        return 128 + (signal_number or signal.SIGTERM)
    # TorchRec's and DCP's objects refer to each other in circles: their tables would stay beside those read now.
    gc.collect()
    if graph.num_triples[job.evaluate.split]:
        print_table(*evaluate(job, graph, run_directory))
        if job.extend.run is not None:
            tell_change(arguments.runs_dir / job.extend.run, run_directory)
    gc.collect()
    export_run(job, run_directory, graphs_dir=arguments.graphs_dir)
    log(f"tiers are in {run_directory / 'export'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
