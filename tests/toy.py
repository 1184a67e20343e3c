"""A small real graph on disk and small jobs on it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from medscale.config import (
    CheckpointSection,
    EvaluateSection,
    GraphSection,
    Job,
    LossSection,
    MedSection,
    ModelSection,
    NegativesSection,
    OptimizerSection,
    RuntimeSection,
    TrainSection,
)
from medscale.graph.ingest import ingest
from medscale.graph.reader import Graph

#: scorer, its loss, and negatives that go with it
SCORERS = ("transe", "rotate", "pairre", "simple", "complex", "distmult")

GRAPH = GraphSection(train=("train.tsv",), valid=("valid.tsv",), test=("test.tsv",))


def write_toy_graph(root: Path) -> Graph:
    """Ingest 90 entities on a ring with four kinds of steps: learnable in seconds."""
    root.mkdir(parents=True, exist_ok=True)
    triples = [(f"e{i:03d}", f"step{s}", f"e{(i + s) % 90:03d}") for i in range(90) for s in (1, 2, 7, 30)]
    order = np.random.default_rng(0).permutation(len(triples))
    for split, part in (("train", order[:300]), ("valid", order[300:330]), ("test", order[330:])):
        (root / f"{split}.tsv").write_text("".join("\t".join(triples[i]) + "\n" for i in part), encoding="utf-8")
    return ingest(GRAPH, name="toy", seed=0, data_root=root, directory=root / "graph")


def toy_job(scorer: str = "complex", name: str = "toy", **changes: Any) -> Job:
    """Return a job for the toy graph; `changes` are sections' keys, such as train={"epochs": 2}."""
    distance = scorer in ("transe", "rotate", "pairre")
    sections: dict[str, Any] = {
        "graph": GRAPH,
        "model": ModelSection(scorer=scorer, dims=(4, 8, 16), tiers={"phone": 4, "server": 16}),  # type: ignore[arg-type]
        "negatives": NegativesSection(kind="chunk" if distance else "shared", number=16, chunk_size=10),
        "loss": LossSection(kind="bce" if distance else "softmax"),
        "med": MedSection(),
        "optimizer": OptimizerSection(),
        "train": TrainSection(epochs=4, batch_size=50, validate_every=2, log_every=1),
        "checkpoint": CheckpointSection(every_steps=3),
        "evaluate": EvaluateSection(),
        "runtime": RuntimeSection(),
    }
    for section, keys in changes.items():
        sections[section] = dataclasses.replace(sections[section], **keys)
    return Job(name=name, **sections)
