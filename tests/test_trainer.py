"""The loop: it learns, resumes bit for bit after being killed anywhere, and stops before a wrong update."""

import dataclasses
import json
import os
import signal
from datetime import date
from pathlib import Path
from typing import Any

import children
import numpy as np
import pytest
import torch
from toy import SCORERS, toy_job

from medscale.batches.corruption import CorruptionBatch
from medscale.checkpoint import committed_steps, newest_checkpoint, open_tables, step_of
from medscale.config import Job, OptimizerSection
from medscale.distributed import process_group
from medscale.errors import CheckpointError, GraphError, NonFiniteError, UnsupportedError
from medscale.graph.known_triples import KnownTriples
from medscale.graph.reader import Graph
from medscale.optimizer import fused_optimizer, learning_rate_factor
from medscale.ranking import rank_all
from medscale.train import train
from medscale.trainer import Outcome, Trainer


def quick_job(scorer: str = "complex", **changes: Any) -> Job:
    changes["runtime"] = {"threads": 1} | changes.get("runtime", {})
    return toy_job(scorer, **changes)


def final_state(run: Path) -> list[np.ndarray]:
    """Everything that the last checkpoint holds, tensor by tensor."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner

    state: dict[str, Any] = {}
    directory = committed_steps(run)[-1] / "state"
    dcp.state_dict_loader._load_state_dict(
        state, storage_reader=dcp.FileSystemReader(directory), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )

    def leaves(mapping: dict[str, Any]) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for key in sorted(mapping):
            value = mapping[key]
            found += leaves(value) if isinstance(value, dict) else [value.numpy()]
        return found

    return leaves(state)


def losses(run: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]


def assert_same_end(one: Path, other: Path) -> None:
    assert committed_steps(one)[-1].name == committed_steps(other)[-1].name
    for left, right in zip(final_state(one), final_state(other), strict=True):
        np.testing.assert_array_equal(left, right)
    assert losses(one) == losses(other)


JOBS = {
    "softmax": quick_job("complex", med={"mutual": "both"}, optimizer={"tier_factors": (3.0, 1.0)}),
    "chunks": quick_job("transe", med={"weights": "learnable"}, optimizer={"kind": "adagrad", "schedule": "linear"}),
}


#: three steps out of some twenty, drawn anew each day
RANDOM_STEPS = [f"step:{n}" for n in np.random.default_rng(date.today().toordinal()).choice(20, 3, replace=False) + 1]

#: point of the save, and the how-manieth time it is passed
INSIDE_THE_SAVE = ("after-shard:2", "before-manifest:2", "before-rename:1", "after-rename:2", "during-retire:1")


@pytest.fixture(scope="module")
def uninterrupted(toy_graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = {}
    for name, job in JOBS.items():
        runs[name] = tmp_path_factory.mktemp(name) / "run"
        assert children.run_to_end(job, toy_graph.directory, runs[name]) == 0
    return runs


@pytest.mark.parametrize("kind", list(JOBS))
@pytest.mark.parametrize("fault", [*RANDOM_STEPS, *INSIDE_THE_SAVE])
def test_killed_anywhere_and_started_again_ends_bit_for_bit_the_same(
    toy_graph: Graph, uninterrupted: dict[str, Path], tmp_path: Path, kind: str, fault: str
) -> None:
    run = tmp_path / "run"
    assert children.run_to_end(JOBS[kind], toy_graph.directory, run, fault) == children.KILLED
    before = committed_steps(run)
    assert children.run_to_end(JOBS[kind], toy_graph.directory, run) == 0
    assert_same_end(run, uninterrupted[kind])
    if fault.startswith("step:"):
        lost = int(fault.split(":")[1]) - max((step_of(p) for p in before), default=0)
        assert lost <= 3, "more than one interval between checkpoints was lost"
    assert not [p for p in (run / "checkpoints").iterdir() if p.suffix in (".tmp", ".trash")]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_twenty_random_kills(toy_graph: Graph, uninterrupted: dict[str, Path], tmp_path: Path, number: int) -> None:
    draws = np.random.default_rng(number)
    kind, run = list(JOBS)[number % 2], tmp_path / "run"
    for _ in range(3):
        point = draws.choice(
            ["step", "after-shard", "before-manifest", "before-rename", "after-rename", "during-retire"]
        )
        children.run_to_end(JOBS[kind], toy_graph.directory, run, f"{point}:{draws.integers(1, 5)}")
    assert children.run_to_end(JOBS[kind], toy_graph.directory, run) == 0
    assert_same_end(run, uninterrupted[kind])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_the_step_and_a_second_start_goes_on(
    toy_graph: Graph, tmp_path: Path, number: signal.Signals
) -> None:
    job = quick_job(train={"epochs": 4000, "validate_every": 0}, checkpoint={"every_steps": 100_000})
    run = tmp_path / "run"
    process, code = children.start(job, toy_graph.directory, run)
    children.wait_for(run / "metrics.jsonl", '"kind"')
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 0
    assert code.value == number  # type: ignore[attr-defined]
    steps = committed_steps(run)
    assert len(steps) == 1
    assert losses(run)[-1][0] <= int(steps[0].name.split("-")[1])


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_learns_the_ring_at_every_dim(toy_graph: Graph, tmp_path: Path, scorer: str) -> None:
    distance = scorer in ("transe", "rotate", "pairre")
    job = toy_job(
        scorer,
        model={"dims": (8, 16, 32), "tiers": {"phone": 8, "server": 32}, "reciprocal": not distance},
        train={"epochs": 60, "batch_size": 100, "validate_every": 0, "log_every": 180},
        negatives={"number": 32, "chunk_size": 10},
        optimizer={"kind": "adagrad", "lr": 0.1},
        loss={"margin": 6.0},
        checkpoint={"every_steps": 10_000},
    )
    with process_group(torch.device("cpu")):
        trainer = Trainer(job, toy_graph, tmp_path, torch.device("cpu"))
        trainer.initialise()
        assert trainer.fit() is Outcome.FINISHED
        known = KnownTriples.of_graph(toy_graph)
        ranks = rank_all(
            toy_graph.triples("train"), trainer.table.all_rows(), trainer.relations.data, trainer.layout, known
        )
    mrr = (1 / ranks.of("both")).mean(1)
    # a random order of the 90 entities has an MRR of about .06
    assert mrr.min() > 0.25, mrr
    assert mrr[-1] > 0.5, mrr


@pytest.mark.parametrize("scorer", ["transe", "complex"])
def test_two_threads_repeat_a_run_bit_for_bit(toy_graph: Graph, scorer: str) -> None:
    """Large enough batches that torch splits them between threads, with many repeated rows."""
    job = toy_job(
        scorer, model={"dims": (32, 256), "tiers": {"t": 256}}, train={"batch_size": 200}, med={"mutual": "both"},
        negatives={"number": 40}, optimizer={"kind": "adagrad"},
        loss={"regularizer": "n3", "regularizer_weights": (0.1,)},
    )  # fmt: skip
    torch.set_num_threads(2)
    ends = []
    try:
        for _ in range(3):
            with process_group(torch.device("cpu")):
                trainer = Trainer(job, toy_graph, Path("unused"), torch.device("cpu"))
                trainer.initialise()
                for step in range(6):
                    trainer.train_step(trainer.batches.batch(step))
                ends.append([*(b.clone() for b in trainer.table.all_rows().blocks), trainer.relations.detach().clone()])
    finally:
        torch.set_num_threads(1)
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))


def test_early_stopping_keeps_the_best_step_for_evaluation(toy_graph: Graph, tmp_path: Path) -> None:
    job = quick_job(train={"epochs": 200, "validate_every": 1, "patience": 3}, optimizer={"lr": 0.5})
    outcome, _ = train(job, toy_graph, tmp_path)
    assert outcome is Outcome.STOPPED_EARLY
    progress = open_tables(committed_steps(tmp_path)[-1]).facts["progress"]
    means = {v["step"]: np.mean(list(v["mrr"].values())) for v in progress["validations"]}
    assert progress["stale"] == 3
    assert means[progress["best_step"]] == max(means.values())
    assert newest_checkpoint(tmp_path).name == f"step-{progress['best_step']:09d}"
    # started again, it stays stopped
    assert train(job, toy_graph, tmp_path)[0] is Outcome.STOPPED_EARLY


def test_a_non_finite_loss_stops_before_the_update_and_names_tier_and_term(toy_graph: Graph, tmp_path: Path) -> None:
    job = toy_job("transe")
    with process_group(torch.device("cpu")):
        trainer = Trainer(job, toy_graph, tmp_path, torch.device("cpu"))
        trainer.initialise()
        # columns beyond the smallest sub-model
        trainer.relations.data[:, 8:] = torch.nan
        before = [b.clone() for b in trainer.table.all_rows().blocks]
        with pytest.raises(NonFiniteError, match=r"step 1: .*hard loss of sub-model 16 \(tier server\)"):
            trainer.train_step(trainer.batches.batch(0))
        for one, other in zip(before, trainer.table.all_rows().blocks, strict=True):
            assert torch.equal(one, other)
        assert trainer.progress.step == 0


@pytest.mark.parametrize("scorer", ["transe", "complex"])
def test_one_sub_model_and_a_batch_larger_than_the_graph_train(toy_graph: Graph, tmp_path: Path, scorer: str) -> None:
    job = quick_job(scorer, model={"dims": (5,), "tiers": {"t": 5}}, train={"batch_size": 1000, "epochs": 2})
    assert train(job, toy_graph, tmp_path)[0] is Outcome.FINISHED


def test_without_validation_triples_training_goes_on_unless_it_must_know_when_to_stop(
    toy_graph: Graph, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bare = dataclasses.replace(toy_graph, num_triples={**toy_graph.num_triples, "valid": 0})
    assert train(quick_job(), bare, tmp_path / "one")[0] is Outcome.FINISHED
    assert "without validating" in capfd.readouterr().err
    with pytest.raises(GraphError, match=r"train\.patience"):
        train(quick_job(train={"patience": 2}), bare, tmp_path / "two")


def test_another_graph_is_refused(toy_graph: Graph, tmp_path: Path) -> None:
    train(quick_job(train={"epochs": 1}), toy_graph, tmp_path)
    with pytest.raises(CheckpointError, match="not the graph that was trained on"):
        train(quick_job(train={"epochs": 1}), dataclasses.replace(toy_graph, sha256="0" * 64), tmp_path)


def test_more_epochs_go_on_and_a_finished_run_is_left_alone(toy_graph: Graph, tmp_path: Path) -> None:
    train(quick_job(train={"epochs": 2}), toy_graph, tmp_path / "one")
    train(quick_job(train={"epochs": 4}), toy_graph, tmp_path / "one")
    train(quick_job(train={"epochs": 4}), toy_graph, tmp_path / "whole")
    assert_same_end(tmp_path / "one", tmp_path / "whole")
    assert train(quick_job(train={"epochs": 4}), toy_graph, tmp_path / "one")[0] is Outcome.FINISHED


def test_schedules() -> None:
    linear = OptimizerSection(schedule="linear", warmup_steps=4)
    factors = [learning_rate_factor(linear, step, 14) for step in range(14)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors[4:] == pytest.approx([1 - i / 10 for i in range(10)])
    constant = OptimizerSection()
    assert [learning_rate_factor(constant, step, 10) for step in (0, 9)] == [1.0, 1.0]


@pytest.mark.parametrize("scorer", ["transe", "rotate", "complex"])
@pytest.mark.parametrize("kind", ["rowwise_adagrad", "adagrad"])
def test_each_tier_moves_at_its_own_rate(toy_graph: Graph, tmp_path: Path, scorer: str, kind: str) -> None:
    """One step: a tier's columns end where they do in a run that has its rate everywhere."""
    factors = (3.0, 0.5, 1.0)
    ends = []
    for rates in (factors, *((factor,) for factor in factors)):
        job = toy_job(
            scorer, model={"dims": (4, 8, 12, 16), "tiers": {"phone": 4, "pc": 8, "large": 12}},
            optimizer={"kind": kind, "tier_factors": rates, "relation_lr": 0.2, "schedule": "linear"},
        )  # fmt: skip
        with process_group(torch.device("cpu")):
            trainer = Trainer(job, toy_graph, tmp_path, torch.device("cpu"))
            trainer.initialise()
            trainer.train_step(trainer.batches.batch(0))
            ends.append((trainer.table.all_rows().slice(0, 90).clone(), trainer.relations.detach().clone()))
            scorer_of_job = trainer.layout.scorer
    own, *alike = ends
    for table, unit in enumerate((scorer_of_job.unit_columns, scorer_of_job.relation_unit_columns)):
        for end, (start, stop) in zip(alike, ((0, 4), (4, 8), (8, 16)), strict=True):
            columns = slice(start * unit, stop * unit)
            torch.testing.assert_close(own[table][:, columns], end[table][:, columns], rtol=1e-6, atol=1e-7)
        assert not torch.allclose(alike[0][table], alike[1][table])


