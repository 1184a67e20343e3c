"""Where a run that grew, or learned from another, came from, as its checkpoints tell."""

from collections.abc import Mapping
from typing import Any

import torch

from medscale.checkpoint import Checkpoint, Tables, changed_keys
from medscale.config import Job, LossSection
from medscale.errors import CheckpointError
from medscale.graph.reader import Graph
from medscale.jobfile import job_to_mapping
from medscale.loss.bce import logits_of
from medscale.manifest import MANIFEST
from medscale.storage import sha256_of

__all__ = ["lesson_of", "lineage_of", "old_sizes", "require_same_model", "teachers_unit"]


def lineage_of(job: Job, graph: Graph, parent: Checkpoint) -> Mapping[str, Any]:
    """Return what the checkpoints of a run say of the one that it grows out of, as JSON values.

    "run", "step", "checkpoint_sha256" (of the manifest): where its first rows came from; "rows": "frozen" or
    "trained"; "graph", "graph_sha256"; "num_entities", "num_relations": the ids that were there; "files": what was
    added, [{"file", "bytes", "sha256"}]; "lineage": the parent's own, or null.

    Raises:
        CheckpointError: the parent has another model, or is not of the graph that this run's grew out of.

    """
    require_same_model(job, parent)
    assert graph.lineage is not None, "a job that extends a run has a graph that grew"
    if parent.facts["graph_sha256"] != graph.lineage["graph_sha256"]:
        raise CheckpointError(
            f"{parent.directory} was trained on another graph than the one that {graph.directory} grew out of; "
            "delete the latter, or name the graph of the run by extend.graph"
        )
    return {
        "run": job.extend.run,
        "step": parent.step,
        "checkpoint_sha256": sha256_of(parent.directory / MANIFEST),
        "rows": job.extend.rows,
        **graph.lineage,
        "lineage": parent.facts.get("lineage"),
    }


def old_sizes(graph: Graph) -> tuple[int, int]:
    """Return how many entities and relations a graph that grew has from the one that it grew out of."""
    assert graph.lineage is not None, "the graph did not grow"
    return graph.lineage["num_entities"], graph.lineage["num_relations"]


def require_same_model(job: Job, parent: Checkpoint) -> None:
    """Refuse a parent whose rows mean something else than the job's.

    Raises:
        CheckpointError: lists every key that differs.

    """
    models = [{"model": {**of["model"], "init_scale": None}} for of in (parent.facts["job"], job_to_mapping(job))]
    if changed := changed_keys(*models):
        raise CheckpointError(
            f"{parent.directory} cannot be extended by {job.name}, whose model is another: " + "; ".join(changed)
        )


def lesson_of(job: Job, graph: Graph, teacher: Tables) -> Mapping[str, Any]:
    """Return what the checkpoints of a run say of the one that it learns from, as JSON values.

    "teacher", "step", "dim", "checkpoint_sha256" (of the manifest).

    Raises:
        CheckpointError: the teacher's columns mean something else than the job's last level, or are of another graph.

    """
    checkpoint, layout = teacher.checkpoint, teacher.layout
    dim = job.distill.dim or layout.dims[-1]
    units = job.model.dims[-1] - job.model.dims[-2]
    theirs, ours = checkpoint.facts["job"]["model"], job_to_mapping(job)["model"]
    wrong = [
        f"model.{name}: {theirs[name]} -> {ours[name]}"
        for name in ("scorer", "norm", "reciprocal")
        if theirs[name] != ours[name]
    ]
    if dim not in layout.dims:
        wrong.append(f"distill.dim: {dim} is none of its dims {list(layout.dims)}")
    elif dim != units:
        wrong.append(f"model.dims: the last level has {units} units, and the teacher {dim}")
    elif any(kappa != 1 for kappa in layout.damping[: layout.dims.index(dim)]):
        wrong.append("model.damping: the teacher's own levels are damped, and can be no single level")
    if checkpoint.facts["graph_sha256"] != graph.sha256:
        wrong.append(f"graph: {graph.directory} is not the graph that it was trained on")
    if wrong:
        raise CheckpointError(f"{checkpoint.directory} cannot teach {job.name}: " + "; ".join(wrong))
    return {
        "teacher": job.distill.teacher,
        "step": checkpoint.step,
        "dim": dim,
        "checkpoint_sha256": sha256_of(checkpoint.directory / MANIFEST),
    }


def teachers_unit(job: Job, teacher: Tables) -> float:
    """Return what multiplies a teacher's columns, so that its distances mean in the job what they do in its run.

    A sub-model has its share of its run's margin, and columns to match; as the job's last level it has the job's whole
    margin: without this a teacher that is a prefix, or was a student itself, would find every triple true. 1 for
    products.
    """
    if not teacher.layout.scorer.is_distance:
        return 1.0
    theirs, dims = teacher.facts["job"]["loss"], teacher.layout.dims
    section = LossSection(**{key: theirs[key] for key in ("margin", "margin_scaling", "temperature")})
    own = logits_of(section, dims, is_distance=True, device=torch.device("cpu"))
    level = dims.index(job.distill.dim or dims[-1])
    # the job's last level has its whole margin, and temperature 1
    return job.loss.margin / own.margins[level].item() if section.margin else own.temperatures[level].item()
