"""`python -m medscale.prepare JOB`: raw files, or a generator, to a graph directory; and what all commands share.

Preparing is done once. A graph directory that is there already is opened, if it was made from what the job says.
"""

import argparse
import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medscale.config import Job
from medscale.errors import GraphError, MedscaleError
from medscale.graph.ingest import Progress, ingest, source_of
from medscale.graph.reader import Graph, open_graph
from medscale.graph.synthetic import write_raw
from medscale.jobfile import load_job
from medscale.logs import log
from medscale.logs import progress as show_progress
from medscale.storage import run_lock, staging_directory

__all__ = ["command_parser", "main", "prepare", "run_command"]


def prepare(job: Job, *, data_root: Path, graphs_root: Path, progress: Progress = show_progress) -> Graph:
    """Return the job's graph, `graphs_root`/<graph name>, verified; build it first where it is not there.

    Raises:
        GraphError: raw files are missing or wrong, or the directory is damaged or was made from something else.
        CapacityError: memory or disk space ran out; nothing is left behind.
        RunLockedError: another process is building this graph.

    """
    directory = graphs_root / job.graph_name
    if directory.exists():
        return _opened(job, directory)
    with run_lock(graphs_root / ".locks" / job.graph_name):
        # Another process may have finished between the first look and the lock.
        if directory.exists():
            return _opened(job, directory)
        log(f"preparing graph {job.graph_name} in {directory}")
        return _built(job, data_root, directory, progress)


def _opened(job: Job, directory: Path) -> Graph:
    graph = open_graph(directory)
    changed = _differences(graph.facts.get("source"), source_of(job.graph, job.seed))
    if changed:
        raise GraphError(
            f"{directory} was prepared from something else than job {job.name} says: {'; '.join(changed)}. "
            "Delete the directory to prepare it anew, or give graph.name another value"
        )
    log(f"graph {graph.name}: {directory} is there already")
    return graph


def _differences(recorded: Any, wanted: Mapping[str, Any]) -> list[str]:
    if not isinstance(recorded, Mapping):
        return ["its manifest records no source"]
    keys = [*wanted, *(key for key in recorded if key not in wanted)]
    return [
        f"{'seed' if key == 'seed' else f'graph.{key}'} is {_shown(wanted, key)}, was {_shown(recorded, key)}"
        for key in keys
        if wanted.get(key) != recorded.get(key)
    ]


def _shown(source: Mapping[str, Any], key: str) -> str:
    return repr(source[key]) if key in source else "not known"


def _built(job: Job, data_root: Path, directory: Path, progress: Progress) -> Graph:
    section, seed = job.graph, job.seed
    if section.synthetic is None:
        return ingest(
            section,
            name=job.graph_name,
            seed=seed,
            data_root=data_root,
            directory=directory,
            progress=progress,
        )
    with staging_directory(directory.with_name(directory.name + ".raw")) as raw:
        with progress("generating", section.synthetic.num_triples, "triples") as advance:
            write_raw(section.synthetic, seed, raw, advance)
        files = dataclasses.replace(
            section, synthetic=None, format="parquet", train=("train/*.parquet",),
            entity_types="entity_types/*.parquet", head_column="head", relation_column="relation", tail_column="tail",
        )  # fmt: skip
        graph = ingest(
            files, name=job.graph_name, seed=seed, data_root=raw, directory=directory, progress=progress,
            source=source_of(section, seed),
        )  # fmt: skip
        shutil.rmtree(raw)
    return graph


def command_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with what all commands share: JOB, --data-dir, --graphs-dir, --runs-dir."""
    parser = argparse.ArgumentParser(prog=f"medscale {verb}", description=description)
    parser.add_argument("job", metavar="JOB", type=Path, help="the job file, such as jobs/quickstart.yaml")
    parser.add_argument(
        "--data-dir", type=Path, default=Path(os.environ.get("MEDSCALE_DATA_DIR") or "data"), metavar="DIR",
        help="root of the raw files that the job names; default: $MEDSCALE_DATA_DIR, else data",
    )  # fmt: skip
    parser.add_argument(
        "--graphs-dir",
        type=Path,
        default=Path("graphs"),
        metavar="DIR",
        help="prepared graphs; default: graphs",
    )
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="runs; default: runs"
    )
    return parser


def run_command(action: Callable[[], None]) -> int:
    """Run a command; return its exit code. What a user can set right becomes one sentence on stderr."""
    try:
        action()
    except MedscaleError as error:
        print(f"medscale: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("medscale: stopped", file=sys.stderr)
        return 130
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare a job's graph; return the exit code."""
    parser = command_parser("prepare", "Prepare a job's graph directory from its raw files or its generator.")
    options = parser.parse_args(argv)

    def action() -> None:
        prepare(load_job(options.job), data_root=options.data_dir, graphs_root=options.graphs_dir)

    return run_command(action)


if __name__ == "__main__":
    sys.exit(main())