def test_adam_on_a_cpu_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="CUDA only"):
        fused_optimizer(OptimizerSection(kind="adam"), torch.device("cpu"))


def test_ids_out_of_range_stop_instead_of_reading_row_0(toy_graph: Graph, tmp_path: Path) -> None:
    with process_group(torch.device("cpu")):
        trainer = Trainer(toy_job(), toy_graph, tmp_path, torch.device("cpu"))
        trainer.initialise()
        for wrong in (toy_graph.num_entities, 2**33, -1):
            with pytest.raises(RuntimeError):
                trainer.table.rows(torch.tensor([wrong]))


def test_only_touched_rows_move_and_all_blocks_do(toy_graph: Graph, tmp_path: Path) -> None:
    with process_group(torch.device("cpu")):
        trainer = Trainer(toy_job("transe"), toy_graph, tmp_path, torch.device("cpu"))
        trainer.initialise()
        before = [b.clone() for b in trainer.table.all_rows().blocks]
        batch = trainer.batches.batch(0)
        trainer.train_step(batch)
        touched = torch.zeros(toy_graph.num_entities, dtype=torch.bool)
        touched[batch.entities_U] = True
        for one, other in zip(before, trainer.table.all_rows().blocks, strict=True):
            moved = (one != other).any(1)
            assert not (moved & ~touched).any()
            assert moved.any()


