"""`python -m medscale.export JOB`: the tiers of a trained run, as files to ship."""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from medscale.checkpoint import Tables, newest_checkpoint, open_tables
from medscale.config import Job
from medscale.errors import ConfigError, ExportError
from medscale.graph.reader import open_graph
from medscale.jobfile import load_job
from medscale.location import Location
from medscale.logs import console, progress
from medscale.options import job_parser, run_command
from medscale.split import ModelFacts, WrittenTier, check_tiers, write_export

__all__ = ["export_run", "main", "parse_tiers"]

_TIER = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)=(?P<dim>[1-9][0-9]{0,8})")


def main(argv: Sequence[str] | None = None) -> int:
    """Export the tiers of a job's run and return the exit code."""
    parser = job_parser(
        "export",
        "Cut a run's best checkpoint (by validation; else the newest) into tiers: RUNS/NAME/export.",
    )
    parser.add_argument(
        "--tiers",
        metavar="NAME=DIM,...",
        help="tiers to cut instead of the job's; each dim is a sub-model of the checkpoint",
    )
    parser.add_argument("--step", type=int, metavar="N", help="cut from this checkpoint instead of the best one")
    arguments = parser.parse_args(argv)
    return run_command(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    tiers = None if arguments.tiers is None else parse_tiers(arguments.tiers)
    job = load_job(arguments.job)
    written = export_run(
        job, runs_dir=arguments.runs_dir, graphs_dir=arguments.graphs_dir, tiers=tiers, step=arguments.step
    )
    console().print(_table(written))
    print(arguments.runs_dir / job.name / "export")


def export_run(
    job: Job,
    *,
    runs_dir: Path,
    graphs_dir: Location,
    tiers: Mapping[str, int] | None = None,
    step: int | None = None,
) -> tuple[WrittenTier, ...]:
    """Write `RUNS/NAME/export` from the best checkpoint of a job's run, or from that of `step`.

    `tiers` (name: units) default to the job's.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ConfigError: a tier's dim is not a sub-model of the checkpoint.
        GraphError: the graph is missing or damaged.
        ExportError: the graph is not the one trained on, or something is in the way.

    """
    run_directory = runs_dir / job.name
    tables = open_tables(newest_checkpoint(run_directory, step))
    tiers = job.model.tiers if tiers is None else tiers
    check_tiers(tiers, tuple(tables.facts["dims"]))
    graph = open_graph(graphs_dir / job.graph_name)
    if graph.sha256 != tables.facts["graph_sha256"]:
        raise ExportError(
            f"{graph.directory} is not the graph that {run_directory} was trained on: its ids may name other "
            "entities. Point --graphs-dir to that graph, or train anew"
        )
    with progress(f"export of {job.name}", graph.num_entities, "rows") as advance:
        return write_export(
            tables,
            graph.entity_names(),
            graph.relation_names(),
            _model_facts(job, tables),
            tiers,
            run_directory / "export",
            advance=advance,
        )


def parse_tiers(text: str) -> dict[str, int]:
    """Return the tiers that `phone=10,pc=100` names.

    Raises:
        ConfigError: anything else; lists each part that is wrong.

    """
    parts = text.split(",")
    matches = [_TIER.fullmatch(part) for part in parts]
    problems = [
        f"--tiers: {part!r} is not NAME=DIM, such as phone=10"
        for part, match in zip(parts, matches, strict=True)
        if match is None
    ]
    tiers = {match["name"]: int(match["dim"]) for match in matches if match is not None}
    if not problems and len(tiers) < len(parts):
        problems = [f"--tiers: {text!r} names a tier twice"]
    if problems:
        raise ConfigError(problems)
    return tiers


def _model_facts(job: Job, tables: Tables) -> ModelFacts:
    facts = tables.facts
    return ModelFacts(
        run=job.name,
        step=facts["step"],
        graph=job.graph_name,
        graph_sha256=facts["graph_sha256"],
        scorer=facts["scorer"],
        norm=facts["norm"],
        damping=tuple(facts["damping"]),
        dims=tuple(facts["dims"]),
        reciprocal=facts["reciprocal"],
    )


def _table(written: Sequence[WrittenTier]) -> Table:
    table = Table("tier")
    for heading in ("units", "columns", "bytes", "files"):
        table.add_column(heading, justify="right")
    for tier in written:
        table.add_row(tier.name, f"{tier.dim:,}", f"{tier.columns:,}", f"{tier.bytes:,}", str(tier.files))
    return table


if __name__ == "__main__":
    sys.exit(main())
