"""Ray, for jobs that ask for it: the cluster at hand, actors on it, and functions that run as its tasks.

Ray is imported when it is first needed; most jobs do without it.
"""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from medscale.errors import MedscaleError, UnsupportedError, WorkerError
from medscale.logs import Advance

__all__ = ["HERE", "Tasks", "cluster", "result_of", "start_actor", "tasks_of"]

Item = TypeVar("Item")
Result = TypeVar("Result")

#: how often a task is run again after its process, or its node, died
MAX_RETRIES = 3
#: how often an actor that dies is started anew, and what it was asked is asked again
MAX_RESTARTS = 10


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """Join the cluster that the environment names, or one that runs on this machine, or else start one here."""
    import ray

    started = not ray.is_initialized()
    if started:
        address = _address()
        # What the workers import is what this process imports.
        paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        ray.init(
            address=address, logging_level="warning", log_to_driver=True, configure_logging=True,
            runtime_env={"env_vars": {"PYTHONPATH": paths}},
        )  # fmt: skip
    try:
        _require_token()
        yield
    finally:
        if started:
            ray.shutdown()


def _address() -> str | None:
    """Return where `ray.init` shall go; None: where the environment says.

    Ray leaves the address of a cluster that was killed lying about, and would wait minutes for it.

    Raises:
        UnsupportedError: RAY_ADDRESS is a URL, which only clients outside of a cluster go to.

    """
    from ray._private.utils import read_ray_address

    if asked := os.environ.get("RAY_ADDRESS"):
        if "://" in asked:
            raise UnsupportedError(
                f"RAY_ADDRESS={asked} is for `ray job submit` and other clients; submit this command there, or set "
                "RAY_ADDRESS to the HOST:PORT of a cluster that this machine is part of (as ray start --head prints it)"
            )
        return None
    host, _, port = (read_ray_address() or "").rpartition(":")
    if host:
        with contextlib.suppress(OSError, ValueError), socket.create_connection((host.strip("[]"), int(port)), 3):
            return f"{host}:{port}"
    return "local"


def _require_token() -> None:
    """Refuse a cluster that other machines reach and that asks nobody for a token: they could run code in this job.

    Raises:
        UnsupportedError: names the address, and how to start Ray.

    """
    import ray

    # Ray offers no public word for it; its own clients ask here too.
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    host = ray.get_runtime_context().gcs_address.rpartition(":")[0].strip("[]")
    if not is_token_auth_enabled() and not _is_loopback(host):
        raise UnsupportedError(
            f"Ray at {host} runs what anyone who reaches it sends: start it with RAY_AUTH_MODE=token (see README, Many "
            "workers), or with --node-ip-address=127.0.0.1 on this machine alone"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def start_actor(kind: type, *arguments: Any) -> Any:
    """Start an actor, and return its handle; it is started anew when it dies.

    It reserves no core: a cluster has its workers' cores, and actors work in the gaps.
    """
    import ray

    restarts = {"max_restarts": MAX_RESTARTS, "max_task_retries": MAX_RESTARTS}
    actor: Any = ray.remote(num_cpus=0, scheduling_strategy="SPREAD", **restarts)(kind)
    return actor.remote(*arguments)


def result_of(reference: Any) -> Any:
    """Wait for what a task or an actor's method returns.

    Raises:
        RayError: its process died, more often than it is started anew, or its result was lost.
        Exception: what it raised, here as there.

    """
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        # Only of what is not a user's mistake does it matter where it happened.
        raise error.cause from (None if isinstance(error.cause, MedscaleError) else error)


class Tasks:
    """Runs a function over many items: one after the other in this process, or some at a time on a Ray cluster.

    The function takes an item and `advance`, to tell how far it has come. It may be run again where its process
    died, so what it writes is the same each time, replaces what is there, and appears whole.
    """

    def __init__(self, number: int, directory: Path | None = None) -> None:
        assert number == 1 or directory is not None
        #: tasks at a time; 1: in this process
        self.number = number
        #: where all nodes see that tasks are to end
        self._directory = directory

    def run(self, function: Callable[[Item, Advance], Result], items: Sequence[Item], advance: Advance) -> list[Result]:
        """Return the function's results in the order of the items.

        Raises:
            WorkerError: a task's process died each time it was run. All tasks have ended.
            Exception: what the function raised, here as there. All tasks have ended.

        """
        if self._directory is None:
            return [function(item, advance) for item in items]
        return _on_ray(function, items, advance, self.number, self._directory / "stop.request")


#: in this process, one after the other
HERE = Tasks(1)


@contextlib.contextmanager
def tasks_of(number: int, directory: Path) -> Iterator[Tasks]:
    """Yield what runs `number` tasks at a time; more than one on a Ray cluster, for as long as the block lasts.

    All nodes see `directory`; a file there asks tasks to end after another one failed.
    """
    if number == 1:
        yield HERE
    else:
        with cluster():
            yield Tasks(number, directory.absolute())


def _on_ray(
    function: Callable[[Item, Advance], Result], items: Sequence[Item], advance: Advance, number: int, stop: Path
) -> list[Result]:
    import ray

    task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES, scheduling_strategy="SPREAD")(_task)
    task = task.options(name=function.__name__)
    results: dict[int, Result] = {}
    waiting = list(enumerate(items))[::-1]
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < number:
                index, item = waiting.pop()
                running[task.remote(function, item, stop)] = index
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            index = running.pop(done)
            results[index], units = _result(done, function.__name__)
            advance(units)
    finally:
        # Nothing is written any more once this returns: the caller removes what failed. Ray's own way to cancel a task
        # brings this process down where the task ends at that moment (Ray 2.60: "Tried to complete task").
        if running:
            with contextlib.suppress(OSError):
                stop.touch()
            ray.wait(list(running), num_returns=len(running))
    return [results[index] for index in range(len(items))]


class _StoppedError(Exception):
    """Another task failed: this one ends, and nobody asks for its result."""


def _task(function: Callable[[Item, Advance], Result], item: Item, stop: Path) -> tuple[Result, int]:
    """Run in a process of Ray's: return the result, and by how much it advanced."""
    units = 0

    def advance(count: int) -> None:
        nonlocal units
        if stop.exists():
            raise _StoppedError
        units += count

    advance(0)
    result = function(item, advance)
    return result, units


def _result(reference: Any, name: str) -> Any:
    from ray.exceptions import RayError

    try:
        return result_of(reference)
    except RayError as error:
        lines = str(error).strip().splitlines() or [""]
        raise WorkerError(
            f"a task of Ray ({name}) died {MAX_RETRIES + 1} times: {type(error).__name__}: {lines[0]}; give the "
            "machine more memory, or run fewer tasks at a time (to prepare a graph also: lower graph.memory_mib)"
        ) from error
