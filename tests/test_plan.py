"""What plans say of several workers: where tables lie, and what each worker needs."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import toy_job

from medscale.capacity import Limits, fitting, free_in_group, smallest_fitting
from medscale.cli import main as medscale
from medscale.config import Job
from medscale.errors import CapacityError
from medscale.jobfile import load_job
from medscale.model.layout import layout_of
from medscale.pace import Speeds
from medscale.plan import GraphSize, plan, require_fit
from medscale.sharding import placement_of

GIB = 2**30
BILLION = GraphSize(10**9, 100, 10**7, 0, 0, "given")
ROOT = Path(__file__).resolve().parents[1]
SKG = ROOT / "k8s" / "overlays" / "gpu-nodes" / "job.yaml"
HUGE = ["--device", "cuda", "--num-entities", "1000000000", "--num-relations", "100", "--num-triples", "10000000000"]


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


def skg(workers: int, memory_gib: float, **runtime: Any) -> Job:
    """The job of the paper's size on GPUs: 500 columns in 32 tables of 12 to 16."""
    job = load_job(SKG)
    keys = {"workers": workers, "device": "cuda", "memory_gib": memory_gib, **runtime}
    return dataclasses.replace(job, runtime=dataclasses.replace(job.runtime, **keys))


def test_memory_of_a_gpu_and_its_host_counted_by_hand() -> None:
    """32 workers hold a table each, the widest of 16 columns; pieces of it leave the GPU to be saved."""
    memory = plan(skg(32, 80), BILLION).memory
    assert memory.device["entity tables"] == 4 * 10**9 * 16
    assert memory.device["optimizer state"] == 4 * 10**9
    assert memory.device["relations"] == 3 * 4 * 100 * 500
    rows = 2 * 256 + 256 // 32 * 64
    assert memory.device["rows sent and received"] == 48 * 32 * rows * 16
    assert memory.host["saving and exporting"] == 4 * 64 * 2**20
    assert memory.host["graph"] == 104 * 2**20, "partitions; without validation no filter is built"
    by_rows = plan(skg(32, 80, placement="row_wise"), BILLION).memory
    assert by_rows.device["entity tables"] == 4 * 10**9 * 500 // 32
    assert by_rows.device["optimizer state"] == 4 * 10**9
    assert by_rows.device["rows sent and received"] == 48 * 32 * rows * 500


def test_tables_in_the_hosts_memory_leave_a_cache_on_the_gpu() -> None:
    memory = plan(skg(32, 80, table_memory="uvm_caching", cache_fraction=0.25), BILLION).memory
    assert "entity tables" not in memory.device
    assert memory.host["entity tables"] == 4 * 10**9 * 16
    assert memory.host["optimizer state"] == 4 * 10**9
    assert memory.device["cached rows"] == 10**9 // 4 * (4 * 16 + 16) + 4 * 10**9
    on_disk = plan(skg(32, 80, table_memory="ssd"), BILLION).memory
    assert "entity tables" not in {**on_disk.host, **on_disk.device}
    assert on_disk.device["optimizer state"] == 4 * 10**9


