"""Preparing a job's graph: built once, opened afterwards, refused where the job has changed."""

import dataclasses
import io
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from medscale import logs
from medscale.config import GraphSection, Job, ModelSection, SyntheticSection, TrainSection
from medscale.errors import GraphError, RunLockedError
from medscale.graph.reader import open_graph
from medscale.jobfile import dump_job
from medscale.prepare import main, prepare
from medscale.storage import run_lock

ROWS = [(f"e{i}", f"r{i % 3}", f"e{i * 7 % 50}") for i in range(50)]
SYNTHETIC = GraphSection(
    synthetic=SyntheticSection(num_users=200, num_triples=4_000, part_triples=1_500),
    valid_fraction=0.05,
    test_fraction=0.1,
)


def job_of(graph: GraphSection, name: str = "toy", seed: int = 0) -> Job:
    model = ModelSection(scorer="transe", dims=(4, 8), tiers={"phone": 4, "server": 8})
    return Job(name=name, seed=seed, graph=graph, model=model, train=TrainSection(epochs=1))


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    (root / "t.tsv").write_text("".join("\t".join(row) + "\n" for row in ROWS))
    return root


def test_built_once_then_opened(data_root: Path, tmp_path: Path) -> None:
    job = job_of(GraphSection(train=("t.tsv",)))
    built = prepare(job, data_root=data_root, graphs_root=tmp_path / "graphs")
    assert built.directory == tmp_path / "graphs" / "toy"
    shutil.rmtree(data_root)
    opened = prepare(job, data_root=data_root, graphs_root=tmp_path / "graphs")
    assert opened == built
    assert sorted(path.name for path in (tmp_path / "graphs").iterdir()) == [".locks", "toy"]


def test_jobs_share_a_graph_by_its_name(data_root: Path, tmp_path: Path) -> None:
    section = GraphSection(train=("t.tsv",), name="shared")
    first = prepare(job_of(section, "one"), data_root=data_root, graphs_root=tmp_path)
    # Neither the seed (splits are files) nor the memory to prepare with changes what the graph holds.
    section = dataclasses.replace(section, memory_mib=4096)
    second = prepare(job_of(section, "two", seed=5), data_root=data_root, graphs_root=tmp_path)
    assert first == second
    assert first.name == "shared"


def test_a_changed_job_is_refused_with_every_difference(data_root: Path, tmp_path: Path) -> None:
    prepare(job_of(GraphSection(train=("t.tsv",), valid_fraction=0.1)), data_root=data_root, graphs_root=tmp_path)
    changed = job_of(GraphSection(train=("u.tsv",), test_fraction=0.2), seed=1)
    with pytest.raises(GraphError) as caught:
        prepare(changed, data_root=data_root, graphs_root=tmp_path)
    for difference in (
        "graph.train is ['u.tsv'], was ['t.tsv']",
        "graph.valid_fraction is 0.0, was 0.1",
        "graph.test_fraction is 0.2, was 0.0",
        "seed is 1, was 0",
        "Delete the directory to prepare it anew, or give graph.name another value",
    ):
        assert difference in str(caught.value)
    assert "graph.header" not in str(caught.value)


def test_damaged_graph_is_refused(data_root: Path, tmp_path: Path) -> None:
    job = job_of(GraphSection(train=("t.tsv",)))
    graph = prepare(job, data_root=data_root, graphs_root=tmp_path)
    path = graph.parts("train")[0]
    data = bytearray(path.read_bytes())
    data[30] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(GraphError, match="is damaged: its SHA-256"):
        prepare(job, data_root=data_root, graphs_root=tmp_path)


