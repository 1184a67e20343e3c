"""The process group, the device and the tables of a worker. World size 1 is a group like any other."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from medscale.config import RuntimeSection
from medscale.errors import UnsupportedError
from medscale.model.embedding import Placement
from medscale.model.layout import Layout
from medscale.workers import ALONE, Workers

__all__ = ["choose_device", "choose_threads", "placement_of", "process_group"]

#: mallopt parameters of glibc
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def choose_device(section: RuntimeSection) -> torch.device:
    """Return the device that a job asks for.

    Raises:
        UnsupportedError: it asks for CUDA and there is none.

    """
    if section.device == "cpu" or (section.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UnsupportedError("runtime.device is cuda, but torch sees no GPU here; `medscale doctor` says why")
    return torch.device("cuda", 0)


def choose_threads(section: RuntimeSection, local_workers: int = 1) -> int:
    """Return the CPU threads that a worker may use, of those that share the machine, and give them to torch."""
    threads = section.threads or max(1, len(os.sched_getaffinity(0)) // local_workers)
    torch.set_num_threads(threads)
    _keep_freed_memory()
    return threads


def _keep_freed_memory() -> None:
    """Let glibc keep large blocks for the next step instead of returning them to the kernel.

    Every step needs the same big tensors, and fresh pages for each cost more than the arithmetic on them.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


@contextlib.contextmanager
def process_group(
    device: torch.device, workers: Workers = ALONE, store: dist.Store | None = None, timeout_s: float = 600
) -> Iterator[Workers]:
    """Join the group of all workers: gloo on a CPU, NCCL on a GPU. A worker alone listens on no port.

    `store` is where several workers find each other; all calls wait `timeout_s` seconds for the others at most.
    """
    assert store is not None or workers.size == 1
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend, store=store or dist.HashStore(), rank=workers.rank, world_size=workers.size,
        timeout=timedelta(seconds=timeout_s),
    )  # fmt: skip
    try:
        yield workers
    finally:
        dist.destroy_process_group()


def placement_of(layout: Layout, section: RuntimeSection) -> Placement:
    """Return where each block of the entity table lies: whole on a worker, or spread by rows.

    Wide blocks go first, each to the worker that holds the fewest columns so far. With `placement: auto`, rows are
    spread where a worker's whole blocks would not fit in `memory_gib`.
    """
    columns = [0] * section.workers
    placement: Placement = {}
    for block in sorted(layout.blocks, key=lambda block: (-block.width, block.start)):
        rank = columns.index(min(columns))
        placement[block.name] = rank
        columns[rank] += block.width
    most_bytes = 4 * layout.num_entities * max(columns)
    too_large = section.memory_gib is not None and most_bytes > section.memory_gib * 2**30
    if section.workers > 1 and (section.placement == "row_wise" or (section.placement == "auto" and too_large)):
        return dict.fromkeys(placement, None)
    return {block.name: placement[block.name] for block in layout.blocks}
