"""Bytes over the network: counted by hand, and in what real groups of processes hand to the collective calls."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_workers import in_group
from torch import Tensor
from toy import toy_job

from medscale.config import Job
from medscale.graph.reader import Graph, open_graph
from medscale.model.layout import Layout, layout_of
from medscale.sharding import placement_of, shares_of
from medscale.traffic import Traffic, bytes_per_step
from medscale.trainer import Trainer
from medscale.workers import Workers

#: blocks of 8, 12 and 20 columns
SIZES: dict[str, Any] = {"dims": (8, 20, 40), "tiers": {"phone": 8, "pc": 20, "server": 40}}


def job_for(workers: int, placement: str, scorer: str = "transe") -> Job:
    return toy_job(scorer, model=SIZES, runtime={"workers": workers, "placement": placement})


def layout_for(job: Job) -> Layout:
    return layout_of(job.model, 90, 4)


def test_whole_tables_counted_by_hand() -> None:
    """Worker 0 holds 20 columns in one table, worker 1 holds 12 + 8 in two; they look up 50 and 60 rows."""
    job = job_for(2, "table_wise")
    placement = placement_of(layout_for(job), job.runtime)
    assert [(s.rows, s.columns, s.blocks) for s in shares_of(layout_for(job), placement, 2)] == [
        (90, 20, 1),
        (90, 20, 2),
    ]
    relations = 4 * 40 * 4
    assert bytes_per_step(layout_for(job), placement, [50, 60]) == [
        Traffic(24 + 50 * 2 * 16, 60 * 20 * 4, 50 * 20 * 4, relations),
        Traffic(24 + 60 * 1 * 16, 50 * 20 * 4, 60 * 20 * 4, relations),
    ]


def test_spread_rows_cost_as_often_as_there_are_workers() -> None:
    """Four workers, 60 rows at most: each gets 3 partial sums of 60 rows of 40 columns from the others."""
    job = job_for(4, "row_wise")
    placement = placement_of(layout_for(job), job.runtime)
    by_rows = bytes_per_step(layout_for(job), placement, [60, 60, 60, 60])
    ids = 24 * 3 + 8 * 3 * (60 * 3 + 45)
    assert by_rows == [Traffic(ids, 3 * 60 * 40 * 4, 3 * 60 * 40 * 4, 2 * 3 * 4 * 40 * 4 // 4)] * 4
    whole = job_for(4, "table_wise")
    by_tables = bytes_per_step(layout_for(job), placement_of(layout_for(whole), whole.runtime), [60] * 4)
    assert sum(t.rows for t in by_rows) == 4 * sum(t.rows for t in by_tables)


def test_one_worker_sends_nothing() -> None:
    job = job_for(1, "table_wise")
    assert bytes_per_step(layout_for(job), placement_of(layout_for(job), job.runtime), [50])[0].total == 0


def counted(workers: Workers, job: Job, graph_directory: Path, run_directory: Path) -> tuple[int, int, dict[str, int]]:
    """Train a step; return its rows, the ids that others hold, and the bytes handed to calls for other workers."""
    trainer = Trainer(job, open_graph(graph_directory), run_directory, torch.device("cpu"), workers)
    trainer.initialise()
    sent = dict.fromkeys(("ids", "rows", "gradients", "relations"), 0)
    others = workers.size - 1

    def all_to_all(output: Tensor, input: Tensor, *rest: Any, **named: Any) -> Any:
        splits = named.get("input_split_sizes") or (rest[1] if len(rest) > 1 else None)
        own = input.numel() // workers.size if splits is None else splits[workers.rank]
        kind = "ids" if input.dtype == torch.int64 else "gradients" if sent["rows"] else "rows"
        sent[kind] += (input.numel() - own) * input.element_size()
        return real["all_to_all_single"](output, input, *rest, **named)

    def reduce_scatter(output: Tensor, input: Tensor, *rest: Any, **named: Any) -> Any:
        sent["rows"] += (input.numel() - output.numel()) * input.element_size()
        return real["reduce_scatter_tensor"](output, input, *rest, **named)

    def all_gather(output: Tensor, input: Tensor, *rest: Any, **named: Any) -> Any:
        sent["gradients"] += others * input.numel() * input.element_size()
        return real["all_gather_into_tensor"](output, input, *rest, **named)

    def all_reduce(tensor: Tensor, *rest: Any, **named: Any) -> Any:
        if tensor.numel() > 100:  # a ring sends each part of the numbers twice
            sent["relations"] += 2 * tensor.numel() * tensor.element_size() * others // workers.size
        return real["all_reduce"](tensor, *rest, **named)

    watched = {
        "all_to_all_single": all_to_all, "reduce_scatter_tensor": reduce_scatter,
        "all_gather_into_tensor": all_gather, "all_reduce": all_reduce,
    }  # fmt: skip
    real = {name: getattr(dist, name) for name in watched}
    for name, function in watched.items():
        setattr(dist, name, function)
    batch = trainer.batches.batch(0)
    trainer.train_step(batch)
    held = -(-trainer.layout.num_entities // workers.size)
    elsewhere = int((batch.entities_U // held != workers.rank).sum())
    return len(batch.entities_U), elsewhere, sent


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("placement", ["table_wise", "row_wise"])
def test_what_a_real_group_sends(toy_graph: Graph, tmp_path: Path, size: int, placement: str) -> None:
    job = job_for(size, placement)
    layout = layout_of(job.model, toy_graph.num_entities, toy_graph.num_relations)
    results = in_group(size, tmp_path, counted, job, toy_graph.directory, tmp_path / "run")
    rows_W = [rows for rows, _, _ in results]
    assert len(set(rows_W)) > 1, "workers look up different numbers of rows"
    expected = bytes_per_step(layout, placement_of(layout, job.runtime), rows_W)
    for (rows, elsewhere, sent), traffic in zip(results, expected, strict=True):
        found = Traffic(**sent)
        if placement == "row_wise":  # whose rows they are is a matter of chance
            by_chance = rows * (size - 1) // size
            found = dataclasses.replace(found, ids=found.ids + 8 * 3 * (by_chance - elsewhere))
        assert found == traffic
