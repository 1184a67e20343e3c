"""Checkpoints under damage: nothing unverified is loaded, nothing committed is lost, nothing starts over silently."""

import ctypes
import dataclasses
import json
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardMetadata
from toy import toy_job

from medscale import checkpoint, pieces
from medscale.checkpoint import (
    MUTABLE_KEYS,
    changed_keys,
    checkpoints_of,
    committed_steps,
    find_resumable,
    load,
    newest_checkpoint,
    open_tables,
    retain,
    save,
    verify,
)
from medscale.config import ExtendSection, Job
from medscale.distributed import process_group
from medscale.errors import CheckpointError, RunLockedError
from medscale.graph.reader import Graph
from medscale.jobfile import job_to_mapping
from medscale.pieces import StoredRows
from medscale.storage import run_lock
from medscale.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def group() -> Iterator[None]:
    with process_group(torch.device("cpu")):
        yield


def trained(job: Job, graph: Graph, run: Path, steps: tuple[int, ...]) -> Trainer:
    """Train a toy job and save at the given steps."""
    run.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(job, graph, run, torch.device("cpu"))
    trainer.initialise()
    for step in range(max(steps)):
        trainer.train_step(trainer.batches.batch(step))
        if step + 1 in steps:
            trainer.save()
    return trainer


