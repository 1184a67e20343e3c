"""Training in processes that may be killed: forked from a server that has imported everything once."""

import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from medscale.config import Job
from medscale.graph.reader import open_graph


def _train(job: Job, graph_directory: Path, run: Path, fault: str | None, code: "multiprocessing.Value") -> None:  # type: ignore[valid-type]
    if fault is not None:
        os.environ["MEDSCALE_FAULT"] = fault
    from medscale.train import train

    _, signal_number = train(job, open_graph(graph_directory, verify=False), run)
    code.value = signal_number or 0
    os._exit(0)


def start(job: Job, graph_directory: Path, run: Path, fault: str | None = None) -> tuple[BaseProcess, object]:
    """Start `train` in a child; `fault` is MEDSCALE_FAULT there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["medscale.train"])
    code = context.Value("i", -1)
    process = context.Process(target=_train, args=(job, graph_directory, run, fault, code))
    process.start()
    return process, code


def run_to_end(job: Job, graph_directory: Path, run: Path, fault: str | None = None) -> int:
    """Train in a child and return its exit code; a killed one has the negative signal."""
    process, _ = start(job, graph_directory, run, fault)
    process.join(120)
    assert process.exitcode is not None, "the child hangs"
    return process.exitcode


def wait_for(path: Path, text: str = "", seconds: float = 60) -> None:
    """Wait until a file holds a text."""
    deadline = time.monotonic() + seconds
    while not path.exists() or text not in path.read_text(encoding="utf-8", errors="replace"):
        assert time.monotonic() < deadline, f"{path} never held {text!r}"
        time.sleep(0.02)


KILLED = -signal.SIGKILL
