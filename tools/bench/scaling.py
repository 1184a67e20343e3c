"""One worker and two on a CPU: strong and weak scaling, the share of communication, and what the plan predicted.

usage: python tools/bench/scaling.py [--entities N] [--graphs-dir DIR] [--quick] [--json]

The job is skg_scale's (TransE, tiers of 10, 100 and 500 units, six tables) on a generated graph, an epoch of it, run by
`medscale.train`: one worker in a process of its own with one core, two as Ray's with a core each, over gloo. `strong`
gives two workers the one's batch, `weak` a batch twice as large. Figures come from the run's own metrics.jsonl:
`triples_per_s` is the median over its records, `times_one` that over one worker's. At each record a step's collective
calls are timed: `collective_ms` by kind, those that overlap counted once in `together`, waiting for the other worker
included; `communication` is their share of a step. `mib_per_step` is what the worker that sends most sends in a step,
counted from the rows that its batches look up, beside the plan's `planned_mib_per_step`. `peak_mib` is the larger
worker's peak memory while it trains, beside the plan's `planned_mib` (without ranking, which comes later).
"""

import dataclasses
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from measure import in_own_process
from records import Record, options, parse, publish
from skg_scale import job_of

from medscale.config import Job
from medscale.graph.reader import Graph, open_graph
from medscale.logs import log
from medscale.model.layout import layout_of
from medscale.plan import plan, size_of
from medscale.prepare import prepare
from medscale.sharding import placement_of
from medscale.traffic import bytes_per_step
from medscale.train import train
from medscale.trainer import batches_of
from medscale.workers import Workers

MIB = 2**20


def trained(job: Job, graph_directory: str, run_directory: str) -> list[dict[str, Any]]:
    """Run the job; return its training records but for the first, which warms up."""
    os.environ["RAY_ADDRESS"] = "local"
    train(job, open_graph(Path(graph_directory), verify=False), Path(run_directory))
    lines = (Path(run_directory) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"][1:]


def sent_mib(job: Job, graph: Graph) -> float:
    """Return the MiB that the worker that sends most sends in the first step, by the rows it looks up."""
    workers, layout = job.runtime.workers, layout_of(job.model, graph.num_entities, graph.num_relations)
    rows_W = [len(batches_of(job, graph, Workers(rank, workers)).batch(0).entities_U) for rank in range(workers)]
    return max(traffic.total for traffic in bytes_per_step(layout, placement_of(layout, job.runtime), rows_W)) / MIB


def record_of(name: str, job: Job, graph: Graph, graphs: Path) -> Record:
    """Run a job and return its record."""
    workers = job.runtime.workers
    with tempfile.TemporaryDirectory() as run:
        told = in_own_process(workers, trained, job, str(graph.directory), run)
    rate = statistics.median(record["triples_per_s"] for record in told)
    step_ms = 1000 * job.train.batch_size / rate
    predicted = plan(job, size_of(job, graphs, graphs))
    kinds = [kind for kind in told[0] if kind.endswith("_ms")]
    calls = {kind[:-3]: round(statistics.median(max(r[kind].values()) for r in told), 3) for kind in kinds}
    return {
        "scorer": job.model.scorer, "system": name, "sub_models": len(job.model.dims), "threads": 1,
        "batch": job.train.batch_size, "negatives": job.negatives.number, "units": job.model.dims[-1],
        "workers": workers, "entities": graph.num_entities, "triples_per_s": round(rate, 1),
        "ms_per_step": round(step_ms, 3), "collective_ms": calls,
        "communication": round(calls.get("together", 0.0) / step_ms, 3),
        "mib_per_step": round(sent_mib(job, graph), 3),
        "planned_mib_per_step": round(predicted.traffic.total / MIB, 3),
        "peak_mib": max(max(record["peak_memory_mib"].values()) for record in told),
        "planned_mib": round(sum(v for part, v in predicted.memory.host.items() if part != "ranking") / MIB, 1),
    }  # fmt: skip


def main() -> None:
    """Measure what the options ask for."""
    parser = options(__doc__ or "", threads=[1])
    parser.add_argument("--entities", type=int, default=348_748, metavar="N")
    parser.add_argument("--batch", type=int, default=8192, metavar="N", help="triples per step of one worker")
    parser.add_argument("--graphs-dir", type=Path, metavar="DIR", help="where graphs are kept; default: nowhere")
    arguments = parse(parser, entities=10_000, batch=1024)
    with tempfile.TemporaryDirectory() as temporary:
        graphs = arguments.graphs_dir or Path(temporary)
        job = job_of(arguments.entities, 100)
        graph = prepare(job, data_root=graphs, graphs_root=graphs)
        assert isinstance(graph.directory, Path)
        records = []
        for name, workers, times in (("one", 1, 1), ("strong", 2, 1), ("weak", 2, 2)):
            log(f"{name}: {workers} workers")
            steps = graph.num_triples["train"] // (times * arguments.batch)
            section = dataclasses.replace(
                job.train, epochs=1, batch_size=times * arguments.batch, validate_every=0, log_every=max(1, steps // 12)
            )
            runtime = dataclasses.replace(job.runtime, workers=workers, threads=1, memory_gib=8.0)
            changed = dataclasses.replace(job, train=section, runtime=runtime)
            records.append(record_of(name, changed, graph, graphs))
    for record in records:
        record["times_one"] = round(record["triples_per_s"] / records[0]["triples_per_s"], 3)
    publish(arguments, records, ("ray",))


if __name__ == "__main__":
    main()
