"""`python -m medscale.export JOB_OR_RUN`: the tiers of a trained run, as files to ship."""

import argparse
import re
import sys
import time
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from medscale.checkpoint import Tables, newest_checkpoint, open_tables
from medscale.config import ExportSection, Job
from medscale.errors import ConfigError, ExportError
from medscale.fidelity import print_report, write_report
from medscale.graph.reader import open_graph
from medscale.location import Location
from medscale.logs import console, progress
from medscale.manifest import read_manifest
from medscale.onnx_model import write_onnx
from medscale.options import job_parser, run_command, run_of
from medscale.runtime.files import TIER_KIND
from medscale.runtime.tier import TIER_FORMAT
from medscale.search_index import write_index
from medscale.split import EntityTypes, Extra, ModelFacts, WrittenTier, check_tiers, write_export
from medscale.versions import roll_back

__all__ = ["export_run", "extras_of", "main", "parse_formats", "parse_tiers"]

_TIER = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)=(?P<dim>[1-9][0-9]{0,8})")

#: what `export.formats` may name
FORMATS = typing.get_args(typing.get_args(typing.get_type_hints(ExportSection)["formats"])[0])
#: keys of the job's section `export` that the command line may give another value
_KEYS = ("layout", "precision", "sharding", "shard_rows", "tasks")


