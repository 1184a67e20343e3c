"""A finished run, told: a table of what each tier is worth, weighs and costs, and one HTML page with figures.

`python -m medscale.report JOB_OR_RUN`. The page needs the extra `report`; the table does not.
"""

import argparse
import datetime
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from medscale.config import Job
from medscale.errors import ExportError, GraphError, MedscaleError
from medscale.evaluate import PROTOCOL
from medscale.graph.reader import Graph, open_graph
from medscale.location import Location
from medscale.logs import console, log
from medscale.manifest import MANIFEST, read_manifest
from medscale.options import job_parser, run_command, run_of
from medscale.results import evaluation_of
from medscale.runtime.files import TIER_FORMATS, TIER_KIND
from medscale.runtime.tier import Tier
from medscale.seed import generator
from medscale.storage import write_atomic
from medscale.tiers import INSTALL, bytes_per_entity, missing_for_figures

__all__ = ["TierLine", "main", "report", "tiers_table", "write_page"]

LOOKUPS = 1000
#: the look-ups are timed this often; the median counts
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class TierLine:
    """What is known about one tier: its size, its quality on the evaluated split, its cost."""

    tier: str
    #: columns stored per entity
    dim: int
    #: dim in units, as in the job
    units: int
    mrr: float
    hits_at_1: float
    hits_at_3: float
    hits_at_10: float
    #: of the exported rows
    precision: str
    #: of one entity's row, with its scales
    bytes_per_entity: int
    #: of all files of the tier
    bytes: int
    #: milliseconds for 1000 vectors by name, one after the other
    lookup_ms: float
    split: str
    num_queries: int


def report(run_directory: Path) -> list[TierLine]:
    """Return a line per exported tier of a run, smallest first; times its look-ups.

    Raises:
        ExportError: nothing is exported, or a tier is damaged.
        MedscaleError: the run is not evaluated, or not at a tier's dim.

    """
    quality = evaluation_of(run_directory)
    lines = [_line(directory, quality) for directory in _tier_directories(run_directory)]
    return sorted(lines, key=lambda line: (line.units, line.tier))


def _tier_directories(run_directory: Path) -> list[Path]:
    export = run_directory / "export"
    directories = sorted(p for p in export.glob("*") if (p / MANIFEST).is_file())
    if not directories:
        raise ExportError(f"{export} holds no tiers: run medscale export first")
    return directories


def _line(directory: Path, quality: Mapping[int, Mapping[str, Any]]) -> TierLine:
    tier = Tier.open(directory)
    if tier.dim not in quality:
        raise MedscaleError(f"{directory} has dim {tier.dim}, which is not evaluated: run medscale evaluate again")
    record, facts = quality[tier.dim], tier.checked_facts
    return TierLine(
        tier=tier.name,
        dim=tier.columns,
        units=tier.dim,
        mrr=record["mrr"],
        hits_at_1=record["hits@1"],
        hits_at_3=record["hits@3"],
        hits_at_10=record["hits@10"],
        precision=facts.precision,
        bytes_per_entity=bytes_per_entity(
            facts.cuts, tier.dim, facts.unit_columns, facts.precision, norms=facts.scorer.geometry == "product"
        ),
        bytes=_bytes_of(directory),
        lookup_ms=_lookup_milliseconds(tier),
        split=record["split"],
        num_queries=record["num_queries"],
    )


def _bytes_of(directory: Path) -> int:
    manifest = read_manifest(directory, TIER_KIND, TIER_FORMATS, ExportError)
    files: int = sum(entry["bytes"] for entry in manifest.files.values())
    return files + (directory / MANIFEST).stat().st_size


def _lookup_milliseconds(tier: Tier) -> float:
    """Return the milliseconds that 1000 vectors by name take, one call each: the median of some rounds."""
    ids = generator(0, "report look-ups").integers(0, tier.num_entities, LOOKUPS)
    names = [tier.entity_name(int(entity)) for entity in ids]
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for name in names:
            tier.vector(name)
        rounds.append((time.perf_counter() - start) * 1000)
    return median(rounds)


