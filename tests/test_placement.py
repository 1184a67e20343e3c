"""Where tables lie: what TorchRec is told for each placement, what its modules make of it, and what is refused."""

from typing import Any

import pytest
import torch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import ShardingType
from toy import toy_job

from medscale.config import Job
from medscale.distributed import process_group
from medscale.errors import ConfigError, UnsupportedError
from medscale.jobfile import dump_job, parse_job
from medscale.model import embedding
from medscale.model.embedding import EntityTable, TableMemory, sharding_plan
from medscale.model.layout import layout_of
from medscale.optimizer import fused_optimizer
from medscale.sharding import placement_of

CPU = torch.device("cpu")
KERNELS = {"device": "fused", "uvm_caching": "fused_uvm_caching", "ssd": "key_value"}


def job_for(**runtime: Any) -> Job:
    return toy_job("transe", runtime={"device": "cuda", **runtime})


@pytest.mark.parametrize("memory", ["device", "uvm_caching", "ssd"])
@pytest.mark.parametrize("by", ["table_wise", "row_wise"])
def test_torchrec_is_told_kernel_workers_and_cache(memory: TableMemory, by: str) -> None:
    fraction = None if memory == "device" else 0.3
    job = job_for(workers=2, placement=by, table_memory=memory, cache_fraction=fraction)
    layout = layout_of(job.model, 90, 4)
    placement = placement_of(layout, job.runtime)
    plan = sharding_plan(embedding._collection(layout), placement, device_type="cuda", num_workers=2)
    assert plan.keys() == {block.name for block in layout.blocks}
    for name, parameter in plan.items():
        assert parameter.compute_kernel == KERNELS[memory]
        assert parameter.sharding_type == ShardingType[by.upper()].value
        assert parameter.ranks == ([0, 1] if by == "row_wise" else [placement.ranks[name]])
        cached = None if parameter.cache_params is None else parameter.cache_params.load_factor
        assert cached == fraction


def test_the_module_gets_kernel_and_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built on a CPU, where FBGEMM has no cache: what TorchRec hands to FBGEMM is looked at, not what a GPU does."""
    monkeypatch.setattr(embedding, "require_table_memory", lambda memory, device_type: None)
    job = job_for(table_memory="uvm_caching", cache_fraction=0.3)
    layout = layout_of(job.model, 90, 4)
    with process_group(CPU):
        table = EntityTable(
            layout, *fused_optimizer(job.optimizer, CPU), device=CPU, placement=placement_of(layout, job.runtime)
        )
        (lookup,) = table.sharded.module._lookups
        configs = [t for m in lookup._emb_modules for t in m.config.embedding_tables]
        assert {config.name for config in configs} == {block.name for block in layout.blocks}
        for config in configs:
            assert config.compute_kernel is EmbeddingComputeKernel.FUSED_UVM_CACHING
            assert config.fused_params["cache_load_factor"] == 0.3
        table.initialise(5, 0.1)
        before = table.all_rows().gather(torch.tensor([3, 7])).clone()
        table.rows(torch.tensor([3])).sum().backward()
        moved = (table.all_rows().gather(torch.tensor([3, 7])) != before).any(1)
        assert moved.tolist() == [True, False]


def test_places_that_this_machine_lacks_are_refused() -> None:
    layout = layout_of(job_for().model, 90, 4)
    for memory in ("uvm_caching", "ssd"):
        job = job_for(table_memory=memory)
        with pytest.raises(UnsupportedError, match=f"runtime.table_memory {memory} .* runs on the CPU"):
            EntityTable(
                layout, *fused_optimizer(job.optimizer, CPU), device=CPU, placement=placement_of(layout, job.runtime)
            )
    with pytest.raises(UnsupportedError, match=r"this build of FBGEMM lacks .* \(EmbeddingRocksDBWrapper\)"):
        embedding.require_table_memory("ssd", "cuda")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("placement: column_wise", r"runtime.placement: column_wise is refused: row-wise Adagrad .* model.block_units"),
        ("table_memory: ssd\n  device: cpu", "runtime.table_memory: ssd spares the memory of a GPU"),
        ("cache_fraction: 0.5", "runtime.cache_fraction: is for table_memory uvm_caching and ssd"),
        ("cache_fraction: 1.5", "runtime.cache_fraction: 1.5 is too large"),
    ],
)
def test_job_files_that_ask_for_the_impossible(line: str, problem: str) -> None:
    head = dump_job(toy_job("transe")).split("runtime:")[0]
    number = head.count("\n") + 2
    with pytest.raises(ConfigError, match=f"job.yaml:{number}: {problem}"):
        parse_job(f"{head}runtime:\n  {line}\n", "job.yaml")
