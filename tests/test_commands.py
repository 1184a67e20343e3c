"""The commands as a user types them, on a small real graph: train runs the whole job, the others one stage."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import write_toy_graph

from medscale import evaluate, plan, train
from medscale.checkpoint import newest_checkpoint, open_tables
from medscale.cli import main as medscale
from medscale.errors import CapacityError, CheckpointError, ConfigError, GraphError, UnsupportedError
from medscale.jobfile import load_job
from medscale.model.layout import layout_of
from medscale.runtime import Tier

JOB = """
name: ring
graph: {train: [train.tsv], valid: [valid.tsv], test: [test.tsv]}
model: {scorer: complex, reciprocal: true, dims: [4, 8, 16], damping: [0.5], tiers: {phone: 4, server: 16}}
negatives: {kind: all}
loss: {kind: softmax}
optimizer: {kind: adagrad, lr: 0.1}
train: {epochs: 20, batch_size: 100, validate_every: 5, log_every: 1}
runtime: {threads: 1}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with raw files, a job, and its whole run."""
    place = tmp_path_factory.mktemp("place")
    write_toy_graph(place / "data")
    (place / "ring.yaml").write_text(JOB.replace("{", "{ "), encoding="utf-8")
    command = [sys.executable, "-m", "medscale.train", "ring.yaml", "--data-dir", "data"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (place / "stdout").write_text(done.stdout)
    (place / "stderr").write_text(done.stderr)
    return place


def options(place: Path) -> list[str]:
    return [str(place / "ring.yaml"), "--data-dir", str(place / "data"), "--runs-dir", str(place / "runs"),
            "--graphs-dir", str(place / "graphs")]  # fmt: skip


def test_train_runs_the_whole_job(place: Path) -> None:
    run = place / "runs" / "ring"
    written = {p.name for p in run.iterdir()}
    assert written >= {
        "job.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "evaluation.json", "evaluation_summary.json",
        "evaluation_by_relation.csv", "export", "writer.lock",
    }  # fmt: skip
    assert "MRR" in (place / "stdout").read_text()
    stderr = (place / "stderr").read_text()
    assert "valid MRR" in stderr
    assert "\x1b" not in stderr
    assert load_job(run / "job.yaml") == load_job(place / "ring.yaml")
    kinds = {json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text().splitlines()}
    assert kinds == {"train", "valid"}
    assert any((run / "tensorboard").iterdir())


def test_a_missing_compiler_shows_before_the_graph_is_prepared(place: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "medscale.train", *options(place), "--graphs-dir", str(tmp_path / "graphs")]
    environment = {**os.environ, "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == UnsupportedError.exit_code
    assert "no-such-compiler" in done.stderr
    assert not (tmp_path / "graphs").exists()


def test_evaluation_files_hold_every_dim_protocol_and_side(place: Path) -> None:
    records = json.loads((place / "runs/ring/evaluation.json").read_text())
    keys = {(r["dim"], r["protocol"], r["side"]) for r in records}
    sides = [("field", "both"), ("field", "head"), ("field", "tail"), ("paper", "both")]
    assert keys == {(dim, *side) for dim in (4, 8, 16) for side in sides}
    assert set(records[0]) == {
        "dim", "split", "protocol", "side", "mrr", "hits@1", "hits@3", "hits@10", "mean_rank", "num_queries",
    }  # fmt: skip
    summary = json.loads((place / "runs/ring/evaluation_summary.json").read_text())
    assert summary["parameters_million"]["4"] == pytest.approx((90 * 4 * 2 + 8 * 4 * 2) / 1e6)
    assert 0 <= summary["ability_retention_ratio"] <= 1
    rows = list(csv.DictReader((place / "runs/ring/evaluation_by_relation.csv").open()))
    assert {r["relation"] for r in rows} == {"step1", "step2", "step7", "step30"}


def test_evaluate_prints_the_same_records_as_json_lines(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((place / "runs/ring/evaluation.json").read_text())
    assert evaluate.main([*options(place), "--json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == before
    by_directory = [str(place / "runs" / "ring"), *options(place)[1:]]
    assert evaluate.main([*by_directory, "--split", "valid", "--json"]) == 0
    assert {json.loads(line)["split"] for line in capsys.readouterr().out.splitlines()} == {"valid"}
    assert evaluate.main([*options(place), "--step", "3"]) == CheckpointError.exit_code
    assert "has no step 3" in capsys.readouterr().err


def test_exported_tiers_score_like_the_trained_crop(place: Path) -> None:
    tables = open_tables(newest_checkpoint(place / "runs" / "ring"))
    layout = layout_of(load_job(place / "ring.yaml").model, 90, 4)
    for name, dim in (("phone", 4), ("server", 16)):
        tier = Tier.open(place / "runs/ring/export" / name)
        np.testing.assert_array_equal(tier.vectors(np.arange(90)), tables.entity_columns(0, 90, 2 * dim))
        from medscale.model.prefix import prefix_scan

        scan = prefix_scan(layout.scorer, layout.dims, layout.damping)
        rows, relations = tables.rows(), tables.relation_table
        heads = torch.arange(20)
        query = layout.scorer.query(rows.gather(heads), relations[heads % 4], "tail")
        trained = scan.scores(query[None], rows.slice(0, 90)[None])[layout.dims.index(dim), 0]
        shipped = np.stack([tier.score_tails(int(h), int(h % 4)) for h in heads])
        np.testing.assert_allclose(shipped, trained.numpy(), rtol=1e-5, atol=1e-5 * np.abs(shipped).max())


def test_training_again_changes_nothing_and_resume_never_refuses(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(options(place)) == 0
    assert "going on from step-" in capsys.readouterr().err
    assert train.main([*options(place), "--resume", "never"]) == CheckpointError.exit_code


def test_a_lost_checkpoint_and_a_lost_graph_are_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = ["--runs-dir", str(tmp_path)]
    assert evaluate.main([*options(place), *elsewhere]) == CheckpointError.exit_code
    assert "train the job first" in capsys.readouterr().err
    assert medscale(["export", *options(place), *elsewhere]) == CheckpointError.exit_code
    without = [*options(place)[:1], "--data-dir", str(tmp_path), "--graphs-dir", str(tmp_path)]
    assert train.main(without) == GraphError.exit_code
    assert "train.tsv" in capsys.readouterr().err


def test_plan_tells_what_a_job_takes_and_refuses_what_cannot_fit(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(options(place)) == 0
    shown = capsys.readouterr().out
    for part in ("entity tables", "optimizer state", "batch", "phone", "checkpoints", "steps per epoch", "fits"):
        assert part in shown
    small = place / "small.yaml"
    small.write_text((place / "ring.yaml").read_text().replace("threads: 1", "threads: 1, memory_gib: 0.1"))
    for command in (plan, train):
        assert command.main([str(small), *options(place)[1:]]) == CapacityError.exit_code
        assert "may count on 0.10 GiB" in capsys.readouterr().err


def test_plan_counts_raw_files_or_takes_a_size(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = [str(place / "ring.yaml"), "--graphs-dir", str(tmp_path)]
    assert plan.main([*elsewhere, "--data-dir", str(place / "data")]) == 0
    assert "90 entities, 4 relations, 300 training triples (counted in the raw files" in joined(capsys)
    assert plan.main([*elsewhere, "--data-dir", str(tmp_path)]) == GraphError.exit_code
    assert "train.tsv" in capsys.readouterr().err
    size = ["--num-entities", "1000000", "--num-relations", "10", "--num-triples", "5000000"]
    assert plan.main([*elsewhere, *size]) == 0
    assert "1,000,000 entities" in joined(capsys)
    with pytest.raises(SystemExit):
        plan.main([*elsewhere, *size[:2]])


def joined(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, without the line breaks of a narrow console."""
    return " ".join(capsys.readouterr().out.split())


