"""Where a run that grew came from, as its checkpoints tell."""

from collections.abc import Mapping
from typing import Any

from medscale.checkpoint import Checkpoint, changed_keys
from medscale.config import Job
from medscale.errors import CheckpointError
from medscale.graph.reader import Graph
from medscale.jobfile import job_to_mapping
from medscale.manifest import MANIFEST
from medscale.storage import sha256_of

__all__ = ["lineage_of", "old_sizes", "require_same_model"]


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
