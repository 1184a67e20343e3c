"""Benches run, and print what those who read their results rely on."""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHES = Path(__file__).resolve().parents[1] / "tools" / "bench"
IDENTITY = {"scorer", "system", "sub_models", "threads", "batch", "negatives", "units"}
FIGURES = {"ms_per_step", "triples_per_s", "gb_per_s", "seconds", "peak_mib", "mrr"}


def printed(name: str, *options: str, threads: int = 1) -> list[dict[str, Any]]:
    """Run a bench and return its records."""
    command = [sys.executable, str(BENCHES / f"{name}.py"), "--quick", "--json", "--threads", str(threads), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert set(result) == {"environment", "results"}
    assert set(result["environment"]) == {"date", "cpu", "cores", "versions", "command"}
    assert result["environment"]["command"].startswith(f"python tools/bench/{name}.py --quick")
    assert result["results"]
    return result["results"]


def quick(name: str, *options: str) -> list[dict[str, Any]]:
    """Run a bench of training on one thread and return its records, checked for what these have in common."""
    records = printed(name, *options)
    for record in records:
        assert set(record) >= IDENTITY
        assert FIGURES & set(record), record
        assert all(record[name] >= 0 for name in FIGURES & set(record))
        assert record["threads"] == 1
    return records


WITHOUT = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torchrec", "fbgemm_gpu", "pyarrow", "ray", "yaml", "duckdb"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
script, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, script.rpartition("/")[0])
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""


def test_kernels_are_measured_where_there_is_torch_alone() -> None:
    options = ["--quick", "--json", "--scorers", "transe", "--systems", "kernel", "--sub-models", "2", "--threads", "1"]
    command = [sys.executable, "-c", WITHOUT, str(BENCHES / "prefix_scoring.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout)["results"]


def test_prefix_scoring(tmp_path: Path) -> None:
    written = tmp_path / "written.json"
    records = quick("prefix_scoring", "--scorers", "distmult", "--sub-models", "2", "--out", str(written))
    assert {(r["system"], r["sharing"]) for r in records} == {
        (system, sharing) for system in ("kernel", "torch") for sharing in ("chunk32", "fresh")
    }
    assert all(r["ms_per_step"] > 0 and r["gb_per_s"] > 0 and r["copy_gb_per_s"] > 0 for r in records)
    assert json.loads(written.read_text(encoding="utf-8"))["results"] == records


def test_tables_show_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHES))
    records = importlib.import_module("records")
    common = {"scorer": "transe", "batch": 1024}
    table, constants = records.table_of(
        [{**common, "system": "kernel", "ms_per_step": 1234.5}, {**common, "system": "torch", "error": "too old"}]
    )
    assert [column.header for column in table.columns] == ["system", "ms per step", "error"]
    assert list(table.columns[1].cells) == ["1,234", ""]
    assert constants == "scorer transe, batch 1024"


@pytest.mark.slow
def test_training_step(data_dir: Path) -> None:
    records = quick("training_step", "--data-dir", str(data_dir))
    assert {(r["sub_models"], r["sharing"]) for r in records} == {
        (number, sharing) for number in (1, 64) for sharing in ("chunk32", "fresh")
    }
    for record in records:
        assert sum(record["shares"].values()) == pytest.approx(1, abs=0.02)
        assert (record["times_one"] == 1) == (record["sub_models"] == 1)


@pytest.mark.slow
def test_softmax() -> None:
    records = quick("softmax")
    assert [(r["system"], r["sub_models"]) for r in records] == [
        ("gemm", 1), ("kernel", 1), ("kernel", 8), ("kernel", 64),
    ]  # fmt: skip
    assert all(r["ms_per_step"] > 0 for r in records)


@pytest.mark.slow
def test_ranking(data_dir: Path) -> None:
    records = quick("ranking", "--data-dir", str(data_dir), "--triples", "50")
    assert [(r["scorer"], r["system"], r["sub_models"]) for r in records] == [
        ("transe", "medscale", 1), ("transe", "medscale", 64),
        ("complex", "medscale", 1), ("complex", "medscale", 64), ("complex", "gemm", 1),
    ]  # fmt: skip
    assert all(r["seconds"] > 0 and r["triples"] == 50 for r in records)


@pytest.mark.slow
def test_memory(data_dir: Path) -> None:
    records = quick("memory", "--data-dir", str(data_dir))
    assert [r["sub_models"] for r in records] == [1, 64]
    assert all(r["peak_mib"] > r["step_mib"] for r in records)


