"""`python -m medscale.prepare JOB`: from raw files, or from a generator, to a graph directory.

Preparing is done once, in this process or with `graph.tasks` on a Ray cluster, which changes no byte. A graph
directory that is there already is opened if it was made from what the job says; otherwise that is an error. Where
graphs lie behind a URI, one is built in the system's directory for temporary files (`TMPDIR`), which all nodes of a
cluster must then see, and uploaded.
"""

import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medscale.cluster import tasks_of
from medscale.config import GraphSection, Job
from medscale.errors import GraphError
from medscale.graph.growth import extend_graph
from medscale.graph.ingest import Progress, ingest, source_of
from medscale.graph.reader import Graph, graph_exists, open_graph
from medscale.graph.synthetic import write_raw
from medscale.graph.upload import require_room, upload_graph
from medscale.jobfile import load_job
from medscale.location import Location, RemotePath
from medscale.logs import log
from medscale.logs import progress as show_progress
from medscale.options import job_parser, run_command
from medscale.storage import run_lock, staging_directory

__all__ = ["extended_graph", "main", "prepare"]


def prepare(job: Job, *, data_root: Path, graphs_root: Location, progress: Progress = show_progress) -> Graph:
    """Return the job's graph, `graphs_root`/<graph name>, verified; build it first where it is not there.

    Raises:
        GraphError: raw files are missing or wrong; the directory is damaged, or made from something else; or its
            filesystem cannot be reached or written.
        CapacityError: memory or disk space ran out; nothing is left behind.
        WorkerError: a task on the Ray cluster died each time it was run; nothing is left behind.
        RunLockedError: another process is building this graph in this directory.

    """
    directory = graphs_root / job.graph_name
    if graph_exists(directory):
        return _opened(job, directory)
    if isinstance(directory, RemotePath):
        return _uploaded(job, data_root, graphs_root, directory, progress)
    with run_lock(directory.parent / ".locks" / job.graph_name):
        # Another process may have finished between the first look and the lock.
        if directory.exists():
            return _opened(job, directory)
        log(f"preparing graph {job.graph_name} in {directory}")
        return _built(job, data_root, graphs_root, directory, progress)


def _uploaded(
    job: Job, data_root: Path, graphs_root: Location, directory: RemotePath, progress: Progress
) -> Graph:  # fmt: skip
    """Build the graph on this machine and upload it; an upload that breaks off is begun anew, with the building."""
    require_room(directory)  # before hours of work, not after them
    with tempfile.TemporaryDirectory(prefix="medscale-prepare-") as scratch:
        draft = Path(scratch) / job.graph_name
        log(f"preparing graph {job.graph_name} in {draft}, for {directory}")
        graph = _built(job, data_root, graphs_root, draft, progress)
        # Another process may have finished meanwhile; there is no lock to hold.
        if graph_exists(directory):
            return _opened(job, directory)
        with progress("uploading", sum(path.stat().st_size for path in draft.rglob("*.parquet")), "bytes") as advance:
            return upload_graph(graph, directory, advance)


def _opened(job: Job, directory: Location) -> Graph:
    graph = open_graph(directory)
    changed = _differences(graph.facts.get("source"), _source_of(job))
    if changed:
        raise GraphError(
            f"{directory} was prepared from something else than job {job.name} says: {'; '.join(changed)}. "
            "Delete the directory to prepare it anew, or give graph.name another value"
        )
    log(f"graph {graph.name}: {directory} is there already")
    return graph


def _source_of(job: Job) -> dict[str, Any]:
    """Return as JSON values all that decides what a job's graph holds; of one that grew, the new files' form alone."""
    source = source_of(job.graph, job.seed)
    if job.extend.run is None:
        return source
    read_by = ("format", "header", "columns", "head_column", "relation_column", "tail_column", "literals")
    extended = {
        "extend.graph": job.extend.graph or job.extend.run,
        "extend.triples": list(job.extend.triples),
        "extend.others": job.extend.others,
    }
    return extended | {key: source[key] for key in read_by}


def _differences(recorded: Any, wanted: Mapping[str, Any]) -> list[str]:
    if not isinstance(recorded, Mapping):
        return ["its manifest records no source"]
    keys = [*wanted, *(key for key in recorded if key not in wanted)]
    return [
        f"{_job_key(key)} is {_shown(wanted, key)}, was {_shown(recorded, key)}"
        for key in keys
        if wanted.get(key) != recorded.get(key)
    ]


def _job_key(key: str) -> str:
    return key if key == "seed" or "." in key else f"graph.{key}"


def _shown(source: Mapping[str, Any], key: str) -> str:
    return repr(source[key]) if key in source else "not known"


def _built(job: Job, data_root: Path, graphs_root: Location, directory: Path, progress: Progress) -> Graph:
    section, seed, extend = job.graph, job.seed, job.extend
    if extend.run is not None:
        return extend_graph(
            extended_graph(job, graphs_root),
            section,
            extend.triples,
            name=job.graph_name,
            data_root=data_root,
            directory=directory,
            only_new_names=job.freezes,
            num_others=extend.others,
            source=_source_of(job),
            progress=progress,
        )
    if section.synthetic is None:
        return ingest(
            section,
            name=job.graph_name,
            seed=seed,
            data_root=data_root,
            directory=directory,
            progress=progress,
        )
    with (
        staging_directory(directory.with_name(directory.name + ".raw")) as raw,
        tasks_of(section.tasks, raw) as tasks,
    ):
        with progress("generating", section.synthetic.num_triples, "triples") as advance:
            write_raw(section.synthetic, seed, raw, advance, tasks)
        graph = ingest(
            _of_raw_files(section),
            name=job.graph_name,
            seed=seed,
            data_root=raw,
            directory=directory,
            progress=progress,
            source=source_of(section, seed),
        )
        shutil.rmtree(raw)
    return graph


def extended_graph(job: Job, graphs_root: Location, *, verify: bool = True) -> Graph:
    """Open the graph that a job's own grows out of.

    Raises:
        GraphError: it is not there, or damaged.

    """
    directory = graphs_root / (job.extend.graph or job.extend.run or "")
    if not graph_exists(directory):
        raise GraphError(
            f"{directory}, the graph of run {job.extend.run}, is not there: point --graphs-dir to where it was "
            "prepared, or name it by extend.graph"
        )
    return open_graph(directory, verify=verify)


def _of_raw_files(section: GraphSection) -> GraphSection:
    """Return the section that reads what `write_raw` wrote; fractions and policies stay."""
    return dataclasses.replace(
        section,
        synthetic=None,
        format="parquet",
        train=("train/*.parquet",),
        entity_types="entity_types/*.parquet",
        head_column="head",
        relation_column="relation",
        tail_column="tail",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare a job's graph; return the exit code."""
    description = "Prepare a job's graph directory from its raw files or its generator."
    options = job_parser("prepare", description).parse_args(argv)

    def action() -> None:
        prepare(load_job(options.job), data_root=options.data_dir, graphs_root=options.graphs_dir)

    return run_command(action)


if __name__ == "__main__":
    sys.exit(main())
