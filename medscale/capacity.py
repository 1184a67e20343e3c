"""Whether a job's workers can hold it, by which placement, and how few of them would do."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import torch

from medscale.config import MOST_WORKERS, Job
from medscale.errors import CapacityError
from medscale.memory import GraphSize, Memory, memory_of
from medscale.model.embedding import TableMemory, require_table_memory
from medscale.model.layout import layout_of
from medscale.sharding import placement_of

__all__ = [
    "Fit",
    "Limits",
    "advice_on",
    "fitting",
    "free_in_group",
    "in_gib",
    "limits_of",
    "on_cuda",
    "require_memory",
    "smallest_fitting",
]

#: the cache that is tried where the default one does not fit
_SMALL_CACHE = 0.05

#: the fastest first
_TABLE_MEMORY: Final[tuple[TableMemory, ...]] = ("device", "uvm_caching", "ssd")

_ADVICE = {
    "batch": "Lower train.batch_size or negatives.number",
    "graph": "This graph needs a larger machine",
    "ranking": "Lower evaluate.memory_mib",
    "optimizer state": "Use optimizer.kind rowwise_adagrad, or smaller model.dims",
    "cached rows": "Lower runtime.cache_fraction, or use more workers",
    "rows sent and received": "Use more workers with placement table_wise, or a smaller train.batch_size",
    "entity tables": "Use smaller model.dims, more workers, or more memory (runtime.memory_gib)",
}


@dataclass(frozen=True)
class Limits:
    """Bytes that each worker may count on; None: unknown here."""

    host: int | None
    device: int | None = None

    def hold(self, memory: Memory) -> bool:
        """Whether a worker's needs fit, as far as is known."""
        needs = ((memory.host, self.host), (memory.device, self.device))
        return all(limit is None or sum(parts.values()) <= limit for parts, limit in needs)


def on_cuda(job: Job) -> bool:
    """Whether the job's workers train on GPUs, as far as this machine can tell."""
    return job.runtime.device == "cuda" or (job.runtime.device == "auto" and torch.cuda.is_available())


