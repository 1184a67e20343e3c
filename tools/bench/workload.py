"""What the benches train and rank: FB15k-237, and jobs on it."""

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medscale.config import (
    GraphSection,
    Job,
    ModelSection,
    NegativesSection,
    OptimizerSection,
    RuntimeSection,
    TrainSection,
)

__all__ = ["SCORERS", "SHARING", "TIERS", "add_data_option", "dims_of", "job_of", "model_of", "prepared_graph"]

#: TransE by either norm
SCORERS = ("transe", "transe_l2", "rotate", "simple", "complex", "distmult", "pairre")
#: 64 negatives per positive: drawn for each chunk of 32 positives, or for each positive
SHARING = {
    "chunk32": NegativesSection(kind="chunk", number=64, chunk_size=32),
    "fresh": NegativesSection(kind="per_positive", number=64),
}
_GRAPH = GraphSection(**{split: (f"FB15k-237/{split}.tsv.zst",) for split in ("train", "valid", "test")})
#: the units that are shipped, beside the largest; tables are cut into blocks at tiers
TIERS = (10, 100)


def dims_of(sub_models: int, units: int = 640) -> tuple[int, ...]:
    """Return the units of evenly spaced sub-models."""
    return tuple(units * (i + 1) // sub_models for i in range(sub_models))


def model_of(scorer: str, dims: tuple[int, ...], tiers: tuple[int, ...] = TIERS) -> ModelSection:
    """Return the model section of one of `SCORERS`; all units are a tier, and each of `tiers` that is a dim."""
    name, _, norm = scorer.partition("_")
    named = {str(dim): dim for dim in (*tiers, dims[-1]) if dim in dims}
    return ModelSection(scorer=name, norm=norm or "l1", dims=dims, tiers=named)  # type: ignore[arg-type]


def job_of(
    scorer: str, dims: tuple[int, ...], sharing: str, *, threads: int, batch: int = 1024,
    tiers: tuple[int, ...] = TIERS, **optimizer: Any,
) -> Job:  # fmt: skip
    """Return a job that trains on one CPU for as long as it is let, with MED as it is by default."""
    return Job(
        name="bench",
        graph=_GRAPH,
        model=model_of(scorer, dims, tiers),
        negatives=SHARING[sharing],
        optimizer=OptimizerSection(**optimizer),
        train=TrainSection(epochs=10_000, batch_size=batch),
        runtime=RuntimeSection(device="cpu", threads=threads),
    )


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """Let the user say where FB15k-237 lies."""
    default = Path(os.environ.get("MEDSCALE_DATA_DIR") or "../shared/data")
    parser.add_argument("--data-dir", type=Path, default=default, help="holds FB15k-237/train.tsv.zst and so on")


@contextlib.contextmanager
def prepared_graph(data_dir: Path) -> Iterator[Path]:
    """Yield the graph's directory, prepared as `medscale train` does, for as long as it is needed."""
    # Imported here: kernels are also measured on machines that have nothing to read graphs with.
    from medscale.prepare import prepare

    with tempfile.TemporaryDirectory(prefix="medscale-bench-") as root:
        job = job_of("transe", dims_of(1), "chunk32", threads=1)
        yield prepare(job, data_root=data_dir, graphs_root=Path(root)).directory
