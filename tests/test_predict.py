"""Answers in bulk: those of one top-k each, whatever shares a scan or a task, and errors that name the row."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_tables import SCORERS
from test_cascade import NUMBER, TIERS, model_of
from tier_writer import Format, write_tiers

from medscale import answers as module
from medscale.answers import SCHEMA, predict
from medscale.errors import ExportError, GraphError
from medscale.predict import main
from medscale.runtime import Cascade, Tier


@pytest.fixture(scope="module")
def tiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export")
    write_tiers(directory, model_of("complex", "l1", "clustered"), TIERS, Format("delta", "int8", "hash", 50))
    return directory


def queries_file(path: Path, rows: list[tuple[Any, Any, Any]], kind: Any = None, **options: Any) -> Path:
    columns = {
        name: pa.array(list(part), kind)
        for name, part in zip(("head", "relation", "tail"), zip(*rows, strict=True), strict=True)
    }
    pq.write_table(pa.table(columns), path, **options)
    return path


def asked(number: int) -> list[tuple[Any, Any, Any]]:
    draw = np.random.default_rng(0)
    rows = []
    for entity, relation, side in zip(
        draw.integers(0, NUMBER, number), draw.integers(0, 3, number), range(number), strict=True
    ):
        name, asked_for = f"e{entity}", "rst"[relation]
        rows.append((name, asked_for, None) if side % 3 else (None, asked_for, name))
    return rows


def expected(
    tier: Tier | Cascade, rows: list[tuple[Any, Any, Any]], k: int, **options: Any
) -> list[tuple[int, int, str, float]]:
    found = []
    for row, (head, relation, tail) in enumerate(rows):
        answers = (
            tier.top_k(head, relation, k, **options) if tail is None else tier.top_k_heads(relation, tail, k, **options)
        )
        found += [(row, rank, *pair) for rank, pair in enumerate(zip(answers[0], answers[1].tolist(), strict=True), 1)]
    return found


def answers_of(path: Path, tier: Tier) -> list[tuple[int, int, str, float]]:
    table = pq.read_table(path)
    assert table.schema == SCHEMA
    assert [tier.entity_id(name) for name in table["name"].to_pylist()] == table["entity"].to_pylist()
    return list(zip(*(table[name].to_pylist() for name in ("query", "rank", "name", "score")), strict=True))


@pytest.mark.parametrize(("scorer", "norm"), SCORERS)
def test_answers_in_bulk_are_those_of_one_top_k_each(tmp_path: Path, scorer: str, norm: str) -> None:
    write_tiers(tmp_path, model_of(scorer, norm, "equal"), {"server": 12}, Format(shard_rows=70))
    tier, rows = Tier.open(tmp_path / "server"), asked(9)
    predict(tmp_path / "server", queries_file(tmp_path / "q.parquet", rows), tmp_path / "a.parquet", k=30)
    assert answers_of(tmp_path / "a.parquet", tier) == expected(tier, rows, 30)


def test_scans_parts_and_row_groups_do_not_matter(tiers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SCAN_QUERIES", 4)
    monkeypatch.setattr(module, "PART_QUERIES", 11)
    tier, rows = Tier.open(tiers / "pc"), asked(60)
    queries = queries_file(tmp_path / "q.parquet", rows, row_group_size=25)
    assert main([str(tiers / "pc"), str(queries), f"--out={tmp_path / 'a.parquet'}", "--k=3"]) == 0
    assert answers_of(tmp_path / "a.parquet", tier) == expected(tier, rows, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "q.parquet"]


@pytest.mark.slow
def test_tasks_on_ray_give_the_same_bytes(tiers: Path, tmp_path: Path) -> None:
    queries = queries_file(tmp_path / "q.parquet", asked(40), row_group_size=20)
    assert predict(tiers / "server", queries, tmp_path / "one.parquet", k=4) == (40, 0)
    # A function of the module that a command runs as cannot be sent to Ray's processes.
    command = [sys.executable, "-m", "medscale.predict", tiers / "server", queries, "--k=4", "--tasks=2"]
    done = subprocess.run(
        [*map(str, command), f"--out={tmp_path / 'two.parquet'}"], env={**os.environ, "RAY_ADDRESS": "local"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "40 queries answered, 0 skipped" in done.stderr
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_ids_serve_as_names_do_and_a_column_may_be_absent(tiers: Path, tmp_path: Path) -> None:
    tier = Tier.open(tiers / "phone")
    table = pa.table({"relation": pa.array([1, 2]), "head": pa.array([7, 8])})
    pq.write_table(table, tmp_path / "q.parquet")
    predict(tiers / "phone", tmp_path / "q.parquet", tmp_path / "a.parquet", k=2)
    assert answers_of(tmp_path / "a.parquet", tier) == expected(tier, [(7, 1, None), (8, 2, None)], 2)


def test_a_cascade_chooses_what_is_scored(tiers: Path, tmp_path: Path) -> None:
    rows = asked(12)
    queries = queries_file(tmp_path / "q.parquet", rows)
    predict(tiers / "server", queries, tmp_path / "a.parquet", k=2, cascade=True)
    chain = Cascade([Tier.open(tiers / name) for name in TIERS])
    assert answers_of(tmp_path / "a.parquet", Tier.open(tiers / "server")) == expected(chain, rows, 2, exact=False)
    with pytest.raises(ExportError, match="no smaller tier"):
        predict(tiers / "phone", queries, tmp_path / "a.parquet", cascade=True)


def test_unknown_names_end_it_with_their_row_or_are_skipped(
    tiers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("e1", "r", None), ("nobody", "r", None), ("e2", "nothing", None), (None, "r", "e5")]
    queries = queries_file(tmp_path / "q.parquet", rows)
    command = [str(tiers / "pc"), str(queries), f"--out={tmp_path / 'a.parquet'}"]
    assert main(command) == ExportError.exit_code
    assert "row 1: unknown entity 'nobody'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["q.parquet"]
    assert main([*command, "--skip-unknown"]) == 0
    assert "2 queries answered, 2 skipped" in capsys.readouterr().err
    assert set(pq.read_table(tmp_path / "a.parquet")["query"].to_pylist()) == {0, 3}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("e1", "r", "e2")], "row 0: a query has a relation"), ([("e1", "r", None), (None, "r", None)], "row 1"),
        ([("e1", None, None)], "row 0"),
    ],
)  # fmt: skip
def test_rows_that_are_no_queries_are_refused(tiers: Path, tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        predict(tiers / "pc", queries_file(tmp_path / "q.parquet", rows, pa.string()), tmp_path / "a.parquet")


def test_answers_do_not_take_the_place_of_the_queries(tiers: Path, tmp_path: Path) -> None:
    queries = queries_file(tmp_path / "q.parquet", [("e1", "r", None)], pa.string())
    before = queries.read_bytes()
    with pytest.raises(GraphError, match=r"q\.parquet holds the queries"):
        predict(tiers / "pc", queries, tmp_path / "q.parquet")
    assert queries.read_bytes() == before


def test_files_that_are_no_queries_are_refused(tiers: Path, tmp_path: Path) -> None:
    (tmp_path / "q.parquet").write_bytes(b"PAR1 and then nothing")
    for path in (tmp_path / "q.parquet", tmp_path / "nowhere"):
        with pytest.raises(GraphError, match="cannot be read"):
            predict(tiers / "pc", path, tmp_path / "a.parquet")
    pq.write_table(pa.table({"head": ["e1"]}), tmp_path / "q.parquet")
    with pytest.raises(GraphError, match="lacks a column"):
        predict(tiers / "pc", tmp_path / "q.parquet", tmp_path / "a.parquet")
