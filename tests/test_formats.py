"""Formats of an export: DuckDB reads its Parquet files, and the report says what each format costs and finds."""

from pathlib import Path

import duckdb
import numpy as np
import pytest
from small_tables import SCORERS, export, model_facts, small_tables

from medscale.errors import ExportError
from medscale.formats import format_records, formats_table
from medscale.manifest import read_manifest, write_manifest
from medscale.onnx_model import SCORE_FILE, TOP_K_FILE, write_onnx
from medscale.runtime import Tier
from medscale.runtime.tier import TIER_FORMAT, TIER_KIND
from medscale.search_index import INDEX_FILE, write_index

TRIPLES = np.array([[0, 0, 1], [5, 1, 7], [69, 2, 3], [8, 0, 8]])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    facts = model_facts("complex", reciprocal=True, damping=(0.5, 0.25))
    export(tmp_path / "export", facts, small_tables(facts, 70, 3), {"phone": 3, "server": 12}, shard_rows=32)
    return tmp_path / "export"


def test_duckdb_reads_names_and_vectors(directory: Path) -> None:
    tier = Tier.open(directory / "phone")
    found = duckdb.sql(f"SELECT id, name, vector FROM '{directory}/phone/entities*.parquet' ORDER BY id").fetchnumpy()
    assert found["name"].tolist() == [tier.entity_name(i) for i in range(70)]
    assert np.array_equal(np.stack(list(found["vector"])), tier.vectors(np.arange(70)))
    relations = duckdb.sql(f"SELECT name, inverse FROM '{directory}/phone/relations.parquet' ORDER BY inverse, id")
    assert relations.fetchall() == [(f"r{i}", inverse) for inverse in (False, True) for i in range(3)]


def test_duckdb_finds_the_nearest_by_name(directory: Path) -> None:
    tier = Tier.open(directory / "phone")
    nearest = duckdb.sql(f"""
        WITH entities AS (SELECT name, vector::FLOAT[6] AS vector FROM '{directory}/phone/entities*.parquet')
        SELECT other.name FROM entities AS one, entities AS other
        WHERE one.name = 'e7' ORDER BY array_distance(one.vector, other.vector), other.name LIMIT 5
    """).fetchall()
    rows = tier.vectors(np.arange(70))
    order = np.argsort(np.linalg.norm(rows - rows[7], axis=1), kind="stable")[:5]
    assert [name for (name,) in nearest] == [f"e{i}" for i in order]


def test_every_format_is_measured_and_finds_what_the_tier_finds(directory: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("faiss")
    place = (directory / "server").resolve()
    tier = Tier.open(place)
    write_onnx(tier, place)
    write_index(tier, place)
    old = read_manifest(place, TIER_KIND, TIER_FORMAT, ExportError)
    write_manifest(place, old.kind, old.format, old.facts)
    records = format_records(directory, TRIPLES)
    assert [(r["tier"], r["format"]) for r in records] == [
        ("phone", "safetensors"), ("phone", "parquet"), ("server", "safetensors"), ("server", "parquet"),
        ("server", "onnx"), ("server", "index"),
    ]  # fmt: skip
    for record in records:
        assert record["recall@10"] == 1  # the index is so small that every list is read
        assert record["open_s"] > 0
        assert record["top10_ms"] > 0
    sizes = {record["format"]: record["bytes"] for record in records if record["tier"] == "server"}
    assert sizes["onnx"] == sum((place / name).stat().st_size for name in (TOP_K_FILE, SCORE_FILE))
    assert sizes["index"] == (place / INDEX_FILE).stat().st_size
    assert sizes["parquet"] > 70 * 24 * 4
    assert formats_table(records).row_count == 6


@pytest.mark.parametrize(("scorer", "norm"), SCORERS)
def test_duckdb_computes_every_score(tmp_path: Path, scorer: str, norm: str) -> None:
    facts = model_facts(scorer, norm, damping=(0.5, 0.25))
    export(tmp_path / "export", facts, small_tables(facts, 70, 4), {"server": 12})
    assert [(r["format"], r["recall@10"]) for r in format_records(tmp_path / "export", TRIPLES)] == [
        ("safetensors", 1), ("parquet", 1),
    ]  # fmt: skip


def test_what_answers_no_queries_alone_is_left_out(directory: Path) -> None:
    place = (directory / "server").resolve()
    old = read_manifest(place, TIER_KIND, TIER_FORMAT, ExportError)
    write_manifest(place, old.kind, old.format, {**old.facts, "layout": "delta"})
    assert {record["tier"] for record in format_records(directory, TRIPLES)} == {"phone"}


def test_a_damaged_tier_ends_in_one_sentence(directory: Path) -> None:
    (directory / "phone" / "manifest.json").write_text("[]")
    with pytest.raises(ExportError, match="manifest"):
        format_records(directory, TRIPLES)


def test_no_export_has_no_formats(tmp_path: Path) -> None:
    assert format_records(tmp_path / "export", TRIPLES) == []