def tiers_table(name: str, lines: Sequence[TierLine]) -> Table:
    """Return the lines as a table for the terminal."""
    first = lines[0]
    queries = f"{first.split} split, {first.num_queries:,} queries"
    table = Table(
        title=name,
        box=SIMPLE_HEAD,  # nine columns in the 80 characters of a log
        caption=f"{queries}, both sides: {PROTOCOL}. dim: columns stored per entity; units: dim as the job counts it.",
    )
    table.add_column("tier")
    for heading in ("dim", "units", "MRR", "Hits@1", "Hits@3", "Hits@10", "bytes", "ms per 1000 look-ups"):
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    for line in lines:
        ranking = (line.mrr, line.hits_at_1, line.hits_at_3, line.hits_at_10)
        cost = (f"{line.bytes:,}", f"{line.lookup_ms:.1f}")
        table.add_row(line.tier, f"{line.dim:,}", f"{line.units:,}", *map("{:.3f}".format, ranking), *cost)
    return table


def write_page(
    job: Job, run_directory: Path, lines: Sequence[TierLine], graphs_dir: Location, compare: Sequence[str] = ()
) -> Path:
    """Write `report.html` and `report/*.png` into a run's directory; return the page's path.

    `compare` holds words such as `direct=runs/direct`: runs whose curves are drawn beside this one's. A graph that is
    not there costs what needs it, and no more: the page says so.

    Raises:
        ConfigError: a word of `compare` has another form.
        MedscaleError: a run is not evaluated, or a file of this one is damaged.

    """
    from medscale.page import ShownTier, compared_runs, page_of

    tiers = [
        ShownTier(
            name=line.tier, units=line.units, columns=line.dim, precision=line.precision,
            bytes_per_entity=line.bytes_per_entity, bytes=line.bytes,
        )
        for line in lines
    ]  # fmt: skip
    compared = compared_runs(compare, evaluation_of(run_directory))
    largest = Tier.open(run_directory / "export" / lines[-1].tier, verify="never")  # `report` has just verified it
    graph = _graph_of(job, graphs_dir, largest)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    text, images = page_of(job, run_directory, tiers, largest, graph, compared, date)
    folder = run_directory / "report"
    for old in folder.glob("*.png"):
        if old.stem not in {image.name for image in images}:
            old.unlink()
    for image in images:
        write_atomic(folder / f"{image.name}.png", image.png)
    path = run_directory / "report.html"
    write_atomic(path, text.encode())
    return path


def _graph_of(job: Job, graphs_dir: Location, tier: Tier) -> Graph | GraphError:
    """Return the graph that a tier was trained on, or why it cannot be had."""
    try:
        graph = open_graph(graphs_dir / job.graph_name, verify=False)
    except GraphError as cause:
        return cause
    if graph.sha256 != tier.facts["graph_sha256"]:
        return GraphError(f"{graph.directory} is not the graph that this run was trained on; point --graphs-dir to it")
    return graph


def _run(arguments: argparse.Namespace) -> int:
    job, run_directory = run_of(arguments.job, arguments.runs_dir)
    lines = report(run_directory)
    if missing := missing_for_figures():
        log(f"no page without {' and '.join(missing)}: {INSTALL}, then report again")
    else:
        log(f"written: {write_page(job, run_directory, lines, arguments.graphs_dir, arguments.compare)}")
    if arguments.json:
        for line in lines:
            print(json.dumps(asdict(line)))
    else:
        console().print(tiers_table(job.name, lines))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = job_parser(
        "report",
        "Print one table of a run that is trained, evaluated and exported: per tier its dim, MRR and Hits@k, "
        "bytes, and the milliseconds that 1000 look-ups take. Write RUN/report.html, one page that needs no network, "
        f"and its figures, RUN/report/*.png; they need the extra `report` ({INSTALL.replace('%', '%%')}).",
        or_run=True,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line per tier instead of a table")
    parser.add_argument(
        "--compare",
        nargs="+",
        action="extend",
        default=[],
        metavar="LABEL=RUN",
        help="draw the curves of other evaluated runs beside this one's; runs of one label make one curve",
    )
    arguments = parser.parse_args(argv)
    return run_command(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())
