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
    spans: dict[str, list[tuple[int, int]]] = {"together": []}
    # What the profile is made of: making it would take longer than the step.
    for event in profiled.profiler.kineto_results.events():
        name = event.name()
        if name.startswith(_BACK_ENDS):
            span = (event.start_ns(), event.start_ns() + event.duration_ns())
            spans.setdefault(name.partition(":")[2], []).append(span)
            spans["together"].append(span)
    found |= {kind: round(_covered(several) / 1e6, 3) for kind, several in spans.items()}


def _covered(spans: Iterable[tuple[int, int]]) -> int:
    """Return the length of the union of spans."""
    covered = last = 0
    for start, end in sorted(spans):
        covered += max(end - max(start, last), 0)
        last = max(last, end)
    return covered


def memory_mib(device: torch.device) -> dict[str, float]:
    """Return this process's resident memory, now and at its peak, and on a GPU the most allocated there, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in status) if "kB" in value}
    memory = {"memory_mib": round(kib["VmRSS"] / 1024, 1), "peak_memory_mib": round(kib["VmHWM"] / 1024, 1)}
    if device.type == "cuda":
        memory["gpu_memory_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return memory
