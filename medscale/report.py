"""One table of a finished run: what each tier is worth, weighs and costs: `python -m medscale.report JOB`."""

import argparse
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
from medscale.errors import ExportError, MedscaleError
from medscale.evaluate import PROTOCOL
from medscale.jobfile import load_job
from medscale.logs import console
from medscale.manifest import MANIFEST, read_manifest
from medscale.options import job_parser, run_command
from medscale.runtime.files import TIER_FORMATS, TIER_KIND
from medscale.runtime.tier import Tier
from medscale.seed import generator

__all__ = ["TierLine", "main", "report", "tiers_table"]

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
    quality = _quality_by_units(run_directory / "evaluation.json")
    export = run_directory / "export"
    directories = sorted(p for p in export.glob("*") if (p / MANIFEST).is_file())
    if not directories:
        raise ExportError(f"{export} holds no tiers: run medscale export first")
    lines = [_line(directory, quality) for directory in directories]
    return sorted(lines, key=lambda line: (line.units, line.tier))


def _quality_by_units(path: Path) -> dict[int, Mapping[str, Any]]:
    """Return the field's records of both sides by dim in units."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        return {r["dim"]: r for r in records if r["protocol"] == "field" and r["side"] == "both"}
    except FileNotFoundError:
        raise MedscaleError(f"{path} does not exist: run medscale evaluate first") from None
    except (ValueError, TypeError, KeyError) as cause:
        raise MedscaleError(f"{path} is damaged ({cause!r}): run medscale evaluate again") from None


def _line(directory: Path, quality: Mapping[int, Mapping[str, Any]]) -> TierLine:
    tier = Tier.open(directory)
    if tier.dim not in quality:
        raise MedscaleError(f"{directory} has dim {tier.dim}, which is not evaluated: run medscale evaluate again")
    record = quality[tier.dim]
    return TierLine(
        tier=tier.name,
        dim=tier.columns,
        units=tier.dim,
        mrr=record["mrr"],
        hits_at_1=record["hits@1"],
        hits_at_3=record["hits@3"],
        hits_at_10=record["hits@10"],
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


def _run(arguments: argparse.Namespace) -> int:
    job: Job = load_job(arguments.job)
    lines = report(arguments.runs_dir / job.name)
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
        "bytes, and the milliseconds that 1000 look-ups take.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line per tier instead of a table")
    arguments = parser.parse_args(argv)
    return run_command(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())
