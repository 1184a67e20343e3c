"""Filtered ranking of FB15k-237's test triples by all entities: 64 sub-models against the largest alone.

usage: python tools/bench/ranking.py [--data-dir DIR] [--triples N] [--scorers ...] [--quick] [--json]

Both sides of every triple (20,466, or a sample) are ranked among all 14,541 entities, with random tables of 640
units. `seconds` is the time of `medscale.ranking.rank_all`, after a few triples to warm up, and `peak_mib` the most
memory that it takes above the tables, the graph and the known triples. `times_one` is the time over that of one
sub-model. The system `gemm` is what no product can do without: the largest model's scores by `torch.matmul`, 1,024
queries at a time, compared with the true answers', with no answers filtered out. Each measurement has a process of
its own, pinned to as many cores as threads.
"""

import time
from pathlib import Path
from typing import Any

import torch
from measure import in_own_process, peak_mib, reset_peak, resident_mib
from numpy.typing import NDArray
from records import Record, options, parse, publish
from torch import Tensor
from workload import SCORERS, add_data_option, dims_of, model_of, prepared_graph

from medscale.graph.known_triples import KnownTriples
from medscale.graph.reader import open_graph
from medscale.logs import log
from medscale.model.embedding import TableRows, initial_relations
from medscale.model.layout import Layout, layout_of
from medscale.model.scoring import scorer_of
from medscale.ranking import rank_all, sample_triples

UNITS = 640
QUERIES = 1024
WARM_UP = 64


def record_of(
    scorer: str, system: str, sub_models: int, triples: int | None, threads: int, graph_directory: Path
) -> Record:
    """Rank with one model."""
    graph = open_graph(graph_directory, verify=False)
    layout = layout_of(model_of(scorer, dims_of(sub_models, UNITS)), graph.num_entities, graph.num_relations)
    torch.manual_seed(0)
    entities_NC = torch.randn(graph.num_entities, layout.num_columns)
    relations_RC = initial_relations(layout, seed=0, scale=1.0)
    known = KnownTriples.of_graph(graph)
    sample = sample_triples(graph.triples("test"), triples, seed=0)

    def rank(some: NDArray[Any]) -> None:
        if system == "gemm":
            compare_products(some, entities_NC, relations_RC, layout)
        else:
            rank_all(some, TableRows([entities_NC], layout.num_columns), relations_RC, layout, known)

    reset_peak()
    before = resident_mib()
    rank(sample[:WARM_UP])
    start = time.perf_counter()
    rank(sample)
    seconds = time.perf_counter() - start
    return {
        "scorer": scorer, "system": system, "sub_models": sub_models, "units": UNITS, "threads": threads,
        "batch": QUERIES, "negatives": graph.num_entities, "triples": len(sample), "seconds": round(seconds, 3),
        "triples_per_s": round(len(sample) / seconds, 1), "peak_mib": round(peak_mib() - before, 1),
    }  # fmt: skip


def compare_products(triples: NDArray[Any], entities_NC: Tensor, relations_RC: Tensor, layout: Layout) -> None:
    """Count entities that score better than the true answer, or the same, in the largest model."""
    heads, relations, tails = torch.from_numpy(triples).T
    for side, known, target in (("tail", heads, tails), ("head", tails, heads)):
        for part in torch.arange(len(triples)).split(QUERIES):
            query_QC = layout.scorer.query(entities_NC[known[part]], relations_RC[relations[part]], side)
            scores_QN = query_QC @ entities_NC.T
            target_Q1 = scores_QN.gather(1, target[part].unsqueeze(1))
            (scores_QN > target_Q1).sum(1)
            (scores_QN == target_Q1).sum(1)


def records_of(scorer: str, triples: int | None, threads: int, graph_directory: Path) -> list[Record]:
    """Rank with one sub-model and with 64; products by plain matrix products too."""
    log(f"{scorer}, {threads} threads")
    cases = [("medscale", 1), ("medscale", 64)]
    if not scorer_of(model_of(scorer, dims_of(1))).is_distance:
        cases.append(("gemm", 1))
    records = [in_own_process(threads, record_of, scorer, *c, triples, threads, graph_directory) for c in cases]
    return [{**r, "times_one": round(r["seconds"] / records[0]["seconds"], 3)} for r in records]


def main() -> None:
    parser = options(__doc__, threads=(2,))
    add_data_option(parser)
    parser.add_argument("--scorers", nargs="+", choices=SCORERS, default=["transe", "rotate", "complex", "pairre"])
    parser.add_argument("--triples", type=int, help="rank a sample of this many; default: all")
    arguments = parse(parser, threads=[1], scorers=["transe", "complex"], triples=200)
    with prepared_graph(arguments.data_dir) as graph_directory:
        records = [
            record
            for threads in arguments.threads
            for scorer in arguments.scorers
            for record in records_of(scorer, arguments.triples, threads, graph_directory)
        ]
    publish(arguments, records)


if __name__ == "__main__":
    main()
