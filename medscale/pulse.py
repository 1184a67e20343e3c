"""Which worker hangs: each writes its step to a file every second; who stopped writing is named by the others.

A group of processes only says that somebody did not come. A worker that was stopped, or lost its machine, writes
nothing any more; one whose thread is stuck still writes, but of an old step.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from medscale.errors import WorkerError
from medscale.workers import Workers

__all__ = ["naming_the_silent"]

_SECONDS = 1.0
#: a worker that writes no more is silent after so many seconds: longer than a busy machine may keep a thread waiting
_SILENT = 5.0


@contextlib.contextmanager
def naming_the_silent(directory: Path, workers: Workers, step: Callable[[], int]) -> Iterator[None]:
    """Write this worker's step while the block runs; where it fails for want of another worker, say which.

    Raises:
        WorkerError: that of the block, with the worker's number, its last step and since when it is silent.

    """
    if workers.size == 1:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    own, ended = directory / f"worker-{workers.rank}", threading.Event()

    def write() -> None:
        own.write_text(str(step()), encoding="ascii")

    def keep_writing() -> None:
        while not ended.wait(_SECONDS):
            write()

    write()
    thread = threading.Thread(target=keep_writing, name="pulse", daemon=True)
    thread.start()
    try:
        yield
    except WorkerError as error:
        # One that died a moment ago has written a moment ago.
        time.sleep(_SILENT + _SECONDS)
        raise WorkerError(f"{error}. {_silent(directory, workers, step())}") from error
    finally:
        ended.set()
        thread.join()
        own.unlink(missing_ok=True)


def _silent(directory: Path, workers: Workers, own_step: int) -> str:
    """Return which workers hang, in words."""
    found = []
    for rank in set(range(workers.size)) - {workers.rank}:
        try:
            path = directory / f"worker-{rank}"
            age, step = time.time() - path.stat().st_mtime, int(path.read_text(encoding="ascii") or -1)
        except (OSError, ValueError):
            found.append(f"worker {rank} has ended")
            continue
        if age > _SILENT:
            found.append(f"worker {rank} is silent since {age:.0f} s, after step {step}")
        elif step < own_step:
            found.append(f"worker {rank} is stuck after step {step}")
    return "; ".join(found) or "All others are alive: the network between them may be broken"
