"""The table of a finished run: its numbers are the evaluation's and the files', smallest tier first."""

import json
from pathlib import Path

import pytest
from small_tables import export, model_facts, small_tables

from medscale import report
from medscale.errors import ExportError, MedscaleError

DIMS = (3, 5, 12)


def records() -> list[dict[str, object]]:
    figures = {"mean_rank": 9.0, "num_queries": 20, "split": "test"}
    sides = [("field", "both"), ("field", "head"), ("field", "tail"), ("paper", "both")]
    return [
        {"dim": dim, "protocol": protocol, "side": side, **quality(dim), **figures}
        for dim in DIMS
        for protocol, side in sides
    ]


def quality(dim: int) -> dict[str, float]:
    return {"mrr": dim / 100, "hits@1": dim / 200, "hits@3": dim / 150, "hits@10": dim / 50}


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "small"
    run.mkdir(parents=True)
    facts = model_facts("complex")
    export(run / "export", facts, small_tables(facts, 50, 4), {"server": 12, "phone": 3})
    (run / "evaluation.json").write_text(json.dumps(records()))
    return run


def test_a_line_per_tier(run_directory: Path) -> None:
    lines = report.report(run_directory)
    assert [(line.tier, line.dim, line.units) for line in lines] == [("phone", 6, 3), ("server", 24, 12)]
    for line in lines:
        assert [line.mrr, line.hits_at_1, line.hits_at_3, line.hits_at_10] == list(quality(line.units).values())
        files = (run_directory / "export" / line.tier).iterdir()
        assert line.bytes == sum(path.stat().st_size for path in files)
        assert 0 < line.lookup_ms < 10_000


def test_command(run_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    job = run_directory.parent / "small.yaml"
    job.write_text(
        "name: small\ngraph: {train: [a.tsv]}\ntrain: {epochs: 1}\n"
        "model: {scorer: complex, dims: [3, 12], tiers: {phone: 3, server: 12}}\n"
    )
    assert report.main([str(job), f"--runs-dir={run_directory.parent}"]) == 0
    text = capsys.readouterr().out
    headings = ("tier", "dim", "units", "MRR", "Hits@1", "Hits@3", "Hits@10", "bytes", "ms per 1000 look-ups")
    places = [text.index(heading) for heading in headings]
    assert places == sorted(places)
    assert "both sides: filtered by train+valid+test, realistic ranks for ties, all entities" in " ".join(text.split())
    assert report.main([str(job), f"--runs-dir={run_directory.parent}", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["tier"] for line in lines] == ["phone", "server"]


def test_what_is_missing_is_named(run_directory: Path) -> None:
    (run_directory / "evaluation.json").write_text(json.dumps(records()[:4]))
    with pytest.raises(MedscaleError, match="server has dim 12, which is not evaluated"):
        report.report(run_directory)
    (run_directory / "evaluation.json").write_text("[{}]")
    with pytest.raises(MedscaleError, match=r"damaged .*run medscale evaluate again"):
        report.report(run_directory)
    (run_directory / "evaluation.json").unlink()
    with pytest.raises(MedscaleError, match="does not exist: run medscale evaluate first"):
        report.report(run_directory)


def test_run_without_export(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(records()))
    with pytest.raises(ExportError, match="holds no tiers: run medscale export first"):
        report.report(tmp_path)
