"""Validation: the same numbers from live tables, committed steps and parts of the entities; results that count late."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import SCORERS, toy_job

from medscale.checkpoint import committed_steps, find_resumable, newest_checkpoint, open_tables, step_of
from medscale.distributed import process_group
from medscale.errors import CheckpointError
from medscale.graph.known_triples import KnownTriples
from medscale.graph.reader import Graph
from medscale.ranking import Ranks, count_halves
from medscale.storage import write_json
from medscale.train import train
from medscale.trainer import Outcome, Trainer
from medscale.validation import count_committed, mrr_by_dim, validation_triples


def records(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: r[k] for k in ("step", "epoch", "mrr")} for r in lines if r["kind"] == "valid"]


@pytest.mark.parametrize("scorer", SCORERS)
def test_parts_of_the_entities_count_to_the_ranks_of_the_whole(scorer: str, toy_graph: Graph, tmp_path: Path) -> None:
    job = toy_job(scorer, train={"epochs": 2}, runtime={"threads": 1})
    train(job, toy_graph, tmp_path)
    step = step_of(committed_steps(tmp_path)[-1])
    whole = count_committed(job, toy_graph, tmp_path, step)
    for shards in (2, 3, 7):
        parts = [count_committed(job, toy_graph, tmp_path, step, part, shards) for part in range(shards)]
        np.testing.assert_array_equal(sum(parts), whole)
    # what the run itself found with its live tables, to the last digit
    assert records(tmp_path)[-1]["mrr"] == mrr_by_dim(job.model.dims, whole)
    # and with all known triples indexed rather than those about the ranked ones
    tables, triples = open_tables(newest_checkpoint(tmp_path, step)), validation_triples(job, toy_graph)
    known = KnownTriples.of_graph(toy_graph)
    naive = count_halves(triples, tables.rows(), tables.relation_table, tables.layout, known)
    np.testing.assert_array_equal(naive, whole)
    assert Ranks.of_halves(job.model.dims, whole).head.min() >= 1


def test_known_triples_about_some_answer_their_queries_alike(toy_graph: Graph) -> None:
    about = toy_graph.triples("valid")[::3]
    some, every = KnownTriples.of_graph(toy_graph, about=about), KnownTriples.of_graph(toy_graph)
    assert 0 < len(some) < len(every)
    for side, known in (("tail", 0), ("head", 2)):
        for one, other in zip(
            some.answers(side, about[:, known], about[:, 1]),  # type: ignore[arg-type]
            every.answers(side, about[:, known], about[:, 1]),  # type: ignore[arg-type]
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)
    assert len(KnownTriples.of_graph(toy_graph, about=about[:0])) == 0


def test_a_result_that_counts_later_stops_later_and_survives_a_restart(toy_graph: Graph, tmp_path: Path) -> None:
    """A lag moves only the step at which training stops; an end in the middle of the lag changes nothing."""
    keys = {"epochs": 40, "validate_every": 1, "patience": 2}
    slow = {"optimizer": {"lr": 1e-9}, "runtime": {"threads": 1}}
    ends = {}
    for lag in (0, 4):
        job = toy_job("transe", train={**keys, "validation_lag": lag}, **slow)
        outcome, _ = train(job, toy_graph, tmp_path / f"lag{lag}")
        assert outcome is Outcome.STOPPED_EARLY
        ends[lag] = step_of(committed_steps(tmp_path / f"lag{lag}")[-1])
    assert [r["step"] for r in records(tmp_path / "lag0")] == [6, 12, 18]
    assert records(tmp_path / "lag4") == records(tmp_path / "lag0")
    assert ends[0] == 18
    assert ends[4] in (18, 21), "the newest commit by step 22, where the third result counts"
    again, _ = train(toy_job("transe", train={**keys, "validation_lag": 4}, **slow), toy_graph, tmp_path / "lag4")
    assert again is Outcome.STOPPED_EARLY
    assert records(tmp_path / "lag4") == records(tmp_path / "lag0"), "each validation is told once"


@pytest.mark.parametrize(("epochs", "every", "lag"), [(4, 1, 6), (4, 1, 50), (5, 2, 8)])
def test_a_result_counts_at_the_next_validation_at_the_latest(
    toy_graph: Graph, tmp_path: Path, epochs: int, every: int, lag: int
) -> None:
    for name, steps in (("late", lag), ("at-once", 0)):
        train_keys = {"epochs": epochs, "validate_every": every, "validation_lag": steps}
        train(toy_job("transe", train=train_keys, runtime={"threads": 1}), toy_graph, tmp_path / name)
    assert records(tmp_path / "late") == records(tmp_path / "at-once")


def test_the_best_step_is_known_though_its_result_came_after_the_last_commit(toy_graph: Graph, tmp_path: Path) -> None:
    job = toy_job("transe", train={"epochs": 6, "validate_every": 1, "validation_lag": 5}, runtime={"threads": 1})
    train(job, toy_graph, tmp_path)
    mrr = {r["step"]: np.mean(list(r["mrr"].values())) for r in records(tmp_path)}  # type: ignore[attr-defined]
    best = max(mrr, key=lambda step: mrr[step])
    assert step_of(newest_checkpoint(tmp_path)) == best
    (tmp_path / "best.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"best\.json cannot be read"):
        newest_checkpoint(tmp_path)


def test_a_run_that_goes_back_forgets_what_was_best_after(toy_graph: Graph, tmp_path: Path) -> None:
    """The newest step, which was the best, is damaged and set aside; the best before it is exported again."""
    keys = {"epochs": 6, "validate_every": 2}
    job = toy_job("transe", train=keys, checkpoint={"every_steps": 100, "keep": 3}, runtime={"threads": 1})
    train(job, toy_graph, tmp_path)
    mrr = {r["step"]: np.mean(list(r["mrr"].values())) for r in records(tmp_path)}  # type: ignore[attr-defined]
    assert sorted(mrr) == [12, 24, 36]
    earlier = max((12, 24), key=lambda step: mrr[step])
    write_json(tmp_path / "best.json", {"step": 36, "valid_mrr": 1.0})
    with process_group(torch.device("cpu")):
        trainer = Trainer(job, toy_graph, tmp_path, torch.device("cpu"))
        checkpoint = find_resumable(tmp_path, "previous")
        assert checkpoint is not None
        assert checkpoint.step == 24
        trainer.resume(checkpoint)
    assert json.loads((tmp_path / "best.json").read_text(encoding="utf-8"))["step"] == earlier
    assert step_of(newest_checkpoint(tmp_path)) == earlier


def test_a_validation_begun_for_evaluators_is_ended_without_them(toy_graph: Graph, tmp_path: Path) -> None:
    """The job had evaluators when it stopped, and has none when it goes on."""
    job = toy_job("transe", train={"epochs": 2, "validate_every": 1}, runtime={"threads": 1})
    train(job, toy_graph, tmp_path / "alone")
    with process_group(torch.device("cpu")):
        trainer = Trainer(job, toy_graph, tmp_path / "other", torch.device("cpu"))
        trainer.initialise()
        for step in range(6):
            trainer.train_step(trainer.batches.batch(step))
        trainer.progress.waiting = {"step": 6, "mrr": None}
        trainer.save()
    train(job, toy_graph, tmp_path / "other")
    assert records(tmp_path / "other") == records(tmp_path / "alone")