def test_a_wrong_job_lists_every_mistake(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = place / "wrong.yaml"
    wrong.write_text(
        JOB.replace("dims: [4, 8, 16]", "dims: [8, 4]").replace("lr: 0.1", "lr: -1").replace("threads", "thread")
    )
    assert train.main([str(wrong)]) == ConfigError.exit_code
    shown = capsys.readouterr().err
    for key in ("model.dims", "optimizer.lr", "runtime.thread", "model.tiers.server"):
        assert key in shown


@pytest.mark.slow
def test_predicted_memory_is_within_a_tenth_of_the_measured(tmp_path: Path) -> None:
    """Tables of hundreds of MB on a generated graph: the plan against the real process's peak resident memory."""
    job = tmp_path / "big.yaml"
    job.write_text(
        "name: big\ngraph: {synthetic: {num_users: 150000, num_triples: 40000}, valid_fraction: 0.005}\n"
        "model: {scorer: transe, dims: [32, 512], tiers: {phone: 32, server: 512}}\n"
        "train: {epochs: 1, batch_size: 1024, validate_every: 0}\nevaluate: {split: valid, memory_mib: 64}\n"
    )
    place = [str(job), "--runs-dir", str(tmp_path / "runs"), "--graphs-dir", str(tmp_path / "graphs")]
    assert medscale(["prepare", *place]) == 0
    loaded = load_job(job)
    predicted = plan.plan(loaded, plan.size_of(loaded, tmp_path / "graphs", tmp_path))
    code = (
        "import resource, sys; from medscale.train import main; main(sys.argv[1:]);"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, *place], capture_output=True, text=True, env=os.environ)
    peak = int(done.stdout.split("peak")[1]) * 1024
    assert sum(predicted.memory.host.values()) == pytest.approx(peak, rel=0.10)