def test_the_fewest_workers_and_the_placement_they_need() -> None:
    """A GPU's part of 4 x 532 bytes x 10^9, spread by rows, and 2.2 GiB beside it: 26 hold it, 25 do not."""
    job, limits = skg(16, 80), Limits(None, 80 * GIB)
    in_host = fitting(job, BILLION, limits)
    assert in_host is not None
    assert (in_host.job.runtime.placement, in_host.job.runtime.table_memory) == ("table_wise", "uvm_caching")
    fewest = smallest_fitting(job, BILLION, limits, ["device"])
    assert fewest is not None
    assert (fewest.job.runtime.workers, fewest.job.runtime.placement) == (26, "row_wise")
    beside = sum(fewest.memory.device.values()) - 4 * 532 * -(-(10**9) // 26)
    assert 4 * 532 * 10**9 / 26 + beside <= 80 * GIB < 4 * 532 * 10**9 / 25 + beside
    little = fitting(skg(25, 80), BILLION, Limits(16 * GIB, 80 * GIB))
    assert little is not None
    assert str(little).endswith("which training refuses"), "too little memory on the host leaves the disk"
    with pytest.raises(CapacityError, match=r"on each of 16 workers .* 80.00 GiB; the largest part is the entity"):
        require_fit(job, plan(job, BILLION), Path(), limits)


@pytest.mark.parametrize("workers", [8, 26, 31, 32, 40])
def test_what_is_planned_is_what_training_places(workers: int) -> None:
    job = skg(workers, 80)
    layout = layout_of(job.model, BILLION.num_entities, BILLION.num_relations)
    placement = placement_of(layout, job.runtime)
    assert plan(job, BILLION).placement.startswith("row_wise" if placement.is_row_wise else "table_wise")
    assert placement.is_row_wise == (workers < 32)


def test_expected_time_is_bytes_over_stated_speeds() -> None:
    slow, fast = Speeds(network_gb_s=1, reached=1), Speeds(network_gb_s=100, reached=1)
    job = skg(32, 80)
    sent = plan(job, BILLION).traffic.total
    assert plan(job, BILLION, slow).step_seconds["network"] == pytest.approx(sent / 1e9)
    assert plan(job, BILLION, fast).step_seconds["network"] == pytest.approx(sent / 1e11)
    assert plan(job_for(32, 80), BILLION).step_seconds == {}, "on a CPU nothing is expected"


def test_the_command_refuses_machines_that_no_job_can_have(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        medscale(["plan", str(SKG), "--workers", "1000000", *HUGE])
    assert "--workers 1000000 is more than a job may have: at most 1024" in capsys.readouterr().err
    cached = tmp_path / "cached.yaml"
    cached.write_text(SKG.read_text().replace("device: cuda", "device: auto\n  table_memory: uvm_caching"))
    assert "table_memory" in cached.read_text()
    if not torch.cuda.is_available():
        assert medscale(["plan", str(cached), *HUGE[2:]]) == 9
        assert "this job runs on the CPU; use device" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        medscale(["plan", str(SKG), "--runs-dir", "s3://bucket/runs", *HUGE])
    assert "s3://bucket/runs is no directory, and only --graphs-dir takes a URI" in capsys.readouterr().err


def test_the_command_says_what_would_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert medscale(["plan", str(SKG), "--workers", "16", "--memory-gib", "80", *HUGE]) == 7
    shown = capsys.readouterr()
    assert "row_wise: each of 32 tables" in shown.out
    assert "What would fit: 16 workers, runtime.placement table_wise, table_memory uvm_caching" in shown.err
    assert "with tables on the GPUs: 26 workers, runtime.placement row_wise, table_memory device" in shown.err
    assert medscale(["plan", str(SKG), "--workers", "32", "--memory-gib", "80", *HUGE]) == 0
    shown = capsys.readouterr()
    assert "skg fits: 32 workers, runtime.placement table_wise, table_memory device" in shown.out
    assert "network_gb_s 50" in " ".join(shown.out.split())
    with pytest.raises(SystemExit, match="0"):
        medscale(["plan", "--formulas"])
    assert "reduce-scatter of W partial sums" in capsys.readouterr().out
    assert medscale(["plan", str(ROOT / "jobs" / "umls.yaml"), "--host-memory-gib", "80", *HUGE[2:]]) == 2
    assert "--host-memory-gib is for workers on cuda" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        medscale(["plan", str(SKG), "--reached", "7", *HUGE])


def test_free_memory_of_a_control_group(tmp_path: Path) -> None:
    assert free_in_group(tmp_path, 77) == 77, "no such group"
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 200\n")
    assert free_in_group(tmp_path, 77) == 77, "no limit"
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_in_group(tmp_path, 77) == 1000 - 600 + 200
    (tmp_path / "memory.max").write_text("300\n")
    assert free_in_group(tmp_path, 77) == 0, "more is in use than may be"


def test_the_paper_plan_is_what_the_plan_counts() -> None:
    command = [sys.executable, "tools/plan_table.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_bytes_of_an_export_follow_layout_precision_and_formats() -> None:
    job = load_job(SKG)
    size = GraphSize(1_000_000, 10, 10**7, 0, 0, "given")

    def predicted(**section: Any) -> float:
        return (
            plan(dataclasses.replace(job, export=dataclasses.replace(job.export, **section)), size).disk["export"] / 1e6
        )

    numbers = 10 + 100 + 500
    assert predicted() == pytest.approx(2 * 4 * numbers, rel=0.11)
    assert predicted(formats=()) == pytest.approx(4 * numbers, rel=0.11)
    assert predicted(formats=(), layout="delta") == pytest.approx(4 * 500, rel=0.05)
    assert predicted(formats=(), precision="int8") == pytest.approx(numbers + 3 * 40 + 4 * 6, rel=0.01)
    assert predicted(formats=("parquet",), precision="float16") == pytest.approx(4 * numbers, rel=0.11)
