"""Several workers: Ray Train starts them, each runs `train_worker`, and Ray replaces those that die.

The run directory lies on a file system that all nodes see; the graph too, or behind a URI that all nodes reach. A run
goes on from the newest committed step of its run directory, whatever Ray remembers: a worker may die between the
commit and any report of it.
"""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from medscale import errors
from medscale.checkpoint import committed, committed_steps, step_of
from medscale.cluster import cluster
from medscale.config import Job
from medscale.errors import CapacityError, CheckpointError, MedscaleError, WorkerError
from medscale.evaluators import RayEvaluators, start_evaluators
from medscale.graph.reader import Graph, open_graph
from medscale.jobfile import dump_job, parse_job
from medscale.logs import log, silence
from medscale.readers import feed_of, start_readers
from medscale.workers import Workers

if TYPE_CHECKING:
    from medscale.trainer import Outcome

__all__ = ["train_on_ray"]

#: how often all workers are started anew after one died; each time they go on from the newest committed step
MAX_FAILURES = 10
#: lies in the run directory while the driver asks the workers to save and stop
STOP = "stop.request"


def train_on_ray(job: Job, graph: Graph, run_directory: Path, resume: str) -> "tuple[Outcome, int | None]":
    """Train with the job's workers on the cluster at hand, or on one of this machine's own.

    Returns why training ended, and the number of the signal that asked for it, if one did.

    Raises:
        CheckpointError: the run directory holds steps of another job.
        CapacityError: the cluster has too few CPUs or GPUs, ever to start the workers.
        WorkerError: workers died, or hung, more often than they are replaced.

    """
    _require_same_run(job, graph, run_directory)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # or every line comes twice
    with cluster(), _asking_to_stop(run_directory / STOP) as signals:
        on_gpus = _require_resources(job)
        trainer = TorchTrainer(
            _work,
            train_loop_config={
                # A location, not its URI: Ray's dashboard shows these, and a URI's query may be secret.
                "job": dump_job(job), "graph": graph.directory.resolve(), "run": str(run_directory.resolve()),
                "resume": resume, "readers": start_readers(job, graph),
                "evaluators": start_evaluators(job, graph, run_directory),
            },
            torch_config=TorchConfig(
                backend="cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout_s=job.runtime.timeout_s
            ),
            scaling_config=ScalingConfig(num_workers=job.runtime.workers, use_gpu=on_gpus),
            run_config=RunConfig(
                name="train", storage_path=str((run_directory / "ray").resolve()),
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
            ),
        )  # fmt: skip
        try:
            ending = _fitted(trainer).return_value
        except ray.train.TrainingFailedError as cause:
            raise WorkerError(
                f"workers failed {MAX_FAILURES + 1} times: {_last_line(cause)}; run the same command again to go on "
                "from the last checkpoint"
            ) from cause
    from medscale.trainer import Outcome

    if "error" in ending:
        raise getattr(errors, ending["error"])(ending["message"])
    return Outcome[ending["outcome"]], signals[0] if signals else ending["signal"]


def _require_same_run(job: Job, graph: Graph, run_directory: Path) -> None:
    """Refuse a changed job before any worker starts; a damaged step is left for the workers to find and name."""
    from medscale.trainer import require_same_run

    if steps := committed_steps(run_directory):
        try:
            newest = committed(run_directory, step_of(steps[-1]))
        except CheckpointError:
            return
        require_same_run(newest, job, graph)


def _fitted(trainer: TorchTrainer) -> Any:
    """Run the trainer in a thread: in the main one Ray would take Ctrl-C for itself, and end the run unsaved."""
    ended: Future[Any] = Future()

    def run() -> None:
        try:
            ended.set_result(trainer.fit())
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return ended.result()


def _work(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Do one worker's part; return what the driver shall tell."""
    # Ray Train lets libraries tell everything, FBGEMM as soon as it is imported.
    logging.getLogger().setLevel(logging.WARNING)
    from medscale.trainer import train_worker

    context = ray.train.get_context()
    device = get_device()
    workers = Workers(context.get_world_rank(), context.get_world_size(), device)
    if not workers.leads:
        silence()
    job, run_directory = parse_job(settings["job"], "job.yaml"), Path(settings["run"])
    try:
        graph = open_graph(settings["graph"], verify=False)
        outcome, number = train_worker(
            job, graph, run_directory, device, workers, settings["resume"],
            local_workers=context.get_local_world_size(), stop_wanted=_stop_wanted(run_directory / STOP),
            feed=feed_of(settings["readers"], job, graph) if settings["readers"] else None,
            evaluators=RayEvaluators(settings["evaluators"]) if settings["evaluators"] else None,
        )  # fmt: skip
    except WorkerError:
        raise  # Ray starts all workers anew
    except MedscaleError as error:
        # Found by all workers alike, and no better the next time.
        return {"error": type(error).__name__, "message": str(error)}
    return {"outcome": outcome.name, "signal": number}


def _stop_wanted(request: Path) -> Callable[[], bool]:
    """Return what a worker asks after each step: does the driver, or a node that is taken away, want an end?"""
    preemption = getattr(ray.train, "get_preemption_info", None)

    def wanted() -> bool:
        return request.exists() or (preemption is not None and preemption() is not None)

    return wanted


@contextlib.contextmanager
def _asking_to_stop(request: Path) -> Iterator[list[int]]:
    """Turn SIGTERM and the first Ctrl-C into a request that all workers find; yields the signals that came."""
    request.unlink(missing_ok=True)
    signals: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)
        request.touch()
        os.write(2, f"{signal.Signals(number).name}: the workers save after this step\n".encode())

    # After ray.init(), which puts a handler of its own in place.
    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        request.unlink(missing_ok=True)


def _require_resources(job: Job) -> bool:
    """Return whether workers train on GPUs; refuse a cluster that cannot hold them all at once.

    Raises:
        CapacityError: too few CPUs or GPUs in the whole cluster.

    """
    there, wanted = ray.cluster_resources(), job.runtime.workers
    gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 0))
    on_gpus = job.runtime.device == "cuda" or (job.runtime.device == "auto" and gpus >= wanted)
    if on_gpus and gpus < wanted:
        raise CapacityError(f"runtime.workers is {wanted}, each with a GPU, and the Ray cluster has {gpus} GPUs")
    if cpus < wanted:
        raise CapacityError(
            f"runtime.workers is {wanted}, and the Ray cluster has {cpus} CPUs, one per worker; start Ray with more "
            "(ray start --num-cpus), or lower runtime.workers"
        )
    log(f"{wanted} workers on a Ray cluster of {len(ray.nodes())} nodes, {cpus} CPUs, {gpus} GPUs")
    return on_gpus


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
