"""The paper's tables: cells are trained, cropped, kept as files, and put beside the paper."""

import csv
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from toy import write_toy_graph

from medscale.errors import CheckpointError, GraphError
from medscale.jobfile import parse_job

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The toy graph under the name of a data set of the paper, and a page of the paper."""
    write_toy_graph(tmp_path / "toy")
    (tmp_path / "WN18RR").mkdir()
    for split in ("train", "valid", "test"):
        with pa.output_stream(str(tmp_path / "WN18RR" / f"{split}.tsv.zst")) as stream:
            stream.write((tmp_path / "toy" / f"{split}.tsv").read_bytes())
    names = sorted(
        {name for row in (tmp_path / "toy" / "train.tsv").read_text().splitlines() for name in row.split()[::2]}
    )
    with pa.output_stream(str(tmp_path / "WN18RR" / "entity_category4.tsv.zst")) as stream:
        stream.write("".join(f"{name}\t{'even' if int(name[1:]) % 2 == 0 else 'odd'}\n" for name in names).encode())
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "training_time_hours.csv").write_text(
        "dataset,method,TransE,SimplE,RotatE,PairRE\nWN18RR,DT,74.0,,,\nWN18RR,MED,7.4,,,\n"
    )
    (tmp_path / "paper" / "link_prediction.csv").write_text(
        "dataset,model,method,dim,metric,value\nWN18RR,TransE,DT,640,MRR,0.237\nWN18RR,TransE,DT,640,Hit@10,0.537\n"
    )
    return tmp_path


def command(place: Path, table: str, *options: str, scorer: str = "TransE") -> list[str]:
    return [
        sys.executable, str(ROOT / "tools" / "reproduce.py"), table, "--datasets", "WN18RR", "--scorers",
        scorer, "--data-dir", str(place), "--runs-dir", str(place / "runs"), "--out", str(place / "out"),
        "--paper-dir", str(place / "paper"), "--epochs", "20", "--trial-epochs", "5", *options,
    ]  # fmt: skip


def reproduce(
    place: Path, table: str, *options: str, scorer: str = "TransE", exit_code: int = 0
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    done = subprocess.run(command(place, table, *options, scorer=scorer), capture_output=True, text=True)
    assert done.returncode == exit_code, done.stderr
    return done


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_table_grows_cell_by_cell(place: Path) -> None:
    out = place / "out"
    crops = ("--methods", "DT", "Ext-V", "PCA", "--dims", "640")
    reproduce(place, "table3", *crops)
    cells = {path.stem: json.loads(path.read_text()) for path in (out / "cells").glob("*.json")}
    assert sorted(cells) == ["wn18rr_transe_dt_640", "wn18rr_transe_ext-v", "wn18rr_transe_pca"]
    direct = cells["wn18rr_transe_dt_640"]
    assert direct["settings"] == {"budget": 20, "epochs": 20, "trial_epochs": 5}
    # the grid is left where a larger learning rate is no better
    mrr_of_trials = [trial["mrr"] for trial in direct["trials"]]
    assert all(max(mrr_of_trials[:n]) == mrr_of_trials[n - 1] for n in range(4, len(mrr_of_trials)))
    assert max(mrr_of_trials) > mrr_of_trials[-1] or len(mrr_of_trials) == 6
    assert [v["epoch"] for v in direct["validations"]] == [5, 10, 15, 20]
    assert "optimizer:" in direct["job"]
    assert direct["validations"]
    # all columns in whatever order are the model itself, and axes are only turned where the distance is L1
    whole = {record["dim"]: record["mrr"] for record in cells["wn18rr_transe_ext-v"]["records"]}
    assert whole[640] == pytest.approx(direct["records"][0]["mrr"], abs=1e-3)
    assert len(whole) == 64
    rows = rows_of(out / "table3.csv")
    of_dims = [("DT", "640"), *((method, dim) for method in ("Ext-V", "PCA") for dim in ("10", "40", "160", "640"))]
    assert [(r["method"], r["dim"]) for r in rows] == of_dims
    assert [r["paper"] for r in rows if r["dim"] == "640"] == ["0.237", "", ""]
    assert f"| {direct['records'][0]['mrr']:.3f} | 0.237 |" in (out / "table3.md").read_text()
    assert (out / "table3.png").read_bytes()[:4] == b"\x89PNG"
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    reproduce(place, "table3", "--methods", "DT", "MED", "--dims", "640", "--only-report")
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == before
    (missing,) = [line for line in (out / "table3.md").read_text().splitlines() if line.startswith("Not trained yet: ")]
    names = missing.removeprefix("Not trained yet: ").removesuffix(".").split(", ")
    assert "wn18rr_transe_med" in names
    assert "wn18rr_transe_dt_640" not in names

    # what was measured is there, but the model is not: as in a clone
    shutil.rmtree(place / "runs")
    (place / "runs" / "wn18rr_transe_dt_640" / "checkpoints").mkdir(parents=True)  # of a training that was killed
    again = reproduce(place, "table3", "--methods", "Ext", "--dims", "640")
    assert "wn18rr_transe_dt_640: trained anew" in again.stderr
    crop = json.loads((out / "cells" / "wn18rr_transe_ext.json").read_text())
    assert {r["dim"]: r["mrr"] for r in crop["records"]}[640] == pytest.approx(direct["records"][0]["mrr"], abs=1e-3)

    # a model that is another one than that which was cropped
    path = out / "cells" / "wn18rr_transe_dt_640.json"
    changed = direct | {"records": [direct["records"][0] | {"mrr": 0.5}]}
    path.write_text(json.dumps(changed))
    other = reproduce(place, "table3", "--methods", "Ext", exit_code=CheckpointError.exit_code)
    assert "wn18rr_transe_ext.json was made otherwise: of another wn18rr_transe_dt_640; " in other.stderr
    path.write_text(json.dumps(direct))

    other = reproduce(
        place, "table3", "--methods", "DT", "--dims", "640", "--epochs", "3", exit_code=CheckpointError.exit_code
    )
    assert "wn18rr_transe_dt_640.json was made otherwise: --budget 20 --epochs 20 --trial-epochs 5 -> " in other.stderr


@pytest.mark.slow
def test_what_is_interrupted_goes_on(place: Path) -> None:
    options = ("--methods", "DT", "--dims", "10", "--epochs", "400")
    run_directory = place / "runs" / "wn18rr_transe_dt_10"
    first = subprocess.Popen(command(place, "table3", *options), stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    for line in first.stderr:
        if run_directory.exists() and " epoch " in line:  # its trials come before
            first.terminate()
            break
    first.communicate()
    assert first.returncode == 128 + signal.SIGTERM
    spent = json.loads((run_directory / "cut_off.json").read_text())["seconds"]
    assert not list((place / "out" / "cells").iterdir())
    again = reproduce(place, "table3", *options)
    assert "trial" not in again.stderr.replace("--trial", "")
    cell = json.loads((place / "out" / "cells" / "wn18rr_transe_dt_10.json").read_text())
    assert [v["epoch"] for v in cell["validations"]] == list(range(5, 401, 5))
    assert cell["seconds"] > spent > 0
    assert not (run_directory / "cut_off.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_students_times_and_retention(place: Path) -> None:
    out = place / "out"
    reproduce(place, "table3", "--methods", "MED", "DT", "Ext", "BKD", "TA", "DualDE", "IterDE")
    cells = {path.stem: json.loads(path.read_text()) for path in (out / "cells").glob("*.json")}
    students = {name: cells[f"wn18rr_transe_{name}_10"] for name in ("bkd", "ta", "dualde", "iterde")}
    for student in students.values():
        assert [record["dim"] for record in student["records"]] == [10], "the teacher beside it is not a result"
        assert list(student["answered"]) == ["10"]
    assert {name: student["teacher"] for name, student in students.items()} == {
        "bkd": "wn18rr_transe_dt_640", "dualde": "wn18rr_transe_dt_640", "iterde": "wn18rr_transe_iterde_10_over_20",
        "ta": students["ta"]["teacher"],
    }  # fmt: skip
    assert students["ta"]["teacher"] in ("wn18rr_transe_bkd_40", "wn18rr_transe_bkd_160")
    largest = {"wn18rr_transe_dt_640"}
    assert {name: set(student["made_of"]) for name, student in students.items()} == {
        "bkd": largest, "dualde": largest, "iterde": largest, "ta": largest | {students["ta"]["teacher"]},
    }  # fmt: skip
    assert students["iterde"]["earlier_seconds"] > 0
    assert students["bkd"]["earlier_seconds"] == 0
    shown = {(row["method"], row["dim"]) for row in rows_of(out / "table3.csv")}
    assert {("BKD", "10"), ("TA", "10"), ("DualDE", "10"), ("IterDE", "10"), ("MED", "640"), ("DT", "40")} <= shown
    assert (out / "table3_curves.png").exists()
    gaps = rows_of(out / "table3_gaps.csv")
    assert [gap["dim"] for gap in gaps] == ["10", "40", "160", "640"]
    whole = {v["step"]: v["mrr"] for v in cells["wn18rr_transe_med"]["validations"]}
    for gap in gaps:
        dim = gap["dim"]
        assert float(gap["difference"]) == pytest.approx(float(gap["MED"]) - float(gap["DT"]), abs=2e-4)
        assert float(gap["by the shared rate"]) <= 0
        assert float(gap["by the shared step"]) <= 0
        parts = ("in trials", "by the shared rate", "later", "by the shared step")
        direct = max(v["mrr"][dim] for v in cells[f"wn18rr_transe_dt_{dim}"]["validations"])
        apart = whole[cells["wn18rr_transe_med"]["step"]][dim] - direct
        assert sum(float(gap[part]) for part in parts) == pytest.approx(apart, abs=1e-3)
        assert apart + float(gap["left over"]) == pytest.approx(float(gap["difference"]), abs=1e-3)

    # trials keep the dims that tables show by default, and others have no part in the choice
    reproduce(place, "table3", "--methods", "DT", "--dims", "20")
    of_trials = {gap["dim"]: gap["in trials"] for gap in rows_of(out / "table3_gaps.csv")}
    assert list(of_trials) == ["10", "20", "40", "160", "640"], "a report is of all that is there"
    assert [dim for dim, part in of_trials.items() if part == ""] == ["20"]

    reproduce(place, "table7", "--only-report")
    times = {row["method"]: row for row in rows_of(out / "table7.csv")}
    assert set(times) == {"DT", "Ext", "BKD", "TA", "DualDE", "IterDE", "MED"}
    assert times["DT"]["measured"] == "10, 20, 40, 160, 640; others interpolated"
    assert times["DualDE"]["measured"] == "10; others taken alike"
    assistant = students["ta"]["teacher"].rpartition("_")[2]
    assert times["BKD"]["measured"] == f"10, {assistant}; others interpolated"
    # of 63 students alike, and once of what all have
    once = cells["wn18rr_transe_dt_640"]["seconds"] + students["iterde"]["earlier_seconds"]
    assert float(times["IterDE"]["minutes"]) == pytest.approx((once + 63 * students["iterde"]["seconds"]) / 60)
    assert (float(times["MED"]["times MED, per epoch"]), float(times["DT"]["times MED, paper"])) == (1, 10)
    # between the measured sizes and 64 there are interpolated ones
    cells |= {path.stem: json.loads(path.read_text()) for path in (out / "cells").glob("*_dt_20.json")}
    direct = [cells[f"wn18rr_transe_dt_{dim}"]["seconds"] for dim in (10, 20, 40, 160, 640)]
    assert 64 * min(direct) / 60 <= float(times["DT"]["minutes"]) + 1e-3
    assert float(times["DT"]["minutes"]) - 1e-3 <= 64 * max(direct) / 60
    assert [row["dim"] for row in rows_of(out / "table7_reached.csv")] == ["10", "40", "160", "640"]

    reproduce(place, "figure5", "--only-report")
    retained = {row["method"]: float(row["ARR"]) for row in rows_of(out / "figure5.csv")}
    assert set(retained) == {"MED", "DT", "Ext"}
    assert all(0 < ratio <= 1 for ratio in retained.values())
    reproduce(place, "figure6", "--only-report")
    assert sum(row["method"] == "MED" for row in rows_of(out / "figure6.csv")) == 64

    reproduce(place, "figure7", "--methods", "MED", "Ext-V", "--scorers", "TransE")
    silhouettes = {(row["method"], row["dim"]): float(row["silhouette"]) for row in rows_of(out / "figure7.csv")}
    assert set(silhouettes) == {(method, dim) for method in ("MED", "Ext-V") for dim in ("10", "100", "600")}
    assert all(-1 <= value <= 1 for value in silhouettes.values())
    assert (out / "figure7.png").read_bytes()[:4] == b"\x89PNG"

    other = ("--epochs", "5", "--out", str(place / "other"))
    methods = ("MED", "RotatE-small", "NodePiece", "EARL")
    reproduce(place, "table4", "--methods", *methods, *other, scorer="RotatE")
    table = {row["method"]: row for row in rows_of(place / "other" / "table4.csv")}
    assert {method: row["dim"] for method, row in table.items()} == {
        "MED": "40", "RotatE-small": "50", "NodePiece": "100", "EARL": "200",
    }  # fmt: skip
    assert float(table["RotatE-small"]["parameters, million"]) == (2 * 90 + 4) * 50 / 1e6


@pytest.mark.slow
def test_the_recipe_beside_its_sub_models_alone(place: Path) -> None:
    out = place / "out"
    reproduce(place, "recipe", "--dims", "10", "200", "--epochs", "6", "--trial-epochs", "2", scorer="ComplEx")
    cells = {path.stem: json.loads(path.read_text()) for path in (out / "cells").glob("*.json")}
    assert sorted(cells) == ["wn18rr_complex_dt_10", "wn18rr_complex_dt_200", "wn18rr_complex_med"]
    tried = ["0.3 [0.03]", "0.3 [0.05]", "0.3 [0.07]", "0.3 [0.1]", "0.3 [0.2]", "1 [0.05]", "1 [0.1]"]
    assert all([trial["value"] for trial in cell["trials"]] == tried for cell in cells.values())
    best = {
        dim: max(cells["wn18rr_complex_med"]["trials"], key=lambda trial, dim=dim: trial["mrr_by_dim"][dim])["value"]
        for dim in ("10", "40", "200")
    }
    job = parse_job(cells["wn18rr_complex_med"]["job"], "wn18rr_complex_med")
    rates, strengths = zip(*(value.split() for value in best.values()), strict=True)
    factors = job.optimizer.tier_factors
    assert [factor * job.optimizer.lr for factor in factors] == pytest.approx([float(r) for r in rates], rel=1e-3)
    assert job.loss.regularizer_weights == tuple(float(strength.strip("[]")) for strength in strengths)
    assert [record["dim"] for record in cells["wn18rr_complex_med"]["records"]] == [10, 40, 200]
    rows = rows_of(out / "recipe.csv")
    of_med = [("MED", dim) for dim in ("10", "40", "200")]
    assert [(r["method"], r["dim"]) for r in rows] == [*of_med, ("DT", "10"), ("DT", "200")]
    assert "Not trained yet: wn18rr_complex_dt_40, fb15k-237_complex_med" in (out / "recipe.md").read_text()


def test_students_are_judged_alone_and_croppable_runs_by_the_dims_of_tables() -> None:
    """Also where a student's dim and its teacher's, which stands beside it, look like those of a table."""
    code = (
        "from medscale.search import Trial; from reproduction.cells import mean_mrr;"
        "trial = lambda **mrr: Trial({}, None, None, {d[1:]: v for d, v in mrr.items()}, 5, 1.0, 'finished');"
        "print(mean_mrr(trial(d10=0.1, d50=0.3), 10), mean_mrr(trial(d100=0.1, d740=0.3), 100),"
        "mean_mrr(trial(d10=0.1, d20=0.9, d40=0.3)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tools", capture_output=True, text=True)
    assert done.stdout.split() == ["0.1", "0.1", "0.2"], done.stderr


def test_committed_cells_are_what_their_tables_ask_for(tmp_path: Path) -> None:
    """Else the README's command would refuse them."""
    code = (
        "import json, sys, reproduce; from pathlib import Path; from reproduction.cells import Cell\n"
        "anew = reproduce.Reproduction(reproduce.OUT, Path(sys.argv[1]), Path(sys.argv[1]), 20, None, None)\n"
        "for path in anew.cells.glob('*.json'):\n"
        "    found = json.loads(path.read_text())\n"
        "    cell = Cell(*(found[key] for key in ('dataset', 'scorer', 'method', 'dim')))\n"
        "    assert cell.name == path.stem and anew.fill(cell) == found, path\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT / "tools", check=True)
    assert not list(tmp_path.iterdir()), "nothing is trained"


def test_figure7_without_categories_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "tools/reproduce.py", "figure7", "--datasets", "WN18RR", "--data-dir", str(tmp_path),
            "--out", str(tmp_path / "out"), "--runs-dir", str(tmp_path / "runs"),
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == GraphError.exit_code
    assert "entity_category4.tsv.zst is not there: figure7 needs the categories of entities" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_wrong_options_are_refused_before_anything_is_trained() -> None:
    wrong = {
        "table3 --budget -1": "-1 is no number of minutes above 0",
        "table3 --dims 15": "table3 has no 15; it has 10 20 ... 640",
        "table3 --budget soon": "soon is no number of minutes above 0",
        "table3 --student-dims 630": "TA has no dim between 630 and the teacher's 640",
        "table3 --only-report --paper-dir nowhere": "nowhere is not there, and",
        "table4 --scorers TransE": "table4 is RotatE's alone",
        "figure7 --student-dims 10": "figure7 draws models of 10 100 600 units",
    }
    # of one process, since it takes seconds to start
    code = (
        "import contextlib, sys, reproduce\n"
        f"for options in {list(wrong)}:\n"
        "    sys.argv[1:] = options.split()\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        reproduce.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tools", capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == len(wrong), done.stderr
    for error, message in zip(errors, wrong.values(), strict=True):
        assert message in error
