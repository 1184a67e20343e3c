"""Filtered evaluation of every sub-model: `python -m medscale.evaluate JOB_OR_RUN`.

Writes into the run directory: `evaluation.json` (the records, see `ranking.records_of`), `evaluation_summary.json`
(parameters, MRR per million parameters, ability retention, what was ranked) and `evaluation_by_relation.csv`; with
`_valid` or `_test` in their names where the split is not the job's own.
"""

import argparse
import csv
import dataclasses
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from medscale.checkpoint import Tables, newest_checkpoint, open_tables
from medscale.config import Job
from medscale.distributed import choose_device, choose_threads
from medscale.errors import CheckpointError, GraphError
from medscale.graph.known_triples import KnownTriples
from medscale.graph.reader import Graph
from medscale.logs import console, log, progress
from medscale.options import job_parser, run_command, run_of
from medscale.ranking import (
    EntityRows,
    Ranks,
    ability_retention,
    count_halves,
    records_of,
    relation_records,
    sample_triples,
)
from medscale.storage import write_atomic, write_json
from medscale.workers import Workers

__all__ = ["PROTOCOL", "evaluate", "main", "print_table", "rank_tables", "tables_and_triples"]

PROTOCOL = "filtered by train+valid+test, realistic ranks for ties, all entities as candidates"


