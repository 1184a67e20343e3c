"""Evaluator actors: Ray processes that rank validation triples with committed steps while training goes on.

Each counts its part of the entities, on CPUs, so together they hold one entity table, and one block each while they
read it; their counts add up to exactly the ranks that one process finds.
"""

from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError

from medscale.cluster import result_of, start_actor
from medscale.config import Job
from medscale.distributed import choose_threads
from medscale.errors import WorkerError
from medscale.graph.reader import Graph, open_graph
from medscale.jobfile import dump_job, parse_job
from medscale.location import Location
from medscale.validation import count_committed

__all__ = ["RayEvaluators", "start_evaluators"]


class Evaluator:
    """One process that counts a part of the entities."""

    def __init__(self, job: str, graph_directory: Location, run_directory: Path, part: int) -> None:
        self._job, self._part = parse_job(job, "job.yaml"), part
        self._graph = open_graph(graph_directory, verify=False)
        self._run_directory = run_directory
        choose_threads(self._job.runtime, self._job.runtime.evaluators)

    def count(self, step: int) -> NDArray[np.int64]:
        """Return the halves of ranks among this part, with a committed step, int64 [2, n, T]."""
        return count_committed(
            self._job, self._graph, self._run_directory, step, self._part, self._job.runtime.evaluators
        )


def start_evaluators(job: Job, graph: Graph, run_directory: Path) -> list[Any]:
    """Start the job's evaluators, and return their handles; each is started anew when it dies."""
    places = graph.directory.resolve(), run_directory.resolve()
    return [start_actor(Evaluator, dump_job(job), *places, part) for part in range(job.runtime.evaluators)]


class RayEvaluators:
    """The evaluators as the leading worker sees them."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors
        self._step: int | None = None
        self._counting: list[Any] = []

    def begin(self, step: int) -> None:
        """Rank the validation triples with a committed step; beginning the same one again does nothing."""
        if step != self._step:
            self._step, self._counting = step, [actor.count.remote(step) for actor in self._actors]

    def done(self, seconds: float) -> bool:
        """Wait so long for what was begun; tell whether it has ended, well or not."""
        _, running = ray.wait(self._counting, num_returns=len(self._counting), timeout=seconds)
        return not running

    def counted(self) -> NDArray[np.int64]:
        """Wait for what was begun; return the halves of ranks among all entities, int64 [2, n, T].

        Raises:
            CheckpointError: the step is damaged.
            WorkerError: evaluators died more often than they are started anew.

        """
        try:
            halves_2nT: NDArray[np.int64] = sum(map(result_of, self._counting))
        except RayError as error:
            raise WorkerError(f"evaluators were lost at step {self._step}: {error}; run again to go on") from error
        return halves_2nT
