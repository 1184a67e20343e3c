"""Known triples: answers and membership equal a naive set's, in both ways of sorting, also at the edges."""

import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from medscale.config import GraphSection
from medscale.graph.ingest import ingest
from medscale.graph.known_triples import KnownTriples


def random_triples(count: int, num_entities: int, num_relations: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    limits = (num_entities, num_relations, num_entities)
    return np.stack([generator.integers(0, limit, count) for limit in limits], axis=1)


# The last pair is so large that a (query, filler) pair no longer fits in one number.
@pytest.mark.parametrize(("num_entities", "num_relations"), [(20, 3), (1, 1), (500, 40), (2**40, 2**20)])
def test_answers_and_membership_equal_a_naive_set(num_entities: int, num_relations: int) -> None:
    pool = np.unique(np.linspace(0, num_entities - 1, 20).astype(np.int64))
    triples = random_triples(400, len(pool), min(num_relations, 5))
    triples[:, [0, 2]] = pool[triples[:, [0, 2]]]
    triples[:, 1] *= num_relations // min(num_relations, 5)
    splits = [triples[:200], triples[150:], triples[:0]]
    known = KnownTriples(splits, num_entities=num_entities, num_relations=num_relations)
    expected = {tuple(row) for row in triples.tolist()}
    assert len(known) == len(expected)
    by_query: dict[tuple[str, int, int], set[int]] = defaultdict(set)
    for head, relation, tail in expected:
        by_query["tail", head, relation].add(tail)
        by_query["head", tail, relation].add(head)
    entities = np.repeat(pool, 6)
    relations = np.tile(np.append(np.unique(triples[:, 1])[:5], num_relations - 1)[:1].repeat(6), len(pool))
    relations = np.resize(np.append(np.unique(triples[:, 1]), num_relations - 1), len(entities))
    for side in ("head", "tail"):
        offsets, fillers = known.answers(side, entities, relations)
        assert offsets.dtype == fillers.dtype == np.int64
        assert len(offsets) == len(entities) + 1
        for q, (entity, relation) in enumerate(zip(entities.tolist(), relations.tolist(), strict=True)):
            assert fillers[offsets[q] : offsets[q + 1]].tolist() == sorted(by_query[side, entity, relation])
    grid = known.contains(pool[:, None, None], np.unique(triples[:, 1])[None, :, None], pool[None, None, :])
    assert grid.shape == (len(pool), len(np.unique(triples[:, 1])), len(pool))
    for (i, j, k), found in np.ndenumerate(grid):
        assert found == ((pool[i], np.unique(triples[:, 1])[j], pool[k]) in expected)


def test_ids_out_of_range_are_not_known() -> None:
    known = KnownTriples([np.array([[1, 0, 1], [0, 1, 2]])], num_entities=3, num_relations=2)
    # 0 x 2 + 2 would spell the query (1, 0).
    head, relation = np.array([0, -1, 3, 1]), np.array([2, 4, -4, 0])
    offsets, fillers = known.answers("tail", head, relation)
    assert offsets.tolist() == [0, 0, 0, 0, 1]
    assert fillers.tolist() == [1]
    assert known.contains(head, relation, np.array([1, 1, 1, 1])).tolist() == [False, False, False, True]
    assert known.contains(np.array(1), np.array(0), np.array([-1, 0, 1, 2, 9])).tolist() == [
        False,
        False,
        True,
        False,
        False,
    ]


def test_nothing_known_and_nothing_asked() -> None:
    known = KnownTriples([np.empty((0, 3), dtype=np.int64)], num_entities=3, num_relations=2)
    assert len(known) == 0
    offsets, fillers = known.answers("head", np.array([0, 1]), np.array([0, 1]))
    assert offsets.tolist() == [0, 0, 0]
    assert len(fillers) == 0
    assert not known.contains(np.arange(3), np.array([0]), np.arange(3)).any()
    none = np.empty(0, dtype=np.int64)
    offsets, fillers = known.answers("tail", none, none)
    assert offsets.tolist() == [0]
    assert known.contains(none, none, none).shape == (0,)


def test_of_graph_knows_every_split(data_dir: Path, tmp_path: Path) -> None:
    files = {split: (f"umls/{split}.tsv",) for split in ("train", "valid", "test")}
    graph = ingest(GraphSection(**files), name="umls", seed=0, data_root=data_dir, directory=tmp_path / "umls")
    known = KnownTriples.of_graph(graph)
    assert len(known) == 5_216 + 652 + 661
    for split in ("train", "valid", "test"):
        assert known.contains(*graph.triples(split).T).all()
    only_train = KnownTriples.of_graph(graph, ["train"])
    assert len(only_train) == 5_216
    assert not only_train.contains(*graph.triples("test").T).any()


def test_half_a_million_triples_in_seconds() -> None:
    triples = random_triples(500_000, 50_000, 15)
    start = time.perf_counter()
    known = KnownTriples([triples], num_entities=50_000, num_relations=15)
    assert time.perf_counter() - start < 20
    start = time.perf_counter()
    assert known.contains(*triples[:100_000].T).all()
    offsets, _ = known.answers("tail", triples[:100_000, 0], triples[:100_000, 1])
    assert (np.diff(offsets) >= 1).all()
    assert time.perf_counter() - start < 5
