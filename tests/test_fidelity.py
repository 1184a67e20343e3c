"""What precisions cost: ranked by the fast path as a plain loop ranks, and bytes as the format promises."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from coded_tiers import PRECISIONS, coded_rows, coded_tier
from small_tables import RELATION_UNIT_COLUMNS, SCORERS, UNIT_COLUMNS, model_facts, small_tables
from test_export import Run

from medscale import fidelity
from medscale.checkpoint import open_tables
from medscale.config import ModelSection
from medscale.evaluate import rank_tables, tables_and_triples
from medscale.fidelity import KEPT, REPORT, bytes_per_entity, main, precisions_table, write_report
from medscale.model.layout import Layout, layout_of
from medscale.ranking import records_of, sample_triples
from medscale.runtime.scoring import compare, exported_scorer, unit_weights

TIERS = {"phone": 3, "server": 12}


@pytest.fixture
def run(tmp_path: Path, data_dir: Path) -> Run:
    run = Run(tmp_path, data_dir)
    run.job = dataclasses.replace(run.job, evaluate=dataclasses.replace(run.job.evaluate, max_triples=60))
    run.commit(7)
    return run


def layout(scorer: str, norm: str = "l1") -> Layout:
    return layout_of(ModelSection(scorer=scorer, norm=norm, dims=(3, 5, 10), tiers={"all": 10}), 100, 4)  # type: ignore[arg-type]


def plain_mrr(run: Run, precision: str, dim: int, triples: np.ndarray) -> float:
    """Return the filtered MRR of `dim` units of decoded rows, one query at a time in float64 (RotatE)."""
    tables = open_tables(run.root / "runs" / "little" / "checkpoints" / "step-000000007")
    entities = tables.entity_columns(0, run.graph.num_entities, 24)
    rows = coded_rows(entities, precision, (3, 12), 2)[:, : 2 * dim].astype(np.float64)  # type: ignore[arg-type]
    phases = tables.relations(dim).astype(np.float64)
    relations = np.stack([np.cos(phases), np.sin(phases)], -1).reshape(len(phases), -1)
    known = {tuple(t) for split in ("train", "valid", "test") for t in run.graph.triples(split).tolist()}
    scorer = exported_scorer("rotate", "l1")
    reciprocals = []
    for h, r, t in triples.tolist():
        for side, asked, target in (("tail", h, t), ("head", t, h)):
            query = scorer.query(rows[asked], relations[r], side)  # type: ignore[arg-type]
            scores = compare("modulus", query, rows, unit_weights([dim], []))
            other = [
                e for e in range(len(rows))
                if e != target and ((h, r, e) if side == "tail" else (e, r, t)) not in known
            ]  # fmt: skip
            better, equal = (scores[other] > scores[target]).sum(), (scores[other] == scores[target]).sum()
            reciprocals.append(1 / (1 + better + equal / 2))
    return float(np.mean(reciprocals))


def test_every_tier_is_ranked_as_it_decodes(run: Run) -> None:
    report = write_report(run.job, run.graph, run.root / "runs" / "little", TIERS)
    assert json.loads((run.root / "runs" / "little" / REPORT).read_text()) == report
    assert (report["step"], report["split"], report["triples_ranked"], report["formats"]) == (7, "test", 60, [])
    records = report["precisions"]
    assert [(r["tier"], r["units"], r["precision"]) for r in records] == [
        (tier, units, precision) for tier, units in TIERS.items() for precision in PRECISIONS
    ]
    triples = sample_triples(run.graph.triples("test"), 60, run.job.seed)
    for record in records:
        assert record["mrr"] == pytest.approx(plain_mrr(run, record["precision"], record["units"], triples), abs=1e-4)
        full = next(r for r in records if (r["tier"], r["precision"]) == (record["tier"], "float32"))
        assert record["share_of_float32"] == pytest.approx(record["mrr"] / full["mrr"])
        assert record["marked"] == (record["mrr"] < KEPT * full["mrr"])
    assert len({record["mrr"] for record in records}) > 4, "precisions change nothing: they were not applied"
    assert precisions_table(report).row_count == 8


def test_float32_is_what_an_evaluation_finds(run: Run) -> None:
    run_directory = run.root / "runs" / "little"
    tables, triples = tables_and_triples(run.job, run.graph, run_directory, split="test", step=7)
    evaluated = records_of(rank_tables(run.job, run.graph, tables, triples, "test"), "test")
    report = write_report(run.job, run.graph, run_directory, TIERS)
    field = {r["dim"]: r["mrr"] for r in evaluated if (r["protocol"], r["side"]) == ("field", "both")}
    found = {r["units"]: r["mrr"] for r in report["precisions"] if r["precision"] == "float32"}
    assert found == {dim: field[dim] for dim in TIERS.values()}


def test_numbers_beyond_float16_leave_it_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fidelity.encode

    def refusing(cut: np.ndarray, precision: str) -> object:
        return plain(cut * np.float32(1e6) if precision == "float16" else cut, precision)  # type: ignore[arg-type]

    monkeypatch.setattr(fidelity, "encode", refusing)
    report = write_report(run.job, run.graph, run.root / "runs" / "little", {"phone": 3})
    assert [r["precision"] for r in report["precisions"]] == ["float32", "int8", "int4"]


@pytest.mark.parametrize(("scorer", "norm"), SCORERS)
def test_ten_units_at_int8_take_no_more_than_promised(scorer: str, norm: str) -> None:
    size = bytes_per_entity(layout(scorer, norm), [10], "int8")
    assert size <= {1: 16, 2: 28}[UNIT_COLUMNS[scorer]]
    assert RELATION_UNIT_COLUMNS[scorer]  # relations are not counted: few, whatever the graph


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("scorer", "cuts"), [("transe", (3, 5, 12)), ("complex", (12,)), ("rotate", (5, 12))])
def test_bytes_are_those_of_the_files(tmp_path: Path, scorer: str, cuts: tuple[int, ...], precision: str) -> None:
    facts = model_facts(scorer)
    _, directory = coded_tier(tmp_path, facts, small_tables(facts, 50, 2), precision, cuts)  # type: ignore[arg-type]
    file = (directory / "entities-00000-of-00001.safetensors").read_bytes()
    header = 8 + int.from_bytes(file[:8], "little")
    assert len(file) - header == 50 * bytes_per_entity(layout(scorer), cuts, precision)  # type: ignore[arg-type]


def test_products_of_several_cuts_have_norms() -> None:
    # 2 x 10 numbers, three scales, norms of the second cut and the third
    assert bytes_per_entity(layout("complex"), [3, 5, 10], "int8") == 20 + 12 + 8
    assert bytes_per_entity(layout("rotate"), [3, 5, 10], "int8") == 20 + 12


def test_the_command_prints_both_tables(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.export() == 0
    folders = ["--runs-dir", str(run.root / "runs"), "--graphs-dir", str(run.root / "graphs")]
    assert main([str(run.job_file), *folders, "--triples", "20"]) == 0
    printed = capsys.readouterr().out
    assert "precisions" in printed
    assert "parquet" in printed
    assert main([str(run.job_file), *folders, "--step", "8"]) == 4
