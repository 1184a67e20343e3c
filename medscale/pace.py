"""Seconds that a step takes on GPUs, expected from stated speeds; none of them is measured.

A worker's rates are `reached` times those of data sheets. With W workers, U rows of C columns looked up by each,
C_w columns held, and P pairs of positive and candidate scored by each:

    tables    20 W U C_w bytes (row_wise: 4 (3 + 2 W) U C)            over the GPU's memory rate
    scores    the larger of 2 x the batch's bytes over that rate, and 8 P C operations over the GPU's rate
    network   the bytes that the busiest worker sends (see traffic)    over the network's rate
    host      uvm_caching: 8 (1 - f) W U C_w bytes                     over the rate between host and GPU
    disk      ssd: the same bytes                                      over the disk's rate
    overhead  a constant: launches and waiting

A row is read, sent, its gradient read, the row read and written again; with a cache that holds a share f of them,
1 - f are missed (as if all were equally likely) and move in and out. Nothing overlaps.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from medscale.memory import StepSize
from medscale.model.embedding import Placement
from medscale.model.layout import Layout
from medscale.sharding import FLOAT, shares_of
from medscale.traffic import bytes_per_step

__all__ = ["Speeds", "step_seconds"]


@dataclass(frozen=True)
class Speeds:
    """What a worker's machine is assumed to do: data sheets (one direction), and a guess of what is reached."""

    #: GB/s of the GPU's memory (an H100 SXM)
    memory_gb_s: float = 3350.0
    #: GB/s between workers, for each (400 Gbit/s)
    network_gb_s: float = 50.0
    #: GB/s between a GPU and its host (PCIe 5 x16)
    host_gb_s: float = 63.0
    #: GB/s of a worker's disk (one NVMe drive)
    disk_gb_s: float = 7.0
    #: float32 operations of the GPU, in 10^12/s (an H100 SXM)
    tflops: float = 67.0
    #: the share of these that is reached
    reached: float = 0.5
    #: milliseconds of a step that nothing above explains
    overhead_ms: float = 2.0


def step_seconds(
    layout: Layout, placement: Placement, workers: int, step: StepSize, speeds: Speeds
) -> Mapping[str, float]:
    """Return the seconds of a worker's step by what takes them."""
    columns = sum(block.width for block in layout.blocks)
    held = max(share.columns for share in shares_of(layout, placement, workers))
    served = FLOAT * workers * step.rows * held
    moved = FLOAT * (3 + 2 * workers) * step.rows * columns if placement.is_row_wise else 5 * served
    missed = 2 * (1 - placement.cache_fraction) * (served // workers if placement.is_row_wise else served)
    sent = max(traffic.total for traffic in bytes_per_step(layout, placement, [step.rows] * workers))
    giga = speeds.reached * 1e9
    return {
        "tables": moved / (speeds.memory_gb_s * giga),
        "scores": max(
            2 * step.num_bytes / (speeds.memory_gb_s * giga),
            8 * step.scores * layout.num_columns / (speeds.tflops * 1e3 * giga),
        ),
        "network": sent / (speeds.network_gb_s * giga),
        "host": missed / (speeds.host_gb_s * giga) if placement.memory == "uvm_caching" else 0.0,
        "disk": missed / (speeds.disk_gb_s * giga) if placement.memory == "ssd" else 0.0,
        "overhead": speeds.overhead_ms / 1e3,
    }
