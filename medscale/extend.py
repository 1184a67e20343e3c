"""The job of a run that grows out of another: what `train JOB --extend FILES` trains."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medscale.checkpoint import committed, newest_checkpoint, step_of
from medscale.config import ExtendSection, Job
from medscale.errors import CheckpointError, MedscaleError
from medscale.graph.growth import described_files, files_of_new_triples
from medscale.graph.reader import graph_exists, open_graph
from medscale.jobfile import dump_job, load_job, parse_job
from medscale.lineage import require_same_model
from medscale.location import Location
from medscale.logs import log
from medscale.results import evaluation_of

__all__ = ["extended_job", "tell_change"]

#: what the name of a run that grew ends in, unless the user gives it one
_NUMBERED = re.compile(r"-extended-[0-9]+$")


def extended_job(
    job: Job, triples: Sequence[str], *, name: str | None = None, step: int | None = None, runs_dir: Path,
    graphs_dir: Location, data_root: Path,
) -> Job:  # fmt: skip
    """Return the job of the run that grows out of a job's own by some files of triples, named as in `graph.train`.

    It has the job's keys but for its name (default: NAME-extended-1, or the next number that is free), its graph and
    what it grows out of: a checkpoint of the job's run, the best unless `step` names another. With extend.rows frozen
    it does not validate. A run that was begun with the same files keeps its name and its step.

    Raises:
        CheckpointError: there is no such run or step, it has another model, or `name` is another run's.
        GraphError: a file is missing or wrong.
        ConfigError: the name cannot be one.

    """
    parent = committed(runs_dir / job.name, step_of(newest_checkpoint(runs_dir / job.name, step)))
    require_same_model(job, parent)
    files = described_files(files_of_new_triples(job.graph, triples, data_root))
    train = (
        dataclasses.replace(job.train, validate_every=0, patience=None) if job.extend.rows == "frozen" else job.train
    )
    extend = ExtendSection(
        run=job.name, graph=parent.facts["graph_name"], step=parent.step, triples=tuple(f["file"] for f in files),
        rows=job.extend.rows, others=job.extend.others,
    )  # fmt: skip
    for candidate in [name] if name is not None else _numbered(job.name):
        graph = dataclasses.replace(job.graph, name=candidate)
        grown = dataclasses.replace(job, name=candidate, graph=graph, train=train, extend=extend)
        grown = parse_job(dump_job(grown), "--extend")  # refuses a name that is none
        begun, wanted = _begun(candidate, runs_dir, graphs_dir), parent.step
        if begun is None:
            return grown
        if step is None and begun.step is not None:
            wanted = begun.step  # the best may be another by now
        asked = _Begun(job.name, wanted, parent.facts["graph_sha256"], files)
        if begun in (asked, dataclasses.replace(asked, run=None, step=None)):
            return dataclasses.replace(grown, extend=dataclasses.replace(extend, step=wanted))
        if name is not None:
            raise CheckpointError(
                f"{name} is there already, and grew otherwise: {begun.described()}; wanted is "
                f"{asked.described()}. Give this one another --name"
            )
    raise AssertionError("numbers do not end")


def _numbered(name: str) -> Iterator[str]:
    """Yield the names that a run which grows out of `name` may take by itself, first ones first."""
    names = (f"{_NUMBERED.sub('', name)}-extended-{number}" for number in itertools.count(1))
    return (candidate for candidate in names if candidate != name)


@dataclasses.dataclass(frozen=True)
class _Begun:
    """What a run that is there, or its graph alone, grew out of."""

    #: None: there is no run yet
    run: str | None
    step: int | None
    graph_sha256: str | None
    files: list[dict[str, Any]]

    def described(self) -> str:
        files = ", ".join(f"{file['file']} (SHA-256 {file['sha256'][:12]}...)" for file in self.files)
        where = "" if self.run is None else f" out of {self.run}, step {self.step}"
        return f"by {files or 'nothing'}{where}"


def _begun(name: str, runs_dir: Path, graphs_dir: Location) -> _Begun | None:
    """Return what lies under a name; None: nothing does."""
    described, directory = runs_dir / name / "job.yaml", graphs_dir / name
    extend = load_job(described).extend if described.exists() else ExtendSection()
    lineage = open_graph(directory, verify=False).lineage if graph_exists(directory) else None
    if lineage is None and not described.exists() and not graph_exists(directory):
        return None
    lineage = lineage or {"graph_sha256": None, "files": []}
    return _Begun(extend.run, extend.step, lineage["graph_sha256"], lineage["files"])


def tell_change(parent: Path, run_directory: Path) -> None:
    """Log what became of a run's MRR when it was extended: the same queries, but new entities among the candidates."""
    try:
        before, after = evaluation_of(parent), evaluation_of(run_directory)
    except MedscaleError as cause:
        log(f"whether old answers stayed as good is not known: {cause}")
        return
    changes = [
        f"{before[dim]['mrr']:.4f} -> {record['mrr']:.4f} @{dim}"
        for dim, record in after.items()
        if dim in before and all(before[dim][key] == record[key] for key in ("split", "num_queries"))
    ]
    log(f"MRR of {parent.name}, and now: {', '.join(changes) or 'not of the same queries'}")
