"""What plans say of several workers: where tables lie, and what each worker needs."""

import dataclasses
from typing import Any

import pytest
from toy import toy_job

from medscale.config import Job
from medscale.model.layout import layout_of
from medscale.plan import GraphSize, plan
from medscale.sharding import placement_of

GIB = 2**30
BILLION = GraphSize(10**9, 100, 10**7, 0, 0, "given")


def job_for(workers: int, memory_gib: float, **model: Any) -> Job:
    job = toy_job("transe", runtime={"workers": workers, "memory_gib": memory_gib})
    sizes = dataclasses.replace(job.model, dims=(10, 100, 500), tiers={"phone": 10, "server": 500}, **model)
    return dataclasses.replace(job, model=sizes)


@pytest.mark.parametrize(
    ("workers", "memory_gib", "block_units", "placement", "tables_gib"),
    [
        (32, 80, 16, "table_wise", 0),
        (64, 40, 16, "row_wise", 500 * 4 / 64),
        (4, 10_000, None, "table_wise", 488 * 4),
    ],
)
def test_placement_and_tables_of_each_worker(
    workers: int, memory_gib: float, block_units: int | None, placement: str, tables_gib: float
) -> None:
    predicted = plan(job_for(workers, memory_gib, block_units=block_units), BILLION)
    assert predicted.placement.startswith(placement)
    held = predicted.memory.host["entity tables"] / 10**9
    if block_units is None or placement == "row_wise":
        assert held == pytest.approx(tables_gib, rel=0.02)
    else:
        assert held <= memory_gib * GIB / 10**9


def test_tables_are_balanced_and_every_block_has_a_place() -> None:
    job = job_for(8, 10_000, block_units=16)
    layout = layout_of(job.model, 1000, 10)
    placement = placement_of(layout, job.runtime).ranks
    widths = [sum(b.width for b in layout.blocks if placement[b.name] == rank) for rank in range(8)]
    assert placement.keys() == {block.name for block in layout.blocks}
    assert max(widths) - min(widths) <= max(block.width for block in layout.blocks)
    assert sum(block.width for block in layout.blocks) >= 500
    assert all(block.width <= 20 for block in layout.blocks)


def test_more_workers_than_blocks_is_said() -> None:
    assert "block_units" in plan(job_for(4, 10_000), BILLION).placement
