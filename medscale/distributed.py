"""The process group, the device and the threads of a worker. World size 1 is a group like any other."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from medscale.config import RuntimeSection
from medscale.errors import UnsupportedError
from medscale.workers import ALONE, Workers

__all__ = ["choose_device", "choose_threads", "give_back_freed_memory", "process_group"]

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
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def give_back_freed_memory() -> None:
    """Return to the kernel what glibc keeps, where it grows.

    Several workers exchange tensors of sizes that change with every step, in threads of the process group's own: what
    was freed no longer fits, and a worker would grow by half in a hundred steps.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


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
