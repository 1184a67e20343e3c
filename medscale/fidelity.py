"""What precisions cost, with every tier ranked as its rows decode: `medscale export --report`.

A tier's rows are coded cut by cut (`medscale.runtime.precision`), so a row of the largest tier, coded at a precision,
begins with the rows of all smaller ones as they are shipped at it. One pass of the ranking per precision therefore
serves all tiers: filtered, both sides, all entities, realistic ranks, by the code that evaluates a run. Rows are coded
and decoded as they are ranked, a chunk at a time; relations are float32 at every precision. `python -m
medscale.fidelity JOB_OR_RUN` measures without exporting anew.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from medscale.checkpoint import Tables
from medscale.config import Job
from medscale.evaluate import PROTOCOL, rank_tables, tables_and_triples
from medscale.formats import format_records, formats_table
from medscale.graph.reader import Graph
from medscale.logs import console, log
from medscale.model.layout import Layout
from medscale.options import job_parser, run_command, run_of
from medscale.ranking import EntityRows, records_of
from medscale.runtime.precision import PRECISIONS, Precision, decode, encode, row_bytes
from medscale.split import check_tiers
from medscale.storage import write_json

__all__ = [
    "REPORT",
    "bytes_per_entity",
    "main",
    "precision_records",
    "precisions_table",
    "print_report",
    "write_report",
]

REPORT = "export_report.json"
#: a precision that keeps less of float32's MRR is marked
KEPT = 0.99
_METRICS = ("mrr", "hits@1", "hits@10")


def write_report(
    job: Job, graph: Graph, run_directory: Path, tiers: Mapping[str, int], step: int | None = None,
    *, export: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Rank tiers (name: units) at every precision, measure what is exported, and write `export_report.json`.

    The split is that of the job's `evaluate`, its sample too. `step` is the checkpoint's: by default the best one.
    "precisions" of the report holds the records of `precision_records`, "formats" those of `medscale.formats` for
    every tier of `export` (default: the run's own).

    Raises:
        CheckpointError: no usable checkpoint, or one trained on another graph.
        ConfigError: a tier is not a sub-model.
        ExportError: an exported tier is damaged.
        GraphError: the split is empty.

    """
    split = job.evaluate.split
    tables, triples = tables_and_triples(job, graph, run_directory, split=split, step=step)
    check_tiers(tiers, tables.layout.dims)
    report = {
        "job": job.name,
        "step": tables.facts["step"],
        "split": split,
        "protocol": PROTOCOL,
        "triples_ranked": len(triples),
        "triples_in_split": graph.num_triples[split],
        "precisions": precision_records(job, graph, tables, tiers, triples),
        "formats": format_records(export or run_directory / "export", triples),
    }
    write_json(run_directory / REPORT, report)
    return report


def precision_records(
    job: Job, graph: Graph, tables: Tables, tiers: Mapping[str, int], triples: NDArray[np.int64]
) -> list[dict[str, Any]]:
    """Return a record per tier and precision, smallest tier first.

    {"tier", "units", "precision", "mrr", "hits@1", "hits@10", "share_of_float32" (of its MRR), "bytes_per_entity",
    "marked" (it loses more than 1% of float32's MRR)}. A precision that cannot hold a tier's numbers has no records.
    """
    layout, cuts = tables.layout, sorted(set(tiers.values()))
    quality: dict[Precision, dict[int, dict[str, float]]] = {}
    for precision in PRECISIONS:
        shipped = functools.partial(_CodedRows, coding=_Coding(precision, _widths(layout, cuts)))
        try:
            ranks = rank_tables(job, graph, tables, triples, precision, shipped)
        except OverflowError:
            log(f"{precision} cannot hold this table's numbers (beyond 65,504); it is left out of {REPORT}")
            continue
        both = (r for r in records_of(ranks, "") if (r["protocol"], r["side"]) == ("field", "both"))
        quality[precision] = {r["dim"]: {name: r[name] for name in _METRICS} for r in both}
    records = []
    for tier, units in sorted(tiers.items(), key=lambda item: (item[1], item[0])):
        for precision, by_units in quality.items():
            share = by_units[units]["mrr"] / quality["float32"][units]["mrr"]
            records.append({
                "tier": tier, "units": units, "precision": precision, **by_units[units], "share_of_float32": share,
                "bytes_per_entity": bytes_per_entity(layout, [c for c in cuts if c <= units], precision),
                "marked": share < KEPT,
            })  # fmt: skip
    return records