def main(argv: Sequence[str] | None = None) -> int:
    """Export the tiers of a job's run and return the exit code."""
    parser = job_parser(
        "export",
        "Cut a run's best checkpoint (by validation; else the newest) into tiers: RUNS/NAME/export.",
        or_run=True,
    )
    parser.add_argument(
        "--tiers",
        metavar="NAME=DIM,...",
        help="tiers to cut instead of the job's; each dim is a sub-model of the checkpoint",
    )
    parser.add_argument("--step", type=int, metavar="N", help="cut from this checkpoint instead of the best one")
    parser.add_argument("--out", type=Path, metavar="DIR", help="publish as DIR instead of RUN/export")
    parser.add_argument(
        "--onto",
        type=Path,
        metavar="DIR",
        help="write only the entities that joined since DIR, an export of the run that this one extended, was made; "
        "tiers, precision and shards are its",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="then rank the test split with every tier at every precision, and measure the formats: export_report.json",
    )
    parser.add_argument("--rollback", action="store_true", help="write nothing: return to the export before this one")
    group = parser.add_argument_group("instead of the job's keys export.*")
    for field in fields(ExportSection):
        if field.name in _KEYS:
            choices = typing.get_args(field.type) or None
            group.add_argument(
                f"--{field.name.replace('_', '-')}",
                choices=choices,
                type=str if choices else int,
                metavar=None if choices else "N",
                help=field.metadata["help"],
            )
    group.add_argument("--formats", metavar="NAME,...", help=f"of {', '.join(FORMATS)}; or none")
    arguments = parser.parse_args(argv)
    given = [key for key in (*_KEYS, "tiers", "step") if getattr(arguments, key) is not None]
    if arguments.rollback and (given or arguments.onto or arguments.report or arguments.formats):
        parser.error("--rollback goes with --out alone: it writes nothing")
    if arguments.onto and (fixed := [key for key in given if key not in ("tasks", "step")]):
        parser.error(f"--{fixed[0].replace('_', '-')} is that of the export that --onto names")
    for key in ("shard_rows", "tasks"):
        if (number := getattr(arguments, key)) is not None and number < 1:
            parser.error(f"--{key.replace('_', '-')} must be at least 1")
    return run_command(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    tiers = None if arguments.tiers is None else parse_tiers(arguments.tiers)
    job, run_directory = run_of(arguments.job, arguments.runs_dir)
    out = arguments.out or run_directory / "export"
    if arguments.rollback:
        version, step = roll_back(out)
        print(f"{out} is the export of step {step} again ({version.name})")
        return
    changes = {key: getattr(arguments, key) for key in _KEYS if getattr(arguments, key) is not None}
    if arguments.formats is not None:
        changes["formats"] = parse_formats(arguments.formats)
    start = time.perf_counter()
    written = export_run(
        replace(job, export=replace(job.export, **changes)),
        run_directory,
        graphs_dir=arguments.graphs_dir,
        tiers=tiers,
        step=arguments.step,
        out=out,
        onto=arguments.onto,
    )
    console().print(_table(written, time.perf_counter() - start))
    if arguments.report:
        graph = open_graph(arguments.graphs_dir / job.graph_name, verify=False)
        print_report(write_report(job, graph, run_directory, tiers or job.model.tiers, arguments.step, export=out))
    print(out)


def export_run(
    job: Job,
    run_directory: Path,
    *,
    graphs_dir: Location,
    tiers: Mapping[str, int] | None = None,
    step: int | None = None,
    out: Path | None = None,
    onto: Path | None = None,
) -> tuple[WrittenTier, ...]:
    """Write `out` (default: `export` in the run directory) from the best checkpoint of a run, or from that of `step`.

    `tiers` (name: units) default to the job's. `onto` is an export of the run that this one extended: then only the
    rows of entities that joined are written, in that export's form.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ConfigError: a tier's dim is not a sub-model of the checkpoint.
        GraphError: the graph is missing or damaged.
        ExportError: the graph is not the one trained on, something is in the way, or `onto` does not go with the run.

    """
    section = job.export
    tiers = job.model.tiers if tiers is None else tiers
    if onto is not None:
        tiers, section = _form_of(onto, section)
    tables = open_tables(newest_checkpoint(run_directory, step))
    check_tiers(tiers, tuple(tables.facts["dims"]), section.layout)
    graph = open_graph(graphs_dir / job.graph_name)
    if graph.sha256 != tables.facts["graph_sha256"]:
        raise ExportError(
            f"{graph.directory} is not the graph that {run_directory} was trained on: its ids may name other "
            "entities. Point --graphs-dir to that graph, or train anew"
        )
    types = graph.first_types()
    with progress(f"export of {job.name}", graph.num_entities, "rows") as advance:
        return write_export(
            tables,
            graph.entity_names(),
            graph.relation_names(),
            _model_facts(job, tables),
            tiers,
            out or run_directory / "export",
            section,
            entity_types=None if types is None else EntityTypes(*types),
            base=onto,
            extras=extras_of(section),
            advance=advance,
        )


def extras_of(section: ExportSection) -> list[Extra]:
    """Return what adds the files of the formats asked for to each tier that is written; Parquet is written with it."""
    makers = {"onnx": write_onnx, "index": write_index}
    return [_whole_only(maker) for name, maker in makers.items() if name in section.formats]


def _whole_only(extra: Extra) -> Extra:
    """Return what leaves tiers alone that hold a part of their columns."""
    return lambda tier, directory: None if tier.facts["layout"] == "delta" else extra(tier, directory)


def _form_of(onto: Path, section: ExportSection) -> tuple[Mapping[str, int], ExportSection]:
    """Return the tiers of an export, and the section with its precision and shards.

    Raises:
        ExportError: it is no export.

    """
    directories = sorted(path for path in onto.iterdir() if path.is_dir()) if onto.is_dir() else []
    if not directories:
        raise ExportError(f"{onto} is no export: --onto takes a directory with a directory for each tier")
    facts: Mapping[str, Any] = read_manifest(directories[0], TIER_KIND, TIER_FORMAT, ExportError).facts
    same = {key: facts[key] for key in ("precision", "sharding", "shard_rows")}
    return facts["tiers"], replace(section, layout="full", **same)


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


def parse_formats(text: str) -> tuple[str, ...]:
    """Return the formats that `parquet,onnx` names; `none` names none.

    Raises:
        ConfigError: lists each that does not exist.

    """
    names = tuple(text.split(",")) if text != "none" else ()
    problems = [f"--formats: {name!r} is none of {', '.join(FORMATS)}" for name in names if name not in FORMATS]
    if problems:
        raise ConfigError(problems)
    return names


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


def _table(written: Sequence[WrittenTier], seconds: float) -> Table:
    total = sum(tier.bytes for tier in written)
    table = Table("tier", caption="bytes per entity: of the numeric core; MB/s: written over the time of all")
    for heading in ("units", "columns", "layout", "precision", "bytes", "bytes per entity", "files", "MB/s"):
        table.add_column(heading, justify="left" if heading in ("layout", "precision") else "right")
    for tier in written:
        sizes = (f"{tier.bytes:,}", f"{tier.bytes_per_entity:,.1f}", f"{tier.files:,}")
        table.add_row(tier.name, f"{tier.dim:,}", f"{tier.columns:,}", tier.layout, tier.precision, *sizes)
    files = sum(tier.files for tier in written)
    table.add_row("together", *[""] * 4, f"{total:,}", "", f"{files:,}", f"{total / 1e6 / seconds:,.0f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
