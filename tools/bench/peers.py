"""PyKEEN training one model of 640 units against medscale training 64 sub-models of up to 640, for the same time.

usage: python tools/bench/peers.py [--data-dir DIR] [--minutes M] [--scorers ...] [--systems ...] [--quick] [--json]

Both train on FB15k-237 in batches of 1,024 triples with 64 negatives each, on the same cores. They take turns of 20
seconds, so that whatever else the machine does meets them alike; a system's clock runs in its turns alone, and
what is loaded, drawn and compiled before the first step is not on it. When each has trained for `--minutes`, its
model is ranked by `medscale.ranking`: the same sample of validation triples, both sides, all entities, filtered,
realistic ranks for ties. `mrr` is that of 640 units, `mrr_by_dim` that of the tiers.

- medscale-chunk32, medscale-fresh: the real Trainer, look-up and update included, with MED as it is by default, on 64
  sub-models of 10, 20, ..., 640 units; negatives shared by chunks of 32 positives, or fresh for each.
- pykeen: its SLCWATrainingLoop with the basic negative sampler (fresh negatives), NSSALoss (margin 9, adversarial
  temperature 1) and Adagrad; TransE by l1. As its users run it, and (pykeen-kept) with what medscale asks of the
  C library: to keep large blocks of memory for the next step, which spares PyKEEN most of its time.
"""

import contextlib
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from measure import cores_for, peak_mib

# Before TorchRec, two of whose optimizers share a name, which PyKEEN's list of optimizers does not allow.
from pykeen.losses import NSSALoss
from pykeen.models import RotatE, TransE
from pykeen.training import SLCWATrainingLoop
from pykeen.training.callbacks import TrainingCallback
from pykeen.triples import CoreTriplesFactory
from records import Record, options, parse, publish
from workload import SHARING, add_data_option, dims_of, job_of, model_of, prepared_graph

from medscale.config import RuntimeSection
from medscale.distributed import choose_threads, process_group
from medscale.graph.known_triples import KnownTriples
from medscale.graph.reader import Graph, open_graph
from medscale.logs import log
from medscale.model.embedding import TableRows
from medscale.model.kernels.library import library
from medscale.model.layout import Layout, layout_of
from medscale.ranking import rank_all, sample_triples
from medscale.trainer import Trainer

SCORERS = ("transe", "rotate")
SYSTEMS = ("medscale-chunk32", "medscale-fresh", "pykeen", "pykeen-kept")
UNITS, SUB_MODELS, BATCH, NEGATIVES = 640, 64, 1024, 64
TIERS = (10, 100, 640)
TURN_SECONDS = 20.0
#: learning rates
RATES = {
    ("transe", "medscale-chunk32"): 0.01, ("transe", "medscale-fresh"): 0.01, ("transe", "pykeen"): 0.03,
    ("rotate", "medscale-chunk32"): 0.01, ("rotate", "medscale-fresh"): 0.01, ("rotate", "pykeen"): 0.1,
}  # fmt: skip

#: entities' rows, relations' rows, and how they lie
Model = tuple[TableRows, torch.Tensor, Layout]


class Turns:
    """A system's turns on the machine, and what it did in them."""

    def __init__(self, connection: Connection, minutes: float) -> None:
        self.connection, self.total = connection, 60 * minutes
        self.turn = min(TURN_SECONDS, self.total / 3)
        self.seconds, self.triples, self.steps = 0.0, 0, 0

    def wait(self) -> None:
        """Wait for the next turn."""
        self.connection.send(None)
        self.connection.recv()
        self.began = time.perf_counter()

    def go_on(self) -> bool:
        """Return whether there is time for another step; waits where this turn is over."""
        elapsed = time.perf_counter() - self.began
        if elapsed < min(self.turn, self.total - self.seconds):
            return True
        self.seconds += elapsed
        if self.seconds < self.total:
            self.wait()
        return self.seconds < self.total

    def step_done(self, triples: int) -> None:
        self.triples += triples
        self.steps += 1


def train_medscale(scorer: str, sharing: str, rate: float, threads: int, graph: Graph, turns: Turns) -> Model:
    """Train 64 sub-models."""
    job = job_of(scorer, dims_of(SUB_MODELS, UNITS), sharing, threads=threads, batch=BATCH, lr=rate)
    trainer = Trainer(job, graph, Path(), torch.device("cpu"))
    trainer.initialise()
    turns.wait()
    for batch in trainer._prefetched():
        if not turns.go_on():
            break
        trainer.train_step(batch)
        turns.step_done(batch.num_triples)
    return trainer.table.all_rows(), trainer.relations.detach(), trainer.layout


class TimeIsUpError(Exception):
    """Ends PyKEEN's training."""