def test_a_run_does_not_depend_on_which_of_its_steps_are_logged(toy_graph: Graph, tmp_path: Path) -> None:
    ends = []
    for often in (1, 4):
        job = toy_job("transe", train={"epochs": 2, "log_every": often})
        with process_group(torch.device("cpu")):
            trainer = Trainer(job, toy_graph, tmp_path, torch.device("cpu"))
            trainer.initialise()
            terms = [trainer.train_step(trainer.batches.batch(step)) for step in range(6)]
            ends.append([trainer.table.all_rows().slice(0, 90).clone(), trainer.relations.detach().clone()])
        # the first step is shown, others are logged
        assert [t.whole for t in terms] == [step == 0 or (step + 1) % often == 0 for step in range(6)]
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


def test_a_broken_negative_stops_a_step_that_is_not_logged(toy_graph: Graph, tmp_path: Path) -> None:
    with process_group(torch.device("cpu")):
        trainer = Trainer(toy_job("transe", train={"log_every": 50}), toy_graph, tmp_path, torch.device("cpu"))
        trainer.initialise()
        trainer.train_step(trainer.batches.batch(0))
        batch = trainer.batches.batch(1)
        assert isinstance(batch, CorruptionBatch)
        positions = torch.cat([c.known_XP.flatten() for c in batch.corruptions])
        positions = torch.cat([positions, *(c.target_XP.flatten() for c in batch.corruptions)])
        negatives = batch.corruptions[0].candidates_XK.flatten()
        row = batch.entities_U[negatives[~torch.isin(negatives, positions)][0]]
        next(iter(trainer.table.all_rows().blocks))[row, 1] = torch.nan
        before = trainer.table.all_rows().slice(0, 90).clone()
        with pytest.raises(NonFiniteError, match=r"step 2: the gradient of the entities, first in .* is not finite\."):
            trainer.train_step(batch)
        torch.testing.assert_close(trainer.table.all_rows().slice(0, 90), before, equal_nan=True)
