"""Reading training triples, partition by partition, shuffled: by a thread of the worker, or by reader actors.

usage: python tools/bench/readers.py [--readers ...] [--entities N] [--graphs-dir DIR] [--quick] [--json]

The graph is one of skg_scale's. A worker takes batches of 8,192 triples as fast as they come, an epoch to warm files
and processes up and then as many as fill some seconds; `triples_per_s` counts what arrived. 0 readers: the worker's
own thread reads, one partition ahead. Else Ray actors read, one partition ahead for each. `reader_triples_per_s` is
what each reader does while it is busy, `waiting` the share of the time that the worker waited, and `peak_mib` the
memory of all readers together (their own, without what they share with the worker).
"""

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from measure import private_mib
from records import Record, options, parse, publish
from skg_scale import job_of

from medscale.batches.partitions import Feed, PartitionReader
from medscale.config import Job
from medscale.graph.reader import Graph
from medscale.logs import log
from medscale.prepare import prepare
from medscale.readers import feed_of, start_readers

BATCH = 8192


def consumed(feed: Feed, seconds: float) -> tuple[float, float]:
    """Return (triples/s, share of the time spent waiting) of whole epochs, after one to warm up."""
    number = len(feed.order)

    def epoch(which: int) -> None:
        for start in range(0, number, BATCH):
            feed.triples(which, start, min(start + BATCH, number))

    epoch(0)
    start, waited, epochs = time.perf_counter(), feed.waited, 0
    while epochs < 2 or time.perf_counter() - start < seconds:
        epochs += 1
        epoch(epochs)
    elapsed = time.perf_counter() - start
    return epochs * number / elapsed, (feed.waited - waited) / elapsed


def measured(job: Job, graph: Graph, seconds: float) -> Record:
    """Return the record of a job's readers."""
    actors: list[Any] = start_readers(job, graph)
    feed = feed_of(actors, job, graph) if actors else Feed.of(PartitionReader(graph, job.seed))
    rate, waiting = consumed(feed, seconds)
    described = feed.described()
    pids = [ray.get(actor.pid.remote()) for actor in actors] or [os.getpid()]
    memory = sum(map(private_mib, pids))
    record = {
        "scorer": "none", "system": "reader actors" if actors else "own thread", "sub_models": 0, "threads": 1,
        "batch": BATCH, "negatives": 0, "units": 0, "readers": len(actors), "triples": graph.num_triples["train"],
        "triples_per_s": round(rate, 1), "waiting": round(waiting, 3), "peak_mib": round(memory, 1),
        "reader_triples_per_s": described["reader_triples_per_s"],
    }  # fmt: skip
    for actor in actors:
        ray.kill(actor)
    return record


def main() -> None:
    """Measure what the options ask for."""
    parser = options(__doc__ or "", threads=[1])
    parser.add_argument("--readers", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    parser.add_argument("--entities", type=int, default=697_496, metavar="N")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="measured of each")
    parser.add_argument("--graphs-dir", type=Path, metavar="DIR", help="where graphs are kept; default: nowhere")
    arguments: argparse.Namespace = parse(parser, entities=300_000, readers=[0, 2], seconds=2.0)
    paths = os.pathsep.join(str(folder) for folder in (Path(__file__).parents[2], Path(__file__).parent))
    ray.init(
        address="local", include_dashboard=False, logging_level="warning", log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        graphs = arguments.graphs_dir or Path(temporary)
        job = job_of(arguments.entities, None)
        graph, records = prepare(job, data_root=graphs, graphs_root=graphs), []
        for readers in arguments.readers:
            log(f"{readers} readers")
            runtime = dataclasses.replace(job.runtime, readers=readers)
            records.append(measured(dataclasses.replace(job, runtime=runtime), graph, arguments.seconds))
    ray.shutdown()
    publish(arguments, records, ("ray",))


if __name__ == "__main__":
    main()