def test_generated_graph(tmp_path: Path) -> None:
    graph = prepare(job_of(SYNTHETIC), data_root=tmp_path / "none", graphs_root=tmp_path / "graphs")
    assert sorted(path.name for path in (tmp_path / "graphs").iterdir()) == [".locks", "toy"]
    kept = sum(graph.num_triples.values())
    assert kept + sum(graph.facts["duplicates"].values()) == 4_000
    assert graph.num_relations == 15
    assert 0.05 < graph.num_triples["test"] / kept < 0.15
    types = graph.entity_types()
    assert types is not None
    # Kinds and names agree, and users alone have a class.
    names = graph.entity_names().to_pylist()
    for row in types.to_pylist():
        assert names[row["entity"]].split("/")[0] == row["type"]
        assert (row["label"] is not None) == (row["type"] == "user")
    assert np.array_equal(types.column("entity").to_numpy(), np.arange(graph.num_entities))
    again = prepare(job_of(SYNTHETIC), data_root=tmp_path / "none", graphs_root=tmp_path / "again")
    assert again.sha256 == graph.sha256
    with pytest.raises(GraphError, match="seed is 1, was 0"):
        prepare(job_of(SYNTHETIC, seed=1), data_root=tmp_path, graphs_root=tmp_path / "graphs")


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("a\tb\n")
    with pytest.raises(GraphError, match=r"t\.tsv:1"):
        prepare(job_of(GraphSection(train=("t.tsv",))), data_root=tmp_path, graphs_root=tmp_path / "graphs")
    assert [path.name for path in (tmp_path / "graphs").iterdir()] == [".locks"]


def test_two_at_once_build_one_graph(data_root: Path, tmp_path: Path) -> None:
    job, endings = job_of(GraphSection(train=("t.tsv",))), []

    def build() -> None:
        try:
            endings.append(prepare(job, data_root=data_root, graphs_root=tmp_path / "g").sha256)
        except RunLockedError:
            endings.append("locked")

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    graph = open_graph(tmp_path / "g" / "toy")
    assert set(endings) <= {graph.sha256, "locked"}
    assert graph.sha256 in endings
    with run_lock(tmp_path / "g" / ".locks" / "other"), pytest.raises(RunLockedError):
        prepare(dataclasses.replace(job, name="other"), data_root=data_root, graphs_root=tmp_path / "g")


def test_command_prepares_and_reports(data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job_file = tmp_path / "toy.yaml"
    job_file.write_text(dump_job(job_of(GraphSection(train=("t.tsv",)))))
    arguments = [str(job_file), "--data-dir", str(data_root), "--graphs-dir", str(tmp_path / "graphs")]
    assert main(arguments) == 0
    assert "50 entities, 3 relations; train 50" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "is there already" in capsys.readouterr().err
    job_file.write_text(dump_job(job_of(GraphSection(train=("missing.tsv",)), name="other")))
    assert main(arguments) == GraphError.exit_code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("medscale: graph.train: no file 'missing.tsv' under the data root")


def test_module_runs_with_the_data_root_from_the_environment(data_root: Path, tmp_path: Path) -> None:
    job_file = tmp_path / "toy.yaml"
    job_file.write_text(dump_job(job_of(GraphSection(train=("t.tsv",)))))
    variables = {**os.environ, "MEDSCALE_DATA_DIR": str(data_root)}
    command = [sys.executable, "-m", "medscale.prepare", str(job_file)]
    result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stderr
    assert open_graph(tmp_path / "graphs" / "toy").num_triples["train"] == 50
    help_text = subprocess.run(
        [sys.executable, "-m", "medscale.prepare", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for option in ("JOB", "--data-dir", "--graphs-dir", "--runs-dir", "MEDSCALE_DATA_DIR"):
        assert option in help_text


def test_progress_prints_plain_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "LINE_SECONDS", 0.0)
    with logs.progress("reading", 1_000, "bytes") as advance:
        advance(400)
        advance(600)
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert lines[:2] == ["reading: 400 of 1,000 bytes (40%)", "reading: 1,000 of 1,000 bytes (100%)"]
    assert lines[2].startswith("reading: 1,000 bytes in ")


def test_progress_shows_a_live_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with logs.progress("reading", 1_000, "bytes") as advance:
        advance(1_000)
    shown = sys.stderr.getvalue()
    assert "reading" in shown
    assert "1,000/1,000 bytes" in shown