def bytes_per_entity(layout: Layout, cuts: Sequence[int], precision: Precision) -> int:
    """Return what an entity's row takes in a tier of these cuts (units, rising): numbers, scales and norms, no name."""
    widths = [width * layout.scorer.unit_columns for width in np.diff([0, *cuts]).tolist()]
    return row_bytes(widths, precision, norms=not layout.scorer.is_distance)


def _widths(layout: Layout, cuts: Sequence[int]) -> list[int]:
    """Return the columns of each cut of the whole row; what no tier has is one more cut."""
    ends = sorted({0, *cuts, layout.dims[-1]})
    return [int(width) * layout.scorer.unit_columns for width in np.diff(ends)]


@dataclass(frozen=True)
class _Coding:
    """Rows there and back."""

    precision: Precision
    #: columns of each cut
    widths: Sequence[int]

    def __call__(self, rows_NC: Tensor) -> Tensor:
        """Return rows as they decode from what a tier stores of them."""
        rows = rows_NC.cpu().numpy()
        ends = np.cumsum(self.widths)
        cuts = (rows[:, end - width : end] for end, width in zip(ends, self.widths, strict=True))
        coded = [encode(np.ascontiguousarray(cut), self.precision) for cut in cuts]
        scales = [scales_N for _, scales_N in coded if scales_N is not None]
        stored_NW = np.concatenate([stored for stored, _ in coded], 1)
        decoded = decode(stored_NW, np.stack(scales, 1) if scales else None, self.precision, self.widths)
        return torch.from_numpy(decoded).to(rows_NC.device)


@dataclass(frozen=True)
class _CodedRows:
    """The entity table as it is after coding; `EntityRows` for the ranking."""

    rows: EntityRows
    coding: _Coding

    @property
    def candidates(self) -> range:
        """The entities to rank against."""
        return self.rows.candidates

    def gather(self, entities: Tensor) -> Tensor:
        """Return decoded rows [U, C] by id [U]."""
        return self.coding(self.rows.gather(entities))

    def slice(self, start: int, stop: int) -> Tensor:
        """Return decoded rows [stop - start, C] of candidates."""
        return self.coding(self.rows.slice(start, stop))


def precisions_table(report: Mapping[str, Any]) -> Table:
    """Return the precisions of a report as a table for the terminal."""
    table = Table(title=f"{report['job']}, step {report['step']:,}: precisions", caption=(
        f"{report['triples_ranked']:,} of {report['triples_in_split']:,} triples of {report['split']}, both sides; "
        f"{report['protocol']}. * loses more than {1 - KEPT:.0%} of float32's MRR."
    ))  # fmt: skip
    table.add_column("tier")
    table.add_column("units", justify="right")
    table.add_column("precision")
    for heading in ("MRR", "Hits@1", "Hits@10", "of float32", "bytes/entity"):
        table.add_column(heading, justify="right")
    for r in report["precisions"]:
        figures = [f"{r[name]:.4f}" for name in _METRICS]
        share = f"{r['share_of_float32']:.1%}{'*' if r['marked'] else ' '}"
        table.add_row(r["tier"], f"{r['units']:,}", r["precision"], *figures, share, f"{r['bytes_per_entity']:,}")
    return table


def print_report(report: Mapping[str, Any]) -> None:
    """Print a report's tables."""
    console().print(precisions_table(report), formats_table(report["formats"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = job_parser(
        "fidelity",
        "Rank a run's tiers at every precision against float32, and measure the formats that it exported.",
        or_run=True,
    )
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to code (default: the best, else the newest)")
    parser.add_argument("--triples", type=int, metavar="N", help="rank a sample instead of the job's")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of tables")
    arguments = parser.parse_args(argv)
    return run_command(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    from medscale.prepare import prepare

    job, run_directory = run_of(arguments.job, arguments.runs_dir)
    if arguments.triples is not None:
        job = dataclasses.replace(job, evaluate=dataclasses.replace(job.evaluate, max_triples=arguments.triples))
    graph = prepare(job, data_root=arguments.data_dir, graphs_root=arguments.graphs_dir)
    report = write_report(job, graph, run_directory, job.model.tiers, arguments.step)
    if arguments.json:
        print(json.dumps(report))
    else:
        print_report(report)
        log(f"written: {run_directory / REPORT}")


if __name__ == "__main__":
    sys.exit(main())