@pytest.fixture(scope="module")
def template(toy_graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the committed steps 2 and 4."""
    run = tmp_path_factory.mktemp("template") / "run"
    with process_group(torch.device("cpu")):
        trained(toy_job(), toy_graph, run, (2, 4))
    return run


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    """A private copy of the template."""
    return Path(shutil.copytree(template, tmp_path / "run"))


@pytest.mark.parametrize("scorer", ["transe", "complex"])
@pytest.mark.parametrize("kind", ["rowwise_adagrad", "adagrad"])
@pytest.mark.usefixtures("group")
def test_tables_and_optimizer_state_come_back_bit_for_bit(
    toy_graph: Graph, tmp_path: Path, scorer: str, kind: str
) -> None:
    job = toy_job(scorer, optimizer={"kind": kind})
    trainer = trained(job, toy_graph, tmp_path, (3,))
    other = Trainer(job, toy_graph, tmp_path, torch.device("cpu"))
    other.resume(verify(newest_checkpoint(tmp_path)))
    for step in (3, 4):
        for t in (trainer, other):
            t.train_step(t.batches.batch(step))
    assert torch.equal(trainer.relations, other.relations)
    for one, two in zip(trainer.table.all_rows().blocks, other.table.all_rows().blocks, strict=True):
        assert torch.equal(one, two)
    tables = open_tables(newest_checkpoint(tmp_path))
    assert tables.facts["step"] == 3
    assert tables.entity_columns(5, 9, 7).shape == (4, 7)
    np.testing.assert_array_equal(tables.entity_columns(0, 90, 7), tables.rows().slice(0, 90)[:, :7].numpy())


def test_flipped_bits_are_refused_and_named(run: Path) -> None:
    newest = committed_steps(run)[-1]
    files = sorted(p for p in newest.rglob("*") if p.is_file())
    draws = np.random.default_rng(0)
    for number in range(40):
        path = files[number % len(files)]
        data = bytearray(path.read_bytes())
        data[draws.integers(len(data))] ^= 1 << int(draws.integers(8))
        original = path.read_bytes()
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="step-000000004"):
            verify(newest)
        path.write_bytes(original)
    verify(newest)


def test_truncated_missing_extra_and_swapped_files_are_refused(run: Path) -> None:
    older, newest = committed_steps(run)
    for path in sorted(p for p in newest.rglob("*") if p.is_file()):
        original = path.read_bytes()
        path.write_bytes(original[: len(original) // 2])
        with pytest.raises(CheckpointError):
            verify(newest)
        path.unlink()
        with pytest.raises(CheckpointError, match=r"missing|manifest"):
            verify(newest)
        path.write_bytes((older / path.relative_to(newest)).read_bytes())
        if path.read_bytes() != original:
            with pytest.raises(CheckpointError):
                verify(newest)
        path.write_bytes(original)
    (newest / "state" / "extra").write_text("x")
    with pytest.raises(CheckpointError, match="extra"):
        verify(newest)


def test_a_malicious_index_never_runs(run: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    index = newest_checkpoint(run) / "state" / ".metadata"
    index.write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    with pytest.raises(CheckpointError):
        open_tables(newest_checkpoint(run))
    assert not canary.exists()


def test_a_damaged_newest_step_stops_and_names_the_way_out(run: Path) -> None:
    newest = committed_steps(run)[-1]
    (newest / "state" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp.*step-000000002.*--resume previous"):
        find_resumable(run, "auto")
    checkpoint = find_resumable(run, "previous")
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert (checkpoints_of(run) / "step-000000004.aside").is_dir()
    assert [p.name for p in committed_steps(run)] == ["step-000000002"]


def test_all_steps_damaged_is_an_error_and_never_a_fresh_start(run: Path) -> None:
    for step in committed_steps(run):
        (step / "manifest.json").unlink()
    for resume in ("auto", "previous"):
        with pytest.raises(CheckpointError):
            find_resumable(run, resume)
    for step in committed_steps(run):
        step.rename(step.with_name(step.name + ".damaged"))
    with pytest.raises(CheckpointError, match="cannot go on"):
        find_resumable(run, "auto")
    assert find_resumable(run.with_name("new"), "auto") is None


def test_resume_never_refuses_a_used_directory_and_leftovers_are_swept(run: Path) -> None:
    with pytest.raises(CheckpointError, match="already holds step-000000004"):
        find_resumable(run, "never")
    for name in ("step-000000006.tmp", "step-000000001.trash"):
        (checkpoints_of(run) / name).mkdir()
    assert find_resumable(run, "auto") is not None
    assert sorted(p.name for p in checkpoints_of(run).iterdir()) == ["step-000000002", "step-000000004"]


def test_retention_keeps_the_newest_and_the_best(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoints_of(run)
    for step in (5, 6, 7):
        shutil.copytree(folder / "step-000000002", folder / f"step-{step:09d}")
    retain(run, keep=2, needed={4, None})
    assert [p.name[-1] for p in committed_steps(run)] == ["4", "6", "7"]

    def refuse(path: Path) -> None:
        raise OSError("the disk says no")

    monkeypatch.setattr("medscale.checkpoint.retire_directory", refuse)
    retain(run, keep=2, needed={None})
    assert "warning" in capfd.readouterr().err
    assert len(committed_steps(run)) == 3


@pytest.mark.usefixtures("group")
def test_a_full_disk_leaves_the_step_before_whole(toy_graph: Graph, tmp_path: Path) -> None:
    trainer = trained(toy_job(), toy_graph, tmp_path, (2,))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer.train_step(trainer.batches.batch(2))
    for limit in (100, 3_000, 20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(CheckpointError, match="could not be written"):
                trainer.save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [p.name for p in checkpoints_of(tmp_path).iterdir()] == ["step-000000002"]
        verify(newest_checkpoint(tmp_path))
    trainer.save()
    assert verify(newest_checkpoint(tmp_path)).step == 3


def test_a_changed_job_is_refused_with_every_key_that_differs(toy_graph: Graph, run: Path) -> None:
    changed = toy_job("simple", model={"dims": (4, 8, 12), "tiers": {"phone": 4, "server": 12}}, optimizer={"lr": 0.2})
    with process_group(torch.device("cpu")):
        trainer = Trainer(changed, toy_graph, run, torch.device("cpu"))
        with pytest.raises(CheckpointError) as caught:
            trainer.resume(verify(newest_checkpoint(run)))
    for key in ("model.scorer", "model.dims", "model.tiers.server", "optimizer.lr"):
        assert f"{key}: " in str(caught.value)
    assert "train.epochs" not in str(caught.value)


def test_every_key_is_either_free_to_change_or_refused() -> None:
    saved = job_to_mapping(dataclasses.replace(toy_job(), extend=ExtendSection(run="parent", triples=("new.tsv",))))

    def leaves(mapping: dict[str, object], prefix: str = "") -> Iterator[tuple[str, dict[str, object], str]]:
        for key, value in mapping.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", mapping, key

    count = 0
    for path, holder, key in list(leaves(saved)):
        original, before = holder[key], json.loads(json.dumps(saved))
        holder[key] = "another value"
        assert bool(changed_keys(before, saved)) == (path not in MUTABLE_KEYS), path
        holder[key] = original
        count += 1
    assert count > 50


def test_how_a_run_would_be_extended_is_no_part_of_it() -> None:
    job = toy_job()
    other = dataclasses.replace(job, extend=ExtendSection(rows="trained", others=0))
    before = job_to_mapping(job)
    assert changed_keys(before, job_to_mapping(other)) == []
    del before["extend"]  # as it was saved before there was such a section
    assert changed_keys(before, job_to_mapping(other)) == []
    assert changed_keys(before, job_to_mapping(dataclasses.replace(job, extend=ExtendSection(run="ring"))))


def test_a_second_writer_is_turned_away_with_the_first_ones_name(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from medscale.storage import run_lock\n"
        "with run_lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    for _ in range(5):
        with pytest.raises(RunLockedError, match=rf"pid {holder.pid}, since \d{{4}}"), run_lock(tmp_path):
            pass
    holder.kill()
    holder.wait()
    with run_lock(tmp_path):
        pass


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_files_are_synced_before_the_rename_and_the_directory_after(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from medscale.storage import *\n"
        "root = Path(sys.argv[1])\n"
        "with staging_directory(root / 'x') as d:\n    (d / 'a').write_text('1'); commit_directory(d, root / 'x')\n"
    )
    log = tmp_path / "trace"
    command = [
        "strace",
        "-f",
        "-e",
        "trace=fsync,rename,openat",
        "-o",
        str(log),
        sys.executable,
        "-c",
        code,
        str(tmp_path),
    ]
    if subprocess.run(command, check=False).returncode:
        pytest.skip("strace may not trace here")
    calls = [
        line.split(" ", 1)[1].strip() for line in log.read_text().splitlines() if "fsync(" in line or "rename(" in line
    ]
    renamed = next(i for i, call in enumerate(calls) if "rename(" in call)
    assert sum("fsync" in call for call in calls[:renamed]) >= 2
    assert any("fsync" in call for call in calls[renamed:])


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("kind", ["rowwise_adagrad", "adagrad"])
def test_tables_in_pieces_come_back_and_take_little_memory_to_save(
    toy_graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Pieces of seven rows or less; and of a table of 160 MB in pieces of 1 MB, a few at a time are copied."""
    job = toy_job("transe", optimizer={"kind": kind})
    trainer = Trainer(job, toy_graph, tmp_path / "toy", CPU)
    trainer.initialise()
    trainer.train_step(trainer.batches.batch(0))
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 7 * 4 * 8)
    trainer.save()
    other = Trainer(job, toy_graph, tmp_path / "toy", CPU)
    other.resume(verify(newest_checkpoint(tmp_path / "toy")))
    for one, two in zip(trainer.table.all_rows().blocks, other.table.all_rows().blocks, strict=True):
        assert torch.equal(one, two)
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 1 << 20)
    large = {f"block{i}": _sharded(torch.rand(250_000, 40)) for i in range(4)}
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mib("VmRSS")
    save(tmp_path / "large", {"entities": large}, {"step": 1})
    assert _status_mib("VmHWM") - before < 20
    back = {name: torch.empty(250_000, 40) for name in large}
    load(verify(newest_checkpoint(tmp_path / "large")), {"entities": back}, collective=False)
    for name, tensor in large.items():
        assert torch.equal(back[name], tensor.local_shards()[0].tensor)