def limits_of(job: Job) -> Limits:
    """Return what a worker may count on: the job's word, or its part of what is free here, within limits."""
    given = None if job.runtime.memory_gib is None else int(job.runtime.memory_gib * 2**30)
    if not on_cuda(job):
        return Limits(_free_memory() // job.runtime.workers if given is None else given)
    here = torch.cuda.device_count()
    if given is None and here:
        given = torch.cuda.mem_get_info()[0]
    # How many workers share a host is known of this one at most.
    return Limits(_free_memory() // min(job.runtime.workers, here) if here else None, given)


def _free_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return min(free, free_in_group(Path("/sys/fs/cgroup"), free))


def free_in_group(group: Path, otherwise: int) -> int:
    """Return the bytes that a control group (version 2) may still take, or `otherwise` if it has no limit.

    What it holds of files that nobody has used lately is given back when memory runs short, and counts as free.
    """
    limit, used = group / "memory.max", group / "memory.current"
    if not (limit.is_file() and used.is_file() and limit.read_text().strip().isdigit()):
        return otherwise
    counters = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return max(0, int(limit.read_text()) - int(used.read_text()) + int(counters["inactive_file"]))


def require_memory(job: Job, memory: Memory, limits: Limits) -> None:
    """Refuse a job that its workers cannot hold, as far as is known.

    Raises:
        CapacityError: names what is needed, what there is, and the largest part of it.
        UnsupportedError: tables that spare a GPU's memory, and no GPU.

    """
    if not on_cuda(job):
        require_table_memory(job.runtime.table_memory, "cpu")
    _require_part(job, memory.device, limits.device, "GPU memory")
    _require_part(job, memory.host, limits.host, "memory")


def _require_part(job: Job, parts: Mapping[str, int], limit: int | None, kind: str) -> None:
    needed = sum(parts.values())
    if limit is None or needed <= limit:
        return
    largest = max(parts, key=lambda part: parts[part])
    each = f" on each of {job.runtime.workers} workers" if job.runtime.workers > 1 else ""
    raise CapacityError(
        f"job {job.name} needs {in_gib(needed)} GiB of {kind}{each} and may count on {in_gib(limit)} GiB; the largest "
        f"part is the {largest} with {in_gib(parts[largest])} GiB. {_ADVICE.get(largest, _ADVICE['entity tables'])}"
    )


@dataclass(frozen=True)
class Fit:
    """A placement by which a job fits: the job with its keys, and what a worker then holds."""

    job: Job
    memory: Memory

    def __str__(self) -> str:
        runtime, words = self.job.runtime, [_workers(self.job)]
        if runtime.workers > 1:
            words.append(f"runtime.placement {runtime.placement}")
        if self.memory.device:
            words.append(f"table_memory {runtime.table_memory}")
            if runtime.cache_fraction is not None:
                words.append(f"cache_fraction {runtime.cache_fraction:g}")
            words.append(f"{in_gib(sum(self.memory.device.values()))} GiB of each GPU")
            words.append(f"{in_gib(sum(self.memory.host.values()))} GiB of its host")
        if runtime.table_memory == "ssd":
            words.append("which training refuses")
        return ", ".join(words)


def _choices(job: Job) -> Iterator[Job]:
    """Yield the job with each placement and place of its tables that it leaves open, the fastest first."""
    runtime = job.runtime
    both: tuple[Literal["table_wise", "row_wise"], ...] = ("table_wise", "row_wise")
    by = both if runtime.placement == "auto" else (runtime.placement,)
    places = _TABLE_MEMORY[_TABLE_MEMORY.index(runtime.table_memory) :] if on_cuda(job) else _TABLE_MEMORY[:1]
    for place in places:
        left_open = place != "device" and runtime.cache_fraction is None
        for fraction in (None, _SMALL_CACHE) if left_open else (runtime.cache_fraction,):
            for placement in by[: runtime.workers]:
                keys = replace(runtime, placement=placement, table_memory=place, cache_fraction=fraction)
                yield replace(job, runtime=keys)


def fitting(job: Job, size: GraphSize, limits: Limits) -> Fit | None:
    """Return the first placement by which the job's workers fit, or None."""
    layout = layout_of(job.model, size.num_entities, size.num_relations)
    for choice in _choices(job):
        memory = memory_of(choice, size, layout, placement_of(layout, choice.runtime), on_cuda=on_cuda(job))
        if limits.hold(memory):
            return Fit(choice, memory)
    return None


def smallest_fitting(job: Job, size: GraphSize, limits: Limits, places: Collection[TableMemory]) -> Fit | None:
    """Return the fewest workers that fit with their tables in one of `places`."""
    for workers in range(1, MOST_WORKERS + 1):
        fit = fitting(replace(job, runtime=replace(job.runtime, workers=workers)), size, limits)
        if fit is not None and fit.job.runtime.table_memory in places:
            return fit
    return None


def advice_on(job: Job, size: GraphSize, limits: Limits) -> str:
    """Return in a sentence which placement the job's workers need, and how few would do; empty: nothing to say."""
    if limits.device is None and limits.host is None:
        return ""
    found = fitting(job, size, limits)
    words = [str(found) if found else f"no placement on {_workers(job)} would do"]
    places: list[TableMemory] = ["device", "uvm_caching"] if on_cuda(job) else ["device"]
    # Training refuses ssd, so that it is planned only for jobs that ask for it.
    fewest = smallest_fitting(job, size, limits, ["ssd"] if job.runtime.table_memory == "ssd" else places)
    on_device = smallest_fitting(job, size, limits, ["device"]) if on_cuda(job) else fewest
    if fewest is None:
        words.append(f"nor would one on up to {MOST_WORKERS:,}" if found is None else "")
    elif fewest != found:
        words.append(f"the fewest: {fewest}")
    if on_device not in (None, found, fewest):
        words.append(f"with tables on the GPUs: {on_device}")
    return "; ".join(filter(None, words)) if len(words) > 1 or on_cuda(job) or job.runtime.workers > 1 else ""


def _workers(job: Job) -> str:
    return f"{job.runtime.workers:,} worker{'s' * (job.runtime.workers > 1)}"


def in_gib(number: int) -> str:
    """Return bytes in words, without the unit."""
    return f"{number / 2**30:,.2f}"
