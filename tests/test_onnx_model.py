"""ONNX models of tiers, run by onnxruntime: the scores and the answers of `Tier`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coded_tiers import PRECISIONS, coded_tier
from small_tables import SCORERS, export, model_facts, small_tables

from medscale import onnx_model
from medscale.errors import ExportError, UnsupportedError
from medscale.onnx_model import SCORE_FILE, TOP_K_FILE, onnx_models, write_onnx
from medscale.runtime import Tier
from medscale.runtime.precision import Precision

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

NUM_ENTITIES, NUM_RELATIONS = 70, 4
HEADS = np.array([0, 3, 69, 33, 3])
RELATIONS = np.array([0, 1, 2, 3, 3])
TAILS = np.array([69, 3, 1, 34, 0])
#: precision, cuts, rows of a shard, sharding
CODED: list[tuple[Precision, tuple[int, ...], int, str]] = [
    ("float32", (12,), 1000, "range"),
    ("float16", (3, 12), 32, "range"),
    ("int8", (3, 5, 12), 32, "range"),
    ("int4", (3, 12), 1000, "range"),
    ("int8", (12,), 20, "hash"),
]


def session(directory: Path, name: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # an id out of range is what a test wants
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(directory / name), options, providers=["CPUExecutionProvider"])


def write_models(facts: Mapping[str, Any], directory: Path) -> None:
    for name, model in onnx_models(facts, directory).items():
        (directory / name).write_bytes(model.SerializeToString(deterministic=True))
        onnx.checker.check_model(str(directory / name), full_check=True)


def compare_with_tier(tier: Tier, directory: Path) -> None:
    """Check all entities' scores on both sides, in one batch that mixes them, and given triples."""
    top_k, score = session(directory, TOP_K_FILE), session(directory, SCORE_FILE)
    entity, relation = np.concatenate([HEADS, TAILS]), np.tile(RELATIONS, 2)
    asks_head = np.arange(10) >= 5
    feeds = {"entity": entity, "relation": relation, "asks_head": asks_head, "k": np.array([NUM_ENTITIES + 9])}
    ids, scores = top_k.run(["ids", "scores"], feeds)
    assert (ids.dtype, scores.dtype) == (np.int64, np.float32)
    assert ids.shape == scores.shape == (10, NUM_ENTITIES)
    assert (np.diff(scores, axis=1) <= 0).all()
    for i in range(10):
        known, r = int(entity[i]), int(relation[i])
        expected = tier.score_heads(r, known) if asks_head[i] else tier.score_tails(known, r)
        assert sorted(ids[i]) == list(range(NUM_ENTITIES))
        np.testing.assert_allclose(scores[i], expected[ids[i]], rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    some_ids, some_scores = top_k.run(None, {**feeds, "k": np.array([7])})
    assert np.array_equal(some_ids, ids[:, :7])
    assert np.array_equal(some_scores, scores[:, :7])
    (found,) = score.run(None, {"head": HEADS, "relation": RELATIONS, "tail": TAILS})
    expected = tier.score(HEADS, RELATIONS, TAILS)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("scorer", "norm"), SCORERS)
@pytest.mark.parametrize("reciprocal", [False, True])
def test_scores_are_the_tiers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scorer: str, norm: str, reciprocal: bool
) -> None:
    monkeypatch.setattr(onnx_model, "SCAN_NUMBERS", 1500)  # several chunks of a shard
    facts = model_facts(scorer, norm, reciprocal=reciprocal, damping=(0.5, 0.25))
    tables = small_tables(facts, NUM_ENTITIES, NUM_RELATIONS)
    for number, (precision, cuts, shard_rows, sharding) in enumerate(CODED):
        place = tmp_path / str(number)
        tier, directory = coded_tier(place, facts, tables, precision, cuts, shard_rows=shard_rows, sharding=sharding)
        write_models(tier.facts, directory)
        compare_with_tier(tier, directory)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tables_stay_in_the_tiers_files(tmp_path: Path, precision: Precision) -> None:
    facts = model_facts("complex")
    tables = small_tables(facts, 3000, NUM_RELATIONS)
    tier, directory = coded_tier(tmp_path, facts, tables, precision, (3, 12), shard_rows=2000)
    models = onnx_models(tier.facts, directory)
    assert all(model.ByteSize() < 20_000 for model in models.values())
    again = onnx_models(tier.facts, directory)
    assert {n: m.SerializeToString(deterministic=True) for n, m in models.items()} == {
        n: m.SerializeToString(deterministic=True) for n, m in again.items()
    }


def test_an_export_is_read_through_its_link_and_answers_by_name(tmp_path: Path) -> None:
    facts = model_facts("complex", reciprocal=True)
    export(tmp_path / "export", facts, small_tables(facts, NUM_ENTITIES, NUM_RELATIONS), {"phone": 3}, shard_rows=32)
    directory = tmp_path / "export" / "phone"
    tier = Tier.open(directory)
    write_onnx(tier, directory)
    feeds = {"entity": [tier.entity_id("e7")], "relation": [1], "asks_head": [False], "k": [4]}
    ids, scores = session(directory, TOP_K_FILE).run(None, {name: np.array(value) for name, value in feeds.items()})
    names, expected = tier.top_k("e7", "r1", 4)
    assert [tier.entity_name(int(i)) for i in ids[0]] == names
    np.testing.assert_allclose(scores[0], expected, rtol=1e-5)
    properties = {
        p.key: p.value for p in onnx.load(str(directory / TOP_K_FILE), load_external_data=False).metadata_props
    }
    assert (properties["tier"], properties["scorer"], properties["dim"]) == ("phone", "complex", "3")


def test_equal_scores_come_in_order_of_ids(tmp_path: Path) -> None:
    facts = model_facts("distmult")
    tables = small_tables(facts, NUM_ENTITIES, NUM_RELATIONS)
    tables.entities[10:60] = tables.entities[10]
    tier, directory = coded_tier(tmp_path, facts, tables, "float32", (12,), shard_rows=16)
    write_models(tier.facts, directory)
    feeds = {"entity": np.array([5]), "relation": np.array([0]), "asks_head": np.array([False])}
    ids, _ = session(directory, TOP_K_FILE).run(None, {**feeds, "k": np.array([NUM_ENTITIES])})
    assert [i for i in ids[0] if 10 <= i < 60] == list(range(10, 60))


@pytest.mark.parametrize(
    "wrong", [{"entity": -1}, {"entity": NUM_ENTITIES}, {"relation": -1}, {"relation": NUM_RELATIONS}]
)
def test_ids_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    facts = model_facts("transe", reciprocal=True)
    tables = small_tables(facts, NUM_ENTITIES, NUM_RELATIONS)
    tier, directory = coded_tier(tmp_path, facts, tables, "int8", (3,), shard_rows=32)
    write_models(tier.facts, directory)
    feeds = {"entity": 1, "relation": 1, **wrong}
    with pytest.raises(Exception, match="out of data bounds"):
        session(directory, TOP_K_FILE).run(
            None,
            {**{name: np.array([i]) for name, i in feeds.items()}, "asks_head": np.array([False]), "k": np.array([1])},
        )


def test_what_cannot_be_a_model_ends_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = model_facts()
    tier, directory = coded_tier(tmp_path, facts, small_tables(facts, 9, 2), "float32", (3,))
    with pytest.raises(ExportError, match="layout delta"):
        onnx_models({**tier.facts, "layout": "delta"}, directory)
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "onnx.helper", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'medscale\[onnx\]'"):
        write_onnx(tier, directory)
