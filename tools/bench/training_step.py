"""A whole step of the real Trainer on FB15k-237: triples/s of 64 sub-models and of one, and where the time goes.

usage: python tools/bench/training_step.py [--data-dir DIR] [--scorers ...] [--quick] [--json]

A step is what the training loop does for 1,024 triples with 64 negatives each: wait for a batch (a thread prepares the
next one meanwhile), look rows up, loss and gradients, guards, update of the tables (rowwise Adagrad, fused into the
look-up's backward pass) and of the relations. Models have 640 units: 64 sub-models of 10, 20, ..., 640, or the largest
alone. Negatives are shared by chunks of 32 positives, or fresh for each. `blocks` says into how many tables the
columns are cut: one, as for the single model, or three, for the tiers 10, 100 and 640 (so that they can lie on several
devices), which costs two more updates per row whatever is trained.

All are trained side by side, a few steps each in turn, in one process for each scorer, sharing and number of
threads, pinned to as many cores. Each turn begins with a step that is not measured, since its batch was prepared
while the other size was trained. `triples_per_s` is over all steps measured, `ms_per_step` their median, and
`times_one` that over the median with one sub-model. `shares` are each part's share of the time, from clocks around the
trainer's own calls: `kernel` is the fused kernel of the negatives, `loss` the rest of the loss and its backward pass.
`rows_per_step` are entities looked up.
"""

import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import in_own_process
from records import Record, options, parse, publish
from torch import Tensor
from workload import SCORERS, SHARING, TIERS, add_data_option, dims_of, job_of, prepared_graph

from medscale import trainer as trainer_module
from medscale.distributed import process_group
from medscale.graph.reader import open_graph
from medscale.logs import log
from medscale.loss.fused import Kernels
from medscale.model.embedding import EntityTable
from medscale.objective import Objective
from medscale.optimizer import Optimizers
from medscale.trainer import Trainer

CPU = torch.device("cpu")
PARTS = ("batch", "look-up", "loss", "kernel", "guards", "update", "dense update", "rest")


class Clock:
    """Seconds of each part; those of a part within another one are its own alone."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._within = 0.0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with a clock on it."""

        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            outside, self._within = self._within, 0.0
            start = time.perf_counter()
            result = function(*arguments, **keywords)
            elapsed = time.perf_counter() - start
            self.seconds[part] += elapsed - self._within
            self._within = outside + elapsed
            return result

        return call


def put_on(clock: Clock) -> None:
    """Put a clock on the parts of every trainer's step."""
    for owner, name, part in (
        (EntityTable, "rows", "look-up"),
        (Objective, "rows", "loss"),
        (Objective, "forward", "loss"),
        (Kernels, "corruption_loss", "kernel"),
        (trainer_module, "require_finite_terms", "guards"),
        (trainer_module, "require_finite_gradients", "guards"),
        (Optimizers, "set_rates", "update"),
        (Optimizers, "step_dense", "dense update"),
        (Trainer, "train_step", "rest"),
    ):
        setattr(owner, name, clock.timed(part, getattr(owner, name)))
    # The loss's backward pass begins at a number; the look-up's, which updates the tables, at a given gradient.
    of_loss, of_tables = clock.timed("loss", Tensor.backward), clock.timed("update", Tensor.backward)
    Tensor.backward = lambda self, gradient=None: (  # type: ignore[method-assign]
        of_loss(self) if gradient is None else of_tables(self, gradient)
    )


class Loop:
    """A trainer's loop, some steps at a time."""

    def __init__(self, trainer: Trainer, clock: Clock) -> None:
        trainer.initialise()
        self.trainer, self.clock = trainer, clock
        self.batches = trainer._prefetched()
        self.wait = clock.timed("batch", lambda: next(self.batches))
        self.parts = Counter(dict.fromkeys(PARTS, 0.0))
        self.times: list[float] = []
        self.triples = self.rows = 0

    def run(self, steps: int) -> None:
        """Train one step, and then some on the clock."""
        self.clock.seconds = Counter()
        self.trainer.train_step(self.wait())
        self.clock.seconds = self.parts
        for _ in range(steps):
            start = time.perf_counter()
            batch = self.wait()
            self.trainer.train_step(batch)
            self.times.append(time.perf_counter() - start)
            self.triples += batch.num_triples
            self.rows += len(batch.entities_U)

    def record(self) -> Record:
        layout, seconds = self.trainer.layout, sum(self.times)
        return {
            "sub_models": len(layout.dims), "blocks": len(layout.blocks), "units": layout.dims[-1],
            "triples_per_s": round(self.triples / seconds, 1),
            "ms_per_step": round(1000 * statistics.median(self.times), 3),
            "rows_per_step": round(self.rows / len(self.times)),
            "shares": {part: round(own / seconds, 3) for part, own in self.parts.items()},
        }  # fmt: skip


def records_of(
    scorer: str, sharing: str, batch: int, steps: int, turns: int, threads: int, graph_directory: Path
) -> list[Record]:
    """Measure one sub-model, and 64 in one block and in three."""
    clock, graph = Clock(), open_graph(graph_directory, verify=False)
    put_on(clock)
    with process_group(CPU):
        loops = []
        for sub_models, tiers in ((1, ()), (64, ()), (64, TIERS)):
            job = job_of(scorer, dims_of(sub_models), sharing, threads=threads, batch=batch, tiers=tiers)
            loops.append(Loop(Trainer(job, graph, Path(), CPU), clock))
        for loop in turns * loops:
            loop.run(steps)
    facts = {"scorer": scorer, "sharing": sharing, "system": "medscale", "threads": threads, "batch": batch}
    records = [{**facts, "negatives": 64, **loop.record()} for loop in loops]
    one = records[0]["ms_per_step"]
    return [{**record, "times_one": round(record["ms_per_step"] / one, 3)} for record in records]


def main() -> None:
    parser = options(__doc__, threads=(1, 2))
    add_data_option(parser)
    parser.add_argument("--scorers", nargs="+", choices=SCORERS, default=SCORERS)
    parser.add_argument("--sharing", nargs="+", choices=SHARING, default=tuple(SHARING))
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10, help="steps measured in each turn")
    parser.add_argument("--turns", type=int, default=4, help="turns of each size")
    arguments = parse(parser, threads=[1], scorers=["transe"], steps=3, turns=1)
    records = []
    with prepared_graph(arguments.data_dir) as graph_directory:
        for threads in arguments.threads:
            for scorer in arguments.scorers:
                for sharing in arguments.sharing:
                    log(f"{scorer}, {sharing}, {threads} threads")
                    size = (arguments.batch, arguments.steps, arguments.turns, threads)
                    records += in_own_process(threads, records_of, scorer, sharing, *size, graph_directory)
    publish(arguments, records)


if __name__ == "__main__":
    main()
