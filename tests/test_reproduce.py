"""The paper's tables: cells are trained, cropped, kept as files, and put beside the paper."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from toy import write_toy_graph

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The toy graph under the name of a data set of the paper, and a page of the paper."""
    write_toy_graph(tmp_path / "toy")
    (tmp_path / "WN18RR").mkdir()
    for split in ("train", "valid", "test"):
        with pa.output_stream(str(tmp_path / "WN18RR" / f"{split}.tsv.zst")) as stream:
            stream.write((tmp_path / "toy" / f"{split}.tsv").read_bytes())
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "link_prediction.csv").write_text(
        "dataset,model,method,dim,metric,value\nWN18RR,TransE,DT,640,MRR,0.237\nWN18RR,TransE,DT,640,Hit@10,0.537\n"
    )
    return tmp_path


def reproduce(place: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable, str(ROOT / "tools" / "reproduce.py"), "table3", "--datasets", "WN18RR", "--scorers",
            "TransE", "--methods", "DT", "Ext-V", "PCA", "--dims", "640", "--data-dir", str(place), "--runs-dir",
            str(place / "runs"), "--out", str(place / "out"), "--paper-dir", str(place / "paper"), *options,
        ],
        env=dict(os.environ), capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_table_grows_cell_by_cell(place: Path) -> None:
    out = place / "out"
    done = reproduce(place, "--budget", "0.04", "--trial-minutes", "0.02")
    assert done.returncode == 0, done.stderr
    cells = {path.stem: json.loads(path.read_text()) for path in (out / "cells").glob("*.json")}
    assert sorted(cells) == ["wn18rr_transe_dt_640", "wn18rr_transe_ext-v", "wn18rr_transe_pca"]
    direct = cells["wn18rr_transe_dt_640"]
    assert [len(direct["trials"]), direct["budget_minutes"]] == [4, 0.04]
    assert "optimizer:" in direct["job"]
    assert direct["validations"]
    # all columns in whatever order are the model itself, and axes are only turned where the distance is L1
    whole = {record["dim"]: record["mrr"] for record in cells["wn18rr_transe_ext-v"]["records"]}
    assert whole[640] == pytest.approx(direct["records"][0]["mrr"], abs=1e-3)
    assert len(whole) == 64
    with (out / "table3.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["method"], r["dim"]) for r in rows] == [("DT", "640"), ("Ext-V", "640"), ("PCA", "640")]
    assert [r["paper_mrr"] for r in rows] == ["0.237", "", ""]
    assert f"| {direct['records'][0]['mrr']:.3f} | 0.237 |" in (out / "table3.md").read_text()
    assert (out / "table3.png").read_bytes()[:4] == b"\x89PNG"
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert reproduce(place, "--methods", "DT", "MED", "--only-report").returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == before
    assert "Not trained yet: wn18rr_transe_med." in (out / "table3.md").read_text()
