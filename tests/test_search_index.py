"""The approximate index of a tier: exact where it looks everywhere, its scores exact always."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from small_tables import SCORERS, MemoryTables, export, model_facts, small_tables

from medscale.errors import ExportError, UnsupportedError
from medscale.runtime import Tier
from medscale.search_index import INDEX_FILE, SearchIndex, write_index

pytest.importorskip("faiss")

NUM_ENTITIES = 2000


def tier_of(directory: Path, scorer: str, norm: str = "l1", *, reciprocal: bool = False) -> tuple[Tier, Path]:
    """Return a tier of rows that lie around forty others, as trained ones do."""
    facts = model_facts(scorer, norm, reciprocal=reciprocal, damping=(0.5, 0.25))
    tables = small_tables(facts, NUM_ENTITIES, 3)
    near = tables.entities[np.arange(NUM_ENTITIES) % 40] + 0.3 * tables.entities
    export(directory / "export", facts, MemoryTables(near, tables.relation_rows), {"tier": 12})
    return Tier.open(directory / "export" / "tier"), directory / "export" / "tier"


@pytest.mark.parametrize(("scorer", "norm"), SCORERS)
@pytest.mark.parametrize("reciprocal", [False, True])
def test_answers_have_the_tiers_scores_and_are_nearly_all_there(
    tmp_path: Path, scorer: str, norm: str, reciprocal: bool
) -> None:
    tier, directory = tier_of(tmp_path, scorer, norm, reciprocal=reciprocal)
    write_index(tier, directory)
    index = SearchIndex.open(tier, directory)
    found_best = []
    for entity in range(0, NUM_ENTITIES, 101):
        for side, every in (("tail", tier.score_tails(entity, 1)), ("head", tier.score_heads(1, entity))):
            close = {"rtol": 1e-5, "atol": 1e-5 * np.abs(every).max()}
            ids, scores = index.best(entity, 1, side, 10, shortlist=NUM_ENTITIES, lists=99)
            np.testing.assert_allclose(scores, np.sort(every)[::-1][:10], **close)
            ids, scores = index.best(entity, 1, side, 10)
            np.testing.assert_allclose(scores, every[ids], **close)
            found_best.append(np.isin(np.argsort(-every)[:10], ids).mean())
    # PairRE asks for another distance with every relation, which no lists can foresee
    assert np.mean(found_best) > (0.75 if scorer == "pairre" else 0.9)


def test_names_and_both_sides(tmp_path: Path) -> None:
    tier, directory = tier_of(tmp_path, "complex", reciprocal=True)
    write_index(tier, directory)
    index = SearchIndex.open(tier, directory)
    everything = {"shortlist": NUM_ENTITIES, "lists": 99}
    for names, ids in (
        (index.top_k("e5", "r1", 3)[0], index.best(5, 1, "tail", 3)[0]),
        (index.top_k_heads("r1", "e5", 3)[0], index.best(5, 1, "head", 3)[0]),
    ):
        assert names == [f"e{i}" for i in ids]
    assert tier.top_k("e5", "r1", 3)[0] == [f"e{i}" for i in index.best("e5", "r1", "tail", 3, **everything)[0]]
    assert len(index.best(5, 1, "tail", NUM_ENTITIES + 9, **everything)[0]) == NUM_ENTITIES


def test_equal_tiers_give_equal_bytes(tmp_path: Path) -> None:
    tier, directory = tier_of(tmp_path, "transe")
    write_index(tier, directory)
    first = (directory / INDEX_FILE).read_bytes()
    assert len(first) < 12 * 4 * NUM_ENTITIES  # smaller than the float32 rows
    write_index(tier, directory)
    assert (directory / INDEX_FILE).read_bytes() == first


def test_what_is_no_index_of_the_tier_ends_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier, directory = tier_of(tmp_path / "a", "transe")
    with pytest.raises(ExportError, match=r"entities\.faiss is missing"):
        SearchIndex.open(tier, directory)
    (directory / INDEX_FILE).write_bytes(b"nothing of the kind")
    with pytest.raises(ExportError, match="is no index"):
        SearchIndex.open(tier, directory)
    other, place = tier_of(tmp_path / "b", "rotate")
    write_index(other, place)
    shutil.copy(place / INDEX_FILE, directory / INDEX_FILE)
    with pytest.raises(ExportError, match="of another tier: it holds 2000 rows of 24 columns, not 2000 of 12"):
        SearchIndex.open(tier, directory)
    index = SearchIndex.open(other, place)
    with pytest.raises(ExportError, match="at least 1"):
        index.best(0, 0, "tail", 0)
    with pytest.raises(ExportError):
        index.best(0, 3, "tail", 1)
    with pytest.raises(ExportError):
        index.best("nobody", 0, "tail", 1)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'medscale\[index\]'"):
        write_index(tier, directory)
