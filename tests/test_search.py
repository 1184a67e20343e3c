"""Searches: real trials on a toy graph, judged on validation, kept as numbers, and gone on with."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from toy import toy_job, write_toy_graph

from medscale.cli import main as medscale
from medscale.config import Job
from medscale.errors import CheckpointError, ConfigError
from medscale.graph.reader import Graph
from medscale.jobfile import dump_job, load_job, with_values
from medscale.search import best_of, combinations, search

RATES = [{"optimizer.lr": rate} for rate in ("0.00001", "0.3")]


def job_for(**train: int) -> Job:
    return toy_job(
        "complex", "ring", train={"epochs": 10, "validate_every": 5, **train}, optimizer={"kind": "adagrad"},
        checkpoint={"every_steps": 30},
    )  # fmt: skip


def test_the_best_on_validation_is_found_and_written_as_a_job(toy_graph: Graph, tmp_path: Path) -> None:
    job = job_for()
    trials, signal_number = search(job, toy_graph, tmp_path, RATES)
    assert signal_number is None
    assert [trial.values for trial in trials] == RATES
    assert [trial.ending for trial in trials] == ["finished"] * 2
    assert [trial.epochs for trial in trials] == [10, 10]
    slow, fast = trials
    assert slow.mrr is not None
    assert fast.mrr is not None
    assert fast.mrr > slow.mrr + 0.1
    assert fast.mrr == pytest.approx(sum(fast.mrr_by_dim.values()) / len(job.model.dims))
    assert best_of(trials) is fast
    assert load_job(tmp_path / "best.yaml") == with_values(job, {"optimizer.lr": "0.3"}, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.yaml", "search.json", "writer.lock"]
    again, _ = search(job, toy_graph, tmp_path, [*RATES, {"optimizer.lr": "0.2"}])
    assert again[:2] == trials, "what was tried is not tried again"
    assert len(again) == 3
    with pytest.raises(CheckpointError, match=r"search of another job; it differs in seed: 0 -> 1"):
        search(dataclasses.replace(job, seed=1), toy_graph, tmp_path, RATES)
    with pytest.raises(CheckpointError, match="it differs in minutes: None -> 5"):
        search(job, toy_graph, tmp_path, RATES, minutes=5)


def test_a_trial_ends_when_its_time_is_over_or_it_diverges(toy_graph: Graph, tmp_path: Path) -> None:
    job = job_for(epochs=1_000_000, validate_every=1)
    trials, _ = search(job, toy_graph, tmp_path, [{"optimizer.lr": "0.1"}, {"optimizer.lr": "1e37"}], minutes=0.1)
    assert [trial.ending for trial in trials] == ["out of time", "diverged"]
    assert trials[0].mrr is not None
    assert trials[0].epochs > 1
    assert trials[1].mrr is None
    assert best_of(trials) is trials[0]


def test_what_cannot_be_searched_is_refused_before_anything_runs(toy_graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.validate_every"):
        search(job_for(validate_every=0), toy_graph, tmp_path, RATES)
    with pytest.raises(ConfigError, match=r"ring with optimizer\.lr=-1:\d+: optimizer\.lr: -1\.0 is too small"):
        search(job_for(), toy_graph, tmp_path, [*RATES, {"optimizer.lr": "-1"}])
    assert not list(tmp_path.iterdir())


def test_combinations_are_all_or_a_seeded_sample() -> None:
    values = {"a": ["1", "2"], "b": ["x", "y", "z"]}
    every = combinations(values, None, 0)
    assert [(c["a"], c["b"]) for c in every] == [(a, b) for a in "12" for b in "xyz"]
    drawn = combinations(values, 4, 7)
    assert len(drawn) == 4
    assert all(c in every for c in drawn)
    assert drawn == combinations(values, 4, 7)
    assert any(combinations(values, 4, seed) != drawn for seed in range(5))
    assert combinations(values, 10, 0) == every


def test_an_interrupted_trial_counts_the_time_before(toy_graph: Graph, tmp_path: Path) -> None:
    job, checkpoints = job_for(epochs=1_000_000), tmp_path / "s-trial" / "checkpoints"
    seconds = iter([0.0, 0.0, 10.0, 100.0, 100.0, 103.0])
    for total in (10.0, 13.0):
        before = set(checkpoints.glob("step-*"))

        def interrupt(before: set[Path] = before) -> None:
            while not set(checkpoints.glob("step-*")) - before:
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)

        watcher = threading.Thread(target=interrupt, daemon=True)
        watcher.start()
        trials, number = search(job, toy_graph, tmp_path / "s", RATES[1:], clock=lambda: next(seconds))
        watcher.join()
        assert (trials, number) == ([], signal.SIGTERM)
        assert json.loads((tmp_path / "s" / "cut_off.json").read_text()) == {"seconds": total}


@pytest.mark.slow
def test_a_killed_search_goes_on_and_ends_as_one_that_was_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_toy_graph(tmp_path / "data")
    job = tmp_path / "ring.yaml"
    job.write_text(dump_job(job_for()))
    command = ["search", str(job), "--vary", "optimizer.lr=0.1,0.3", "--data-dir", str(tmp_path / "data")]

    def places(runs: str) -> list[str]:
        return ["--runs-dir", str(tmp_path / runs), "--graphs-dir", str(tmp_path / "graphs")]

    def told(runs: str) -> list[dict[str, object]]:
        found = json.loads((tmp_path / runs / "ring-search" / "search.json").read_text())
        return [{k: v for k, v in trial.items() if k != "seconds"} for trial in found["trials"]]

    assert medscale([*command, *places("whole")]) == 0
    table = capsys.readouterr().out
    for trial in told("whole"):
        assert all(f"{mrr:.4f}" in table for dim, mrr in trial["mrr_by_dim"].items() if dim in ("4", "16"))
    assert re.search(r"MRR\W+phone\W+server\W+epochs", table), table
    steps = 120 + 70  # in the second trial
    killed = subprocess.run(
        [sys.executable, "-m", "medscale.search", *command[1:], *places("killed")],
        env={**os.environ, "MEDSCALE_FAULT": f"step:{steps}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert killed.returncode == -9, killed.stderr
    assert len(told("killed")) == 1
    assert medscale([*command, *places("killed")]) == 0
    assert told("killed") == told("whole")
    assert (tmp_path / "killed/ring-search/best.yaml").read_text() == (
        tmp_path / "whole/ring-search/best.yaml"
    ).read_text()  # fmt: skip


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "ring.yaml"
    job.write_text(dump_job(job_for()))
    with pytest.raises(SystemExit, match="2"):
        medscale(["search", str(job), "--vary", "optimizer.lr"])
    assert "--vary optimizer.lr: allowed: KEY=VALUE,VALUE" in capsys.readouterr().err
    assert medscale(["search", str(job), "--vary", "optimizer.rate=1"]) == 2
    assert "optimizer.rate: is not a key" in capsys.readouterr().err