def evaluate(
    job: Job, graph: Graph, run_directory: Path, *, split: str | None = None, step: int | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rank a split with the best step of a run (or `step`), write the results, and return (records, summary).

    Raises:
        CheckpointError: no usable checkpoint, or one trained on another graph.
        GraphError: the split is empty.

    """
    split = split or job.evaluate.split
    tables, triples = tables_and_triples(job, graph, run_directory, split=split, step=step)
    start = time.monotonic()
    ranks = rank_tables(job, graph, tables, triples, split)
    records = records_of(ranks, split)
    summary = _summary(tables, graph, ranks, records, split, time.monotonic() - start)
    by_relation = relation_records(ranks, triples[:, 1], graph.relation_names().to_pylist())
    # The files of the job's own split keep their names whatever else is ranked.
    suffix = "" if split == job.evaluate.split else f"_{split}"
    write_json(run_directory / f"evaluation{suffix}.json", records)
    write_json(run_directory / f"evaluation_summary{suffix}.json", summary)
    _write_csv(run_directory / f"evaluation_by_relation{suffix}.csv", by_relation)
    return records, summary


def tables_and_triples(
    job: Job, graph: Graph, run_directory: Path, *, split: str, step: int | None
) -> tuple[Tables, NDArray[np.int64]]:
    """Return the tables of a run's best step (or of `step`), and the int64 [T, 3] triples of a split to rank.

    Raises:
        CheckpointError: no usable checkpoint, or one trained on another graph.
        GraphError: the split is empty.

    """
    tables = open_tables(newest_checkpoint(run_directory, step))
    if tables.facts["graph_sha256"] != graph.sha256:
        raise CheckpointError(
            f"{tables.checkpoint.directory} was trained on another graph than {graph.directory}; train anew"
        )
    triples = sample_triples(graph.triples(split), job.evaluate.max_triples, job.seed)
    if not len(triples):
        raise GraphError(f"{graph.directory}: the {split} split is empty; name files or a fraction in the job")
    return tables, triples


def rank_tables(
    job: Job, graph: Graph, tables: Tables, triples: NDArray[np.int64], what: str,
    as_shipped: Callable[[EntityRows], EntityRows] = lambda rows: rows,
) -> Ranks:  # fmt: skip
    """Return the ranks of int64 [T, 3] triples among all entities, in as many parts in turn as workers held the table.

    `as_shipped` is what becomes of the rows before they are ranked with; `what` names the progress.
    """
    dims, parts = tables.layout.dims, job.runtime.workers
    # The driver of several workers may run where there is no GPU.
    runtime = dataclasses.replace(job.runtime, device="auto") if parts > 1 else job.runtime
    device = choose_device(runtime)
    choose_threads(job.runtime)
    known, mentioned = KnownTriples.of_graph(graph, about=triples), np.unique(triples[:, [0, 2]])
    halves_2nT = np.zeros((2, len(dims), len(triples)), dtype=np.int64)
    with progress(f"ranking {what}", 2 * parts * len(triples), "queries") as advance:
        for part in range(parts):
            rows = tables.shard(Workers(part, parts).share(tables.layout.num_entities), mentioned)
            halves_2nT += count_halves(
                triples, as_shipped(rows.to(device)), tables.relation_table.to(device), tables.layout, known,
                memory_mib=job.evaluate.memory_mib, kernels=job.runtime.kernels, advance=advance,
            )  # fmt: skip
    return Ranks.of_halves(dims, halves_2nT)


def _summary(
    tables: Tables, graph: Graph, ranks: Ranks, records: Sequence[dict[str, Any]], split: str, seconds: float
) -> dict[str, Any]:
    """Return what the records alone do not say."""
    layout = tables.layout
    field = {r["dim"]: r["mrr"] for r in records if r["protocol"] == "field" and r["side"] == "both"}
    millions = {dim: layout.num_parameters(dim) / 1e6 for dim in layout.dims}
    return {
        "job": tables.facts["job_name"],
        "step": tables.facts["step"],
        "split": split,
        "protocol": PROTOCOL,
        "triples_ranked": ranks.head.shape[1],
        "triples_in_split": graph.num_triples[split],
        "unseen_dropped": bool(tables.facts["job"]["graph"]["drop_unseen"]),
        "parameters_million": millions,
        "effi_mrr_per_million_parameters": {dim: field[dim] / millions[dim] for dim in layout.dims},
        "ability_retention_ratio": ability_retention(ranks.of("both") <= 10),
        "seconds": round(seconds, 2),
        "torch": torch.__version__,
    }


def _write_csv(path: Path, rows: Any) -> None:
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def print_table(records: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Print one line per sub-model: the field's protocol, both sides, and the paper's MRR beside it."""
    table = Table(title=f"{summary['job']}, step {summary['step']:,}, {summary['split']}", caption=(
        f"{summary['triples_ranked']:,} of {summary['triples_in_split']:,} triples, both sides; {PROTOCOL}"
        f"{'; triples with unseen entities were dropped' if summary['unseen_dropped'] else ''}. "
        f"Ability retention {summary['ability_retention_ratio']:.3f}: of the queries that some sub-model answers among "
        "its first ten, the share that every larger one answers too. Effi: MRR per million parameters."
    ))  # fmt: skip
    for heading in (
        "dim",
        "MRR",
        "Hits@1",
        "Hits@3",
        "Hits@10",
        "mean rank",
        "MRR (paper's)",
        "M parameters",
        "Effi",
    ):
        table.add_column(heading, justify="right")
    paper = {r["dim"]: r["mrr"] for r in records if r["protocol"] == "paper"}
    for record in records:
        if record["protocol"] != "field" or record["side"] != "both":
            continue
        dim = record["dim"]
        figures = [f"{record[k]:.4f}" for k in ("mrr", "hits@1", "hits@3", "hits@10")]
        table.add_row(
            str(dim), *figures, f"{record['mean_rank']:,.1f}", f"{paper[dim]:.4f}",
            f"{summary['parameters_million'][dim]:.3f}",
            f"{summary['effi_mrr_per_million_parameters'][dim]:.3f}",
        )  # fmt: skip
    console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = job_parser(
        "evaluate",
        "Rank a split with every sub-model of a trained job: filtered, both sides, all entities.",
        or_run=True,
    )
    parser.add_argument("--split", choices=("test", "valid"), help="default: the job's evaluate.split")
    parser.add_argument(
        "--step", type=int, help="checkpoint to rank with (default: the best on validation, else the newest)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the records as JSON lines on stdout instead of a table"
    )
    return run_command(lambda: _main(parser.parse_args(argv)))


def _main(arguments: argparse.Namespace) -> int:
    from medscale.prepare import prepare

    job, run_directory = run_of(arguments.job, arguments.runs_dir)
    graph = prepare(job, data_root=arguments.data_dir, graphs_root=arguments.graphs_dir)
    records, summary = evaluate(job, graph, run_directory, split=arguments.split, step=arguments.step)
    if arguments.json:
        for record in records:
            print(json.dumps(record))
    else:
        print_table(records, summary)
        log(f"written: evaluation files in {run_directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
