"""Choosing a tier: the choice is the plainest one, and its bytes are those of the files that an export writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from told_run import DIMS, MRR, ToldRun, write_told_run

from medscale import tiers
from medscale.cli import main as medscale
from medscale.errors import CapacityError, ConfigError, GraphError, MedscaleError, UnsupportedError
from medscale.graph.reader import open_graph
from medscale.runtime.precision import PRECISIONS
from medscale.tiers import Point, choose, in_bytes, parse_budget, parse_keep, text_plot

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> ToldRun:
    return write_told_run(tmp_path_factory.mktemp("told"))


@pytest.fixture(scope="module")
def points(told: ToldRun) -> list[Point]:
    return tiers.curve_of(told.job, told.directory, told.graph)


def core_bytes(directory: Path) -> int:
    """The bytes of all tensors in a tier's safetensors files, without their headers."""
    total = 0
    for path in directory.glob("*.safetensors"):
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        total += path.stat().st_size - header
    return total


@pytest.mark.parametrize("scorer", ["complex", "rotate", "pairre", "distmult"])
def test_bytes_are_those_of_exported_tiers(scorer: str, tmp_path: Path) -> None:
    run = write_told_run(tmp_path, scorer)
    by_units = {point.units: point for point in tiers.curve_of(run.job, run.directory, run.graph)}
    for name, units in run.job.model.tiers.items():
        # Two tensors of offsets have one number more than there are names.
        assert core_bytes(run.directory / "export" / name) - 16 == by_units[units].bytes["float32"]


def test_bytes_by_precision(points: list[Point]) -> None:
    for point in points:
        columns = 2 * point.units
        cuts = 1 if point.units == 2 else 2  # of the chain phone=2, then this one
        assert point.columns == columns
        norms = 4 * (cuts - 1)  # ComplEx scores are products
        assert point.bytes_per_entity == {
            "float32": 4 * columns + norms, "float16": 2 * columns + norms, "int8": columns + 4 * cuts + norms,
            "int4": columns // 2 + 4 * cuts + norms,
        }  # fmt: skip
        saved = point.bytes["float32"] - point.bytes["int8"]
        assert saved == 60 * (4 * columns - columns - 4 * cuts)


@pytest.mark.parametrize(("unit_columns", "most"), [(1, 16), (2, 28)])
def test_ten_units_in_int8_are_small(unit_columns: int, most: int) -> None:
    assert tiers.bytes_per_entity({10}, 10, unit_columns, "int8", norms=True) <= most


@pytest.mark.parametrize("keep", [0.01, 0.5, 2 / 3, 0.9, 0.96, 1.0])
def test_keep_is_the_smallest_that_keeps_enough(keep: float, points: list[Point]) -> None:
    enough = [dim for dim in DIMS if MRR[dim] / MRR[16] >= keep]
    chosen = choose(points, keep=keep)
    assert chosen is not None
    assert chosen.units == min(enough)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_budget_is_the_best_that_fits(precision: str, points: list[Point]) -> None:
    for budget in range(min(p.bytes[precision] for p in points), points[-1].bytes["float32"] + 2000, 500):
        fitting = [p for p in points if p.bytes[precision] <= budget]
        best = max(p.mrr for p in fitting)
        chosen = choose(points, budget=budget, precision=precision)  # type: ignore[arg-type]
        assert chosen is not None
        assert chosen.units == min(p.units for p in fitting if p.mrr == best)
    # Here 8 units are better than 16: more bytes are not always more quality.
    assert choose(points, budget=10**9) is points[2]


def test_nothing_fits(points: list[Point]) -> None:
    smallest = points[0].bytes
    with pytest.raises(
        CapacityError, match=r"no tier fits 10 B: the smallest sub-model, 2 units, takes .* at float32$"
    ):
        choose(points, budget=10)
    with pytest.raises(CapacityError, match=r"at float32; it takes .* at float16: --precision float16"):
        choose(points, budget=smallest["float32"] - 1)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("20MB", 20_000_000), ("20 mb", 20_000_000), ("512KiB", 524_288), ("1.5G", 1_500_000_000), ("77", 77), ("8b", 8)],
)
def test_budgets_that_are_understood(text: str, wanted: int) -> None:
    assert parse_budget(text) == wanted