class Watch(TrainingCallback):
    """Lets PyKEEN train in its turns."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self.turns = turns

    def pre_batch(self, **_: Any) -> None:
        if not self.turns.go_on():
            raise TimeIsUpError

    def post_batch(self, epoch: int, batch: Any, **_: Any) -> None:
        self.turns.step_done(len(batch["positives"]))


def train_pykeen(scorer: str, rate: float, graph: Graph, turns: Turns) -> Model:
    """Train one model."""
    factory = CoreTriplesFactory(torch.tensor(graph.triples("train")), graph.num_entities, graph.num_relations)
    common = {
        "triples_factory": factory, "embedding_dim": UNITS, "random_seed": 0,
        "loss": NSSALoss(margin=9.0, adversarial_temperature=1.0),
    }  # fmt: skip
    if scorer == "transe":
        model = TransE(scoring_fct_norm=1, entity_constrainer=None, **common)
    else:
        model = RotatE(interaction_kwargs={"p": 1}, **common)
    loop = SLCWATrainingLoop(
        model=model, triples_factory=factory, optimizer=torch.optim.Adagrad(model.parameters(), lr=rate),
        negative_sampler="basic", negative_sampler_kwargs={"num_negs_per_pos": NEGATIVES},
        automatic_memory_optimization=False,
    )  # fmt: skip
    turns.wait()
    with contextlib.suppress(TimeIsUpError):
        loop.train(
            factory, num_epochs=10_000, batch_size=BATCH, use_tqdm=False, pin_memory=False, callbacks=Watch(turns)
        )
    entities, relations = (f[0](None).detach() for f in (model.entity_representations, model.relation_representations))
    if scorer == "rotate":
        entities, relations = torch.view_as_real(entities).flatten(1), relations.angle()
    layout = layout_of(model_of(scorer, (UNITS,)), graph.num_entities, graph.num_relations)
    return TableRows([entities], layout.num_columns), relations, layout


def compete(
    scorer: str, system: str, rate: float, minutes: float, triples: int, threads: int, graph_directory: Path,
    connection: Connection,
) -> None:  # fmt: skip
    """Train one system in its turns, and send its record."""
    if system == "pykeen":
        torch.set_num_threads(threads)
    else:
        choose_threads(RuntimeSection(threads=threads))
    graph, turns = open_graph(graph_directory, verify=False), Turns(connection, minutes)
    with process_group(torch.device("cpu")):
        name, _, sharing = system.partition("-")
        if name == "pykeen":
            model = train_pykeen(scorer, rate, graph, turns)
        else:
            model = train_medscale(scorer, sharing, rate, threads, graph, turns)
        peak = peak_mib()
        rows, relations_RC, layout = model
        known = KnownTriples.of_graph(graph)
        ranks = rank_all(sample_triples(graph.triples("valid"), triples, 0), rows, relations_RC, layout, known)
        mrr = dict(zip(layout.dims, (1 / ranks.of("both")).mean(1).round(4).tolist(), strict=True))
    connection.send(
        {
            "scorer": scorer, "system": name, "sharing": sharing if sharing in SHARING else "fresh",
            "freed_memory": "returned" if system == "pykeen" else "kept", "sub_models": len(layout.dims),
            "units": UNITS, "threads": threads, "batch": BATCH, "negatives": NEGATIVES, "learning_rate": rate,
            "seconds": round(turns.seconds, 1), "steps": turns.steps,
            "triples_per_s": round(turns.triples / turns.seconds, 1), "peak_mib": round(peak, 1), "mrr": mrr[UNITS],
            "mrr_by_dim": {str(dim): mrr[dim] for dim in TIERS if dim in mrr}, "triples_ranked": triples,
        }
    )  # fmt: skip


def records_of(
    scorer: str, systems: list[str], rate: float | None, minutes: float, triples: int, threads: int,
    graph_directory: Path,
) -> list[Record]:  # fmt: skip
    """Let systems take turns until each has had its time."""
    context = multiprocessing.get_context("spawn")
    connections = []
    with cores_for(threads):
        for system in systems:
            here, there = context.Pipe()
            chosen = (
                scorer,
                system,
                rate or RATES[scorer, system.removesuffix("-kept")],
                minutes,
                triples,
                threads,
                graph_directory,
            )
            context.Process(target=compete, args=(*chosen, there), daemon=True).start()
            there.close()
            connections.append(here)
    for connection in connections:
        connection.recv()
    records: dict[str, Record] = {}
    while len(records) < len(systems):
        for system, connection in zip(systems, connections, strict=True):
            if system not in records:
                connection.send(None)
                record = connection.recv()
                if record is not None:
                    log(f"{scorer}, {system}: MRR {record['mrr']}, {record['triples_per_s']:,.0f} triples/s")
                    records[system] = record
    return [records[system] for system in systems]


def main() -> None:
    parser = options(__doc__, threads=(2,))
    add_data_option(parser)
    parser.add_argument("--scorers", nargs="+", choices=SCORERS, default=SCORERS)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--minutes", type=float, default=4.0, help="time that each system trains")
    parser.add_argument("--triples", type=int, default=2000, help="validation triples ranked")
    parser.add_argument("--learning-rate", type=float, help="for all systems, to try it; default: `RATES`")
    quick = {"scorers": ["transe"], "systems": ["medscale-chunk32", "medscale-fresh", "pykeen-kept"]}
    arguments = parse(parser, threads=[1], minutes=0.05, triples=50, **quick)
    library()  # compiled now, if it has to be, and on nobody's clock
    with prepared_graph(arguments.data_dir) as graph_directory:
        records = [
            record
            for threads in arguments.threads
            for scorer in arguments.scorers
            for record in records_of(
                scorer, arguments.systems, arguments.learning_rate, arguments.minutes, arguments.triples, threads,
                graph_directory,
            )
        ]  # fmt: skip
    publish(arguments, records, libraries=("pykeen",))


if __name__ == "__main__":
    main()
