"""What a step costs a worker beside arithmetic: time in collective calls, and memory."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["collective_milliseconds", "memory_mib"]

# The profiler's library greets on stderr each time it starts.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

#: how the calls of the process groups' back ends are named in a profile
_BACK_ENDS = ("gloo:", "nccl:")


@contextlib.contextmanager
def collective_milliseconds(*, wanted: bool) -> Iterator[dict[str, float]]:
    """Time the collective calls of a block, waiting for other workers included: filled at the block's end.

    Milliseconds by kind ("all_to_all", "all_reduce", ...) and "together"; calls that overlap count once. Empty if not
    wanted.
    """
    found: dict[str, float] = {}
    if not wanted:
        yield found
        return
    with profile(activities=[ProfilerActivity.CPU], acc_events=False) as profiled:
        yield found
    spans: dict[str, list[tuple[float, float]]] = {"together": []}
    for event in profiled.events() or ():
        if event.name.startswith(_BACK_ENDS):
            span = (event.time_range.start, event.time_range.end)
            spans.setdefault(event.name.partition(":")[2], []).append(span)
            spans["together"].append(span)
    found |= {kind: round(_covered(several) / 1000, 3) for kind, several in spans.items()}


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of spans."""
    covered = 0.0
    last = float("-inf")
    for start, end in sorted(spans):
        covered += max(end - max(start, last), 0.0)
        last = max(last, end)
    return covered


def memory_mib(device: torch.device) -> dict[str, float]:
    """Return this process's resident memory, and on a GPU the most that was allocated there, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = {"memory_mib": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)}
    if device.type == "cuda":
        memory["gpu_memory_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return memory
