"""Peak memory of training steps by batch, units and sub-models.

usage: python tools/bench/memory.py [--data-dir DIR] [--scorers ...] [--sharing ...] [--quick] [--json]

`peak_mib` is the largest resident set of a process that trains 3 steps on FB15k-237 with the real Trainer, 64
negatives per positive, rowwise Adagrad: interpreter, libraries, graph and tables (14,541 entities) included. `step_mib`
is how much of it came with the steps. Every combination has a process of its own.
"""

import itertools
from pathlib import Path

import torch
from measure import in_own_process, peak_mib, reset_peak, resident_mib
from records import Record, options, parse, publish
from workload import SCORERS, SHARING, add_data_option, dims_of, job_of, prepared_graph

from medscale.distributed import process_group
from medscale.graph.reader import open_graph
from medscale.logs import log
from medscale.trainer import Trainer

STEPS = 3


def record_of(
    scorer: str, sharing: str, batch: int, units: int, sub_models: int, threads: int, graph_directory: Path
) -> Record:
    """Train some steps."""
    device, graph = torch.device("cpu"), open_graph(graph_directory, verify=False)
    job = job_of(scorer, dims_of(sub_models, units), sharing, threads=threads, batch=batch)
    with process_group(device):
        trainer = Trainer(job, graph, Path(), device)
        trainer.initialise()
        reset_peak()
        before = resident_mib()
        for _, prepared in zip(range(STEPS), trainer._prefetched(), strict=False):
            trainer.train_step(prepared)
    return {
        "scorer": scorer, "sharing": sharing, "system": "medscale", "threads": threads, "batch": batch,
        "negatives": 64, "units": units, "sub_models": sub_models, "peak_mib": round(peak_mib(), 1),
        "step_mib": round(peak_mib() - before, 1),
    }  # fmt: skip


def main() -> None:
    parser = options(__doc__, threads=(1,))
    add_data_option(parser)
    parser.add_argument("--scorers", nargs="+", choices=SCORERS, default=["transe", "complex"])
    parser.add_argument("--sharing", nargs="+", choices=SHARING, default=tuple(SHARING))
    parser.add_argument("--batch", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--units", nargs="+", type=int, default=[100, 640])
    parser.add_argument("--sub-models", nargs="+", type=int, default=[1, 16, 64])
    arguments = parse(parser, scorers=["transe"], sharing=["chunk32"], batch=[1024], units=[640], sub_models=[1, 64])
    sizes = itertools.product(
        arguments.threads, arguments.scorers, arguments.sharing, arguments.batch, arguments.units, arguments.sub_models
    )
    records = []
    with prepared_graph(arguments.data_dir) as graph_directory:
        for threads, *size in sizes:
            log(" ".join(map(str, size)))
            records.append(in_own_process(threads, record_of, *size, threads, graph_directory))
    publish(arguments, records)


if __name__ == "__main__":
    main()