@pytest.mark.parametrize("text", ["", "MB", "-5MB", "20 apples", "1e9", "20TB"])
def test_budgets_that_are_not(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--budget: .* is not a number of bytes"):
        parse_budget(text)


def test_shares() -> None:
    assert [parse_keep(text) for text in ("95%", "0.95", "100%", "1", "0.5 %")] == [0.95, 0.95, 1.0, 1.0, 0.005]
    for text in ("120%", "95", "1.01"):
        with pytest.raises(ConfigError, match=r"over 100% of the full model's MRR"):
            parse_keep(text)
    for text in ("0", "0%", "most", "-5%"):
        with pytest.raises(ConfigError, match="is not a share"):
            parse_keep(text)


def test_bytes_in_words() -> None:
    numbers = (0, 999, 1000, 12_345, 999_499, 999_600, 20_000_000, 7 * 10**9, 3 * 10**12)
    words = ["0 B", "999 B", "1.00 kB", "12.3 kB", "999 kB", "1.00 MB", "20.0 MB", "7.00 GB", "3,000 GB"]
    assert [in_bytes(number) for number in numbers] == words


def test_text_plot(points: list[Point]) -> None:
    lines = text_plot(points, points[1], width=31, height=10).splitlines()
    body = [line[10:] for line in lines[1:11]]
    assert lines[1].startswith("   0.310 |")
    assert lines[10].startswith("   0.200 |")
    places = {(x, y): mark for y, line in enumerate(body) for x, mark in enumerate(line) if mark in "o#"}
    # Units double from point to point: a third of the width each. MRR .20 .29 .31 .30, ten lines of .0122.
    assert places == {(0, 9): "o", (10, 2): "#", (20, 0): "o", (30, 1): "o"}
    ticks = lines[12][10:]
    assert [ticks.index(label) for label in ("2", "4", "8")] == [0, 10, 20]
    assert ticks.rstrip().endswith("16")


def test_one_sub_model_is_drawn(points: list[Point]) -> None:
    assert text_plot(points[:1], points[0]).count("#") == 1


def test_command(told: ToldRun, capsys: pytest.CaptureFixture[str]) -> None:
    (told.directory / "tiers.png").unlink(missing_ok=True)
    assert medscale(["tiers", str(told.job_path), "--keep", "95%", *told.options()]) == 0
    shown = capsys.readouterr().out
    (marked,) = (line for line in shown.splitlines() if line.strip().startswith(">"))
    assert marked.split()[1:3] == ["4", "8"]
    assert "in a job, under model:   tiers: {phone: 2, units4: 4, server: 16}" in shown
    command = f"medscale export {told.job_path} --tiers phone=2,units4=4,server=16 --precision float32 --formats none"
    assert f"{command} --runs-dir {told.place}" in shown
    assert (told.directory / "tiers.png").read_bytes().startswith(PNG)
    by_job = shown
    assert tiers.main([str(told.directory), "--keep", "0.95", *told.options()]) == 0
    assert capsys.readouterr().out.splitlines()[:12] == by_job.splitlines()[:12]
    assert tiers.main([str(told.directory), "--budget", "1GB", *told.options()]) == 0
    assert "tiers: {phone: 2, units8: 8, server: 16}" in capsys.readouterr().out
    assert tiers.main([str(told.directory), "--keep", "1%", *told.options()]) == 0
    assert "the job's tier phone has it already" in capsys.readouterr().out


def test_the_printed_command_is_one_that_export_takes(told: ToldRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiers.main([str(told.job_path), "--keep", "95%", *told.options()]) == 0
    command = capsys.readouterr().out.split("cut it from this run:")[1].split()
    # There is no checkpoint here: it is understood, and ends where that is looked for.
    assert medscale(command[1:]) == 4
    assert "holds no committed checkpoint" in capsys.readouterr().err


def test_json_and_plot(told: ToldRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "curve.png"
    command = [str(told.job_path), "--budget=1GB", "--precision=int8", "--json", f"--plot={figure}", *told.options()]
    assert tiers.main(command) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["units"] for record in records if record["chosen"]] == [8]
    assert [record["mrr"] for record in records] == list(MRR.values())
    assert set(records[0]) == {
        "units", "columns", "mrr", "hits@10", "share", "bytes_per_entity", "bytes", "precision", "chosen",
    }  # fmt: skip
    first = figure.read_bytes()
    assert first.startswith(PNG)
    assert tiers.main(command) == 0
    assert figure.read_bytes() == first


def test_without_a_question_nothing_is_chosen(told: ToldRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiers.main([str(told.job_path), *told.options()]) == 0
    shown = capsys.readouterr().out
    assert "chosen" not in shown
    assert "#" not in shown


def test_what_is_wrong_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = write_told_run(tmp_path)
    assert tiers.main([str(tmp_path), *told.options()]) == ConfigError.exit_code
    assert "holds no job.yaml" in capsys.readouterr().err
    assert tiers.main([str(told.directory), f"--graphs-dir={tmp_path}"]) == GraphError.exit_code
    assert tiers.main([str(told.directory), "--keep=101%", *told.options()]) == ConfigError.exit_code
    assert tiers.main([str(told.directory), "--budget=9B", *told.options()]) == CapacityError.exit_code
    summary = json.loads((told.directory / "evaluation_summary.json").read_text())
    summary["parameters_million"]["16"] += 1
    (told.directory / "evaluation_summary.json").write_text(json.dumps(summary))
    with pytest.raises(MedscaleError, match="on another graph than"):
        tiers.curve_of(told.job, told.directory, open_graph(told.graph.directory))
    (told.directory / "evaluation.json").unlink()
    capsys.readouterr()
    assert tiers.main([str(told.directory), f"--graphs-dir={tmp_path}"]) == MedscaleError.exit_code
    assert "run medscale evaluate first" in capsys.readouterr().err


WITHOUT = """
import sys
sys.modules["matplotlib"] = sys.modules["sklearn"] = None
from medscale.cli import main
job, *options = sys.argv[1:]
commands = ["report", job], ["tiers", job], ["tiers", job, "--plot=x"]
print("codes", *(main([*command, *options]) for command in commands))
"""


def test_without_matplotlib_the_tables_are_there(tmp_path: Path) -> None:
    told = write_told_run(tmp_path)
    command = [sys.executable, "-c", WITHOUT, str(told.job_path), *told.options()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert f"codes 0 0 {UnsupportedError.exit_code}" in done.stdout, done.stderr
    assert "phone" in done.stdout
    assert "#" not in done.stdout
    for what in ("no page", "no figure", "--plot: no figure"):
        assert f"{what} without matplotlib and scikit-learn: pip install 'medscale[report]'" in done.stderr
    assert not {path.name for path in told.directory.iterdir()} & {"report.html", "report", "tiers.png"}