@pytest.mark.slow
def test_prepare_scale() -> None:
    records = printed("prepare_scale", threads=2)
    assert [record["tasks"] for record in records] == [1, 2]
    for record in records:
        assert record["triples_per_s"] == pytest.approx(record["triples"] / record["seconds"], rel=0.05)
        assert 100 < record["peak_mib"] <= record["peak_rss_mib"]


@pytest.mark.slow
def test_skg_scale() -> None:
    records = quick("skg_scale")
    assert next(r["times_smallest"] for r in records) == 1
    for record in records:
        assert 0 < record["slowest_window_per_s"] <= record["triples_per_s"]
        assert record["epoch_s"] == pytest.approx(record["triples"] / record["triples_per_s"], rel=0.02)


@pytest.mark.slow
def test_skg_run() -> None:
    records = quick("skg_run")
    assert [r["stage"] for r in records] == ["prepare", "train", "evaluate", "export"]
    train = records[1]
    assert 0 < train["slowest_per_s"] <= train["triples_per_s"]
    assert train["peak_mib"] > 100


@pytest.mark.slow
def test_readers() -> None:
    records = quick("readers")
    assert [r["readers"] for r in records] == [0, 1, 2]
    assert all(len(r["reader_triples_per_s"]) == max(1, r["readers"]) for r in records)


@pytest.mark.slow
def test_scaling() -> None:
    records = quick("scaling")
    assert [(r["system"], r["workers"]) for r in records] == [("one", 1), ("strong", 2), ("weak", 2)]
    for record in records:
        assert (record["mib_per_step"] > 0) == (record["workers"] > 1) == (record["communication"] > 0)


@pytest.mark.slow
def test_precision(data_dir: Path, tmp_path: Path) -> None:
    places = {"--data-dir": data_dir, "--runs-dir": tmp_path / "runs", "--graphs-dir": tmp_path / "graphs"}
    records = printed("precision", *(str(part) for place in places.items() for part in place))
    ranked = [r for r in records if r["system"] == "precision"]
    assert {(r["tier"], r["precision"]) for r in ranked} == {
        (tier, precision) for tier in ("phone", "pc", "server") for precision in ("float32", "float16", "int8", "int4")
    }
    assert all(0.5 < r["mrr"] < 1 and r["triples"] == 200 for r in ranked)
    assert [r["format"] for r in records if r["system"] == "format"] == 3 * ["safetensors", "parquet", "onnx", "index"]
    assert all(r["recall@10"] > 0.9 for r in records if r["system"] == "format")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pykeen") is None, reason="PyKEEN is not installed: pip install pykeen")
def test_peers(data_dir: Path) -> None:
    records = quick("peers", "--data-dir", str(data_dir))
    assert [(r["system"], r["sharing"]) for r in records] == [
        ("medscale", "chunk32"), ("medscale", "fresh"), ("pykeen", "fresh"),
    ]  # fmt: skip
    for record in records:
        assert 0 < record["mrr"] <= 1
        assert set(record["mrr_by_dim"]) == ({"640"} if record["system"] == "pykeen" else {"10", "100", "640"})


@pytest.mark.slow
def test_split(tmp_path: Path) -> None:
    records = quick("split", "--rows", "3000", "--directory", str(tmp_path / "work"))
    assert [record["system"] for record in records] == ["full", "delta"]
    for record in records:
        assert record["rows"] == 3000
        assert record["mb_per_s"] > 0
    # Twice (10 + 100 + 500) columns, and names; deltas have 500 columns together.
    assert 3000 * 610 * 8 < records[0]["gb"] * 1e9 < 3000 * 610 * 8 * 1.2
    assert 3000 * 500 * 8 <= records[1]["gb"] * 1e9 < 3000 * 500 * 8 * 1.2
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.slow
def test_runtime() -> None:
    records = printed("runtime")
    own = [r for r in records if r["system"] == "medscale"]
    assert {r["what"] for r in own} >= {"top_10", "bulk", "look-ups by name", "cascade, exact", "largest tier alone"}
    assert all(0 < r["p50_ms"] <= r["p99_ms"] for r in records if r["what"] == "top_10")
    chains = [r for r in own if "recall" in r]
    assert all(0 <= r["recall"] <= 1 and r["speedup"] > 0 for r in chains)
    assert next(r for r in chains if r["what"] == "cascade, exact")["recall"] == 1
    sized = [r for r in chains if "sized" in r["what"]]
    assert len(sized) == 3
    assert all(r["recall"] > 0.7 for r in sized)
