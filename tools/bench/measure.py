"""Time and memory, each measured in a process of its own."""

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from medscale.config import RuntimeSection
from medscale.distributed import choose_threads

__all__ = [
    "copy_bandwidth",
    "cores_for",
    "in_own_process",
    "median_milliseconds",
    "peak_mib",
    "private_mib",
    "reset_peak",
    "resident_mib",
]

T = TypeVar("T")

#: float32 numbers copied to measure bandwidth: 256 MiB, beyond any cache
_COPIED = 1 << 26


@contextlib.contextmanager
def cores_for(threads: int) -> Iterator[None]:
    """Give as many cores as threads to the processes that are started within."""
    cores = sorted(os.sched_getaffinity(0))
    # Children inherit the cores, and their libraries count them when they are loaded.
    os.sched_setaffinity(0, cores[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def in_own_process(threads: int, function: Callable[..., T], *arguments: Any) -> T:
    """Return function(*arguments) from a fresh process that has as many cores as threads."""
    with cores_for(threads), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_call, threads, function, arguments).result()


def _call(threads: int, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    choose_threads(RuntimeSection(threads=threads))
    return function(*arguments)


def median_milliseconds(step: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Return the median time of a step, called for about that many seconds and 3 times at least, after a warm-up."""
    step()
    clock = _gpu_milliseconds if device.type == "cuda" else _milliseconds
    first = clock(step, 1)
    return statistics.median(first + clock(step, max(2, int(1000 * seconds / first[0]))))


def _milliseconds(step: Callable[[], object], number: int) -> list[float]:
    times = [time.perf_counter()]
    for _ in range(number):
        step()
        times.append(time.perf_counter())
    return [1000 * (b - a) for a, b in itertools.pairwise(times)]


def _gpu_milliseconds(step: Callable[[], object], number: int) -> list[float]:
    """Time steps by events on the GPU, waited for at the end alone, so that Python runs ahead of it."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(number + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def copy_bandwidth(seconds: float, device: torch.device) -> float:
    """Return GB/s of a copy of 256 MiB, counting what is read and what is written."""
    source = torch.ones(_COPIED, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * _COPIED / 1e6 / median_milliseconds(lambda: target.copy_(source), seconds, device)


def reset_peak() -> None:
    """Give back what is free, which would hide what is taken next, and let the peak begin anew."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Return the most memory (resident set) that this process has had."""
    return _status_mib("VmHWM")


def private_mib(pid: int) -> float:
    """Return the memory that a process shares with no other, which leaves out Ray's object store and libraries."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("Private_"))


def resident_mib() -> float:
    """Return the memory (resident set) that this process has."""
    return _status_mib("VmRSS")


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
