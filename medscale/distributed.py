"""The process group and the device of a worker. World size 1 is a group like any other."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from medscale.config import RuntimeSection
from medscale.errors import UnsupportedError

__all__ = ["choose_device", "choose_threads", "process_group"]


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


def choose_threads(section: RuntimeSection) -> int:
    """Return the CPU threads that a job may use, and give them to torch."""
    threads = section.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    return threads


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join a group of one: gloo on a CPU, NCCL on a GPU; nothing listens on a port."""
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
