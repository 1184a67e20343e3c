"""Training on graphs of the SKG's shape, 70 thousand to 7 million entities: triples/s, memory, time per epoch.

usage: python tools/bench/skg_scale.py [--entities ...] [--block-units ...] [--graphs-dir DIR] [--quick] [--json]

The job is jobs/skg.yaml (TransE, tiers of 10, 100 and 500 units, 8,192 triples per step, 64 negatives shared by chunks
of 32) on graphs that the generator makes with as many triples per entity as the paper's SKG has: 50,775,620 draws for
6,974,959 entities. Each size trains in a process of its own, through the trainer and its readers as they are; nothing
is validated or saved. `triples_per_s` is the median over windows of steps after a warm-up, `slowest_window_per_s` the
slowest of them, `peak_mib` the process's most memory, `grown_mib` what it grew by from the first window to the last,
`epoch_s` what an epoch takes at that rate, and `times_smallest` the cost of a triple over that in the smallest graph.
Graphs are kept in `--graphs-dir`, if given, and used again.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch
from measure import in_own_process, peak_mib, resident_mib
from records import Record, options, parse, publish

from medscale.config import Job, SyntheticSection
from medscale.distributed import process_group
from medscale.graph.reader import open_graph
from medscale.graph.synthetic import kind_sizes
from medscale.jobfile import load_job
from medscale.logs import log
from medscale.prepare import prepare
from medscale.trainer import Trainer

JOB = Path(__file__).resolve().parents[2] / "jobs" / "skg.yaml"
ENTITIES = (69_750, 697_496, 6_974_959)
WINDOWS = 8


def job_of(entities: int, block_units: int | None) -> Job:
    """Return the SKG's job with a graph of about as many entities, and triples in proportion."""
    job = load_job(JOB)
    whole = job.graph.synthetic
    assert whole is not None
    share = entities / sum(kind_sizes(whole).values())
    synthetic = SyntheticSection(
        num_users=round(whole.num_users * share), num_triples=round(whole.num_triples * share),
        num_communities=whole.num_communities,
    )  # fmt: skip
    graph = dataclasses.replace(job.graph, synthetic=synthetic, name=f"skg-{entities}")
    return dataclasses.replace(job, graph=graph, model=dataclasses.replace(job.model, block_units=block_units))


def measured(job: Job, graph_directory: Path, threads: int, steps: int) -> Record:
    """Train some steps in windows, and return the record of a size."""
    graph, device = open_graph(graph_directory, verify=False), torch.device("cpu")
    with process_group(device) as workers, tempfile.TemporaryDirectory() as run:
        trainer = Trainer(job, graph, Path(run), device, workers)
        trainer.initialise()
        batches = trainer._prefetched()
        rates, resident = [], []
        for window in range(WINDOWS + 1):
            start, trained = time.perf_counter(), 0.0
            for _ in range(max(1, steps // WINDOWS)):
                batch = next(batches)
                trainer.train_step(batch)
                trained += batch.num_triples
            if window:  # the first one warms up
                rates.append(trained / (time.perf_counter() - start))
                resident.append(resident_mib())
        rate = statistics.median(rates)
        return {
            "scorer": job.model.scorer, "system": "medscale", "sub_models": len(job.model.dims), "threads": threads,
            "batch": job.train.batch_size, "negatives": job.negatives.number, "units": job.model.dims[-1], "workers": 1,
            "entities": graph.num_entities, "triples": graph.num_triples["train"],
            "blocks": len(trainer.layout.blocks), "steps": WINDOWS * max(1, steps // WINDOWS),
            "triples_per_s": round(rate, 1), "slowest_window_per_s": round(min(rates), 1),
            "peak_mib": round(peak_mib(), 1), "grown_mib": round(resident[-1] - resident[0], 1),
            "epoch_s": round(graph.num_triples["train"] / rate, 1),
        }  # fmt: skip


def main() -> None:
    """Measure what the options ask for."""
    parser = options(__doc__ or "", threads=[2])
    parser.add_argument("--entities", nargs="+", type=int, default=list(ENTITIES), metavar="N")
    parser.add_argument(
        "--block-units", nargs="+", type=int, default=[load_job(JOB).model.block_units], metavar="N",
        help="columns are cut into tables of about this many units at most; default: the job's",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="steps measured of each size")
    parser.add_argument("--graphs-dir", type=Path, metavar="DIR", help="where graphs are kept; default: nowhere")
    arguments = parse(parser, entities=[7_000, 70_000], steps=24)
    records = []
    with tempfile.TemporaryDirectory() as temporary:
        graphs = arguments.graphs_dir or Path(temporary)
        for entities in arguments.entities:
            for block_units in arguments.block_units:
                job = job_of(entities, block_units)
                directory = Path(str(prepare(job, data_root=graphs, graphs_root=graphs).directory))
                for threads in arguments.threads:
                    log(f"{entities:,} entities, tables of {block_units} units, {threads} threads")
                    records.append(in_own_process(threads, measured, job, directory, threads, arguments.steps))
    for record in records:
        alike = (record["blocks"], record["threads"])
        smallest = next(r for r in records if (r["blocks"], r["threads"]) == alike)
        record["times_smallest"] = round(smallest["triples_per_s"] / record["triples_per_s"], 3)
    publish(arguments, records)


if __name__ == "__main__":
    main()