@pytest.mark.usefixtures("group")
def test_rows_are_read_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tables in one piece, and in pieces whose last is shorter; against what DCP loads; a window at a time."""
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 4 * 12 * 30)
    monkeypatch.setattr(pieces, "WINDOW_BYTES", 4 * 12 * 7)
    draw = torch.Generator().manual_seed(0)
    plain = {"one": torch.randn(100, 12, generator=draw), "two": torch.randn(100, 5, generator=draw)}
    state = {"entities": {"one": _sharded(plain["one"]), "two": plain["two"]}, "steps": 3, "other": torch.ones(7)}
    stored = StoredRows(save(tmp_path, state, {"step": 1}) / "state", {"entities.one": 12, "entities.two": 5}, 100)
    assert [len(found) for found in stored._pieces.values()] == [4, 1]
    for name, table in plain.items():
        for start, stop in ((0, 100), (29, 31), (30, 60), (99, 100), (50, 50)):
            assert np.array_equal(stored.read(f"entities.{name}", start, stop), table[start:stop].numpy())
        for ids in ([], [0], [99], [0, 6, 7, 29, 30, 98], list(range(100))):
            assert np.array_equal(stored.pick(f"entities.{name}", np.array(ids, np.int64)), table[ids].numpy())
    threads = [threading.Thread(target=stored.read, args=("entities.one", 0, 100)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.usefixtures("group")
def test_rows_that_are_not_what_they_should_be_are_refused(tmp_path: Path) -> None:
    directory = save(tmp_path, {"entities": {"one": torch.rand(10, 4)}}, {"step": 1}) / "state"
    for widths, rows in (({"entities.one": 5}, 10), ({"entities.one": 4}, 11), ({"entities.two": 4}, 10)):
        with pytest.raises(CheckpointError, match="cannot be read by rows"):
            StoredRows(directory, widths, rows)
    save(tmp_path, {"entities": {"one": torch.rand(10, 4).double()}}, {"step": 2})
    with pytest.raises(CheckpointError, match="should be float32"):
        StoredRows(newest_checkpoint(tmp_path) / "state", {"entities.one": 4}, 10)
    stored = StoredRows(directory, {"entities.one": 4}, 10)
    (path,) = directory.glob("*.distcp")
    content = path.read_bytes()
    path.write_bytes(content[:400])
    with pytest.raises(CheckpointError, match=f"{path.name} "):
        stored.read("entities.one", 0, 10)
    with pytest.raises(CheckpointError, match=f"{path.name} "):
        stored.pick("entities.one", np.arange(10))
    path.unlink()
    with pytest.raises(CheckpointError, match="may have retired it"):
        stored.read("entities.one", 0, 10)


def _sharded(tensor: torch.Tensor) -> ShardedTensor:
    piece = ShardMetadata([0, 0], list(tensor.shape), placement="rank:0/cpu")
    return ShardedTensor._init_from_local_shards([Shard(tensor, piece)], *tensor.shape)


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


@pytest.mark.usefixtures("group")
def test_saving_the_same_step_twice_keeps_the_first(toy_graph: Graph, tmp_path: Path) -> None:
    trainer = trained(toy_job(), toy_graph, tmp_path, (1,))
    first = verify(newest_checkpoint(tmp_path)).manifest.files
    trainer.save()
    assert verify(newest_checkpoint(tmp_path)).manifest.files == first
