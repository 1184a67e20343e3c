"""Validation: the MRR of every sub-model while a run trains, filtered, both sides, among all entities.

The workers rank with their tables as they are, or evaluators rank with a committed step while training goes on. Both
count the same halves of ranks, so both give the same numbers to the last digit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medscale.checkpoint import committed_directory, open_tables
from medscale.config import Job
from medscale.graph.known_triples import KnownTriples
from medscale.graph.reader import Graph
from medscale.model.layout import Layout
from medscale.ranking import EntityRows, Ranks, count_halves, sample_triples
from medscale.workers import Workers

__all__ = ["Evaluators", "Validation", "count_committed", "mrr_by_dim", "watched_mrr"]


class Evaluators(Protocol):
    """Those who rank a committed step while training goes on."""

    def begin(self, step: int) -> None:
        """Rank the validation triples with a committed step; beginning the same one again does nothing."""

    def done(self, seconds: float) -> bool:
        """Wait so long for what was begun; tell whether it has ended, well or not."""

    def counted(self) -> NDArray[np.int64]:
        """Wait for what was begun; return the halves of ranks among all entities, int64 [2, n, T]."""


class Validation:
    """Ranks a job's validation triples with the workers' own tables."""

    def __init__(self, job: Job, graph: Graph, layout: Layout, workers: Workers) -> None:
        self.job, self.graph, self.layout, self.workers = job, graph, layout, workers
        self._triples: NDArray[np.int64] | None = None
        self._known: KnownTriples | None = None

    def mrr(self, rows: EntityRows, relations_RC: Tensor) -> dict[str, float]:
        """Return the MRR by dim. Collective: every worker ranks its share of the triples among all entities."""
        if self._triples is None or self._known is None:
            self._triples = validation_triples(self.job, self.graph)
            own = self._triples[self.workers.share(len(self._triples))]
            self._known = KnownTriples.of_graph(self.graph, about=own)
        number, size = len(self._triples), self.workers.size
        own_share = self.workers.share(number)
        halves_2nT = torch.zeros(2, len(self.layout.dims), number, dtype=torch.int64)
        halves_2nT[:, :, own_share] = torch.from_numpy(
            count_halves(
                self._triples[own_share], rows, relations_RC, self.layout, self._known,
                memory_mib=self.job.evaluate.memory_mib, kernels=self.job.runtime.kernels, most=-(-number // size),
            )
        )  # fmt: skip
        # Put side by side before the mean is taken, so that it does not depend on the number of workers.
        return mrr_by_dim(self.layout.dims, self.workers.sum(halves_2nT.to(self.workers.device)).cpu().numpy())


def validation_triples(job: Job, graph: Graph) -> NDArray[np.int64]:
    """Return the triples that a job validates on, int64 [T, 3]."""
    return sample_triples(graph.triples("valid"), job.train.valid_triples, job.seed)


def count_committed(
    job: Job, graph: Graph, run_directory: Path, step: int, shard: int = 0, shards: int = 1
) -> NDArray[np.int64]:
    """Return the halves of the validation triples' ranks, int64 [2, n, T], with a committed step of a run.

    Counted are the candidates of one of `shards` parts of the entity table; what all parts count adds up.

    Raises:
        CheckpointError: the step is gone or damaged.

    """
    triples = validation_triples(job, graph)
    tables = open_tables(committed_directory(run_directory, step))
    # On a CPU, as they come: the GPUs are the trainers'.
    rows = tables.shard(Workers(shard, shards).share(tables.layout.num_entities), np.unique(triples[:, [0, 2]]))
    return count_halves(
        triples, rows, tables.relation_table, tables.layout,
        KnownTriples.of_graph(graph, about=triples), memory_mib=job.evaluate.memory_mib, kernels=job.runtime.kernels,
    )  # fmt: skip


def mrr_by_dim(dims: tuple[int, ...], halves_2nT: NDArray[np.int64]) -> dict[str, float]:
    """Return each sub-model's MRR over both sides, by its dim in words."""
    mrr_n = (1 / Ranks.of_halves(dims, halves_2nT).of("both")).mean(1)
    return {str(dim): float(value) for dim, value in zip(dims, mrr_n, strict=True)}


def watched_mrr(mrr: Mapping[str, float], dim: int | None) -> float:
    """Return the MRR that decides which step is best: a dim's, or the mean of all."""
    return mrr[str(dim)] if dim else float(np.mean(list(mrr.values())))
