"""Order, corruptions and queries: every triple once per epoch, negatives as the job says, all by seed alone."""

import itertools

import numpy as np
import pytest
import torch

from medscale.batches.corruption import CorruptionBatch, CorruptionBatches
from medscale.batches.order import EpochOrder, PartitionOrder
from medscale.batches.partitions import Feed
from medscale.batches.queries import QueryBatches, query_table
from medscale.config import NegativesSection
from medscale.graph.known_triples import KnownTriples

NUM_ENTITIES, NUM_RELATIONS = 40, 5


@pytest.fixture(scope="module")
def triples() -> np.ndarray:
    draws = np.random.default_rng(3)
    pool = np.stack([draws.integers(0, n, 400) for n in (NUM_ENTITIES, NUM_RELATIONS, NUM_ENTITIES)], 1)
    return np.unique(pool, axis=0)[:210]


def corruption_batches(triples: np.ndarray, **changes: object) -> CorruptionBatches:
    arguments = {"batch_size": 64, "reciprocal": False, "seed": 5, "known": None} | {
        k: v for k, v in changes.items() if k in ("batch_size", "reciprocal", "seed", "known")
    }
    section = NegativesSection(**{k: v for k, v in changes.items() if k not in arguments})  # type: ignore[arg-type]
    order = PartitionOrder((len(triples),), arguments["seed"])  # type: ignore[arg-type]
    feed = Feed(order, lambda epoch, place: triples[order.rows(epoch, place)], list)
    return CorruptionBatches(feed, NUM_ENTITIES, NUM_RELATIONS, section, **arguments)  # type: ignore[arg-type]


def positives_of(batch: CorruptionBatch) -> list[tuple[int, int, int]]:
    found = []
    for c in batch.corruptions:
        known, target = batch.entities_U[c.known_XP].flatten(), batch.entities_U[c.target_XP].flatten()
        head, tail = (known, target) if c.side == "tail" else (target, known)
        found += list(zip(head.tolist(), c.relation_XP.flatten().tolist(), tail.tolist(), strict=True))
    return found


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_an_epoch_visits_every_item_once_in_any_stretches(length: int) -> None:
    order = EpochOrder(length, seed=1)
    whole = order.indices(0, 0, length)
    assert sorted(whole) == list(range(length))
    cut = length // 3
    np.testing.assert_array_equal(np.concatenate([order.indices(0, 0, cut), order.indices(0, cut, length)]), whole)
    if length > 60:
        assert (order.indices(1, 0, length) != whole).mean() > 0.8
        assert (EpochOrder(length, seed=2).indices(0, 0, length) != whole).mean() > 0.8
        assert abs(np.corrcoef(whole, np.arange(length))[0, 1]) < 0.35


@pytest.mark.parametrize("kind", ["per_positive", "chunk", "in_batch"])
@pytest.mark.parametrize("corrupt", ["head", "tail", "both"])
def test_each_triple_trains_once_per_epoch_and_negatives_are_distinct_from_targets(
    triples: np.ndarray, kind: str, corrupt: str
) -> None:
    batches = corruption_batches(triples, kind=kind, corrupt=corrupt, number=6, chunk_size=16)
    expected = 2 if (kind, corrupt) == ("per_positive", "both") else 1
    seen: list[tuple[int, int, int]] = []
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step)
        seen += positives_of(batch)
        for c in batch.corruptions:
            targets, candidates = batch.entities_U[c.target_XP], batch.entities_U[c.candidates_XK]
            is_other = candidates[:, None, :] != targets[..., None]
            assert torch.equal(c.keep_XPK, is_other)
            if corrupt != "both":
                assert c.side == corrupt
            if kind == "per_positive":
                assert c.keep_XPK.shape[1:] == (1, 6 // expected)
            elif kind == "in_batch":
                assert torch.equal(c.candidates_XK, c.target_XP)
        assert torch.equal(batch.entities_U, batch.entities_U.unique())
    assert sorted(seen) == sorted([tuple(t) for t in triples.tolist()] * expected)


def test_chunks_alternate_sides(triples: np.ndarray) -> None:
    batches = corruption_batches(triples, kind="chunk", number=4, chunk_size=16)
    sides = {c.side: c.known_XP.shape for c in batches.batch(0).corruptions}
    assert sides == {"tail": (2, 16), "head": (2, 16)}


def test_reciprocal_batches_ask_for_tails_of_inverse_relations(triples: np.ndarray) -> None:
    plain = corruption_batches(triples, kind="chunk", number=4, chunk_size=16).batch(0)
    twice = corruption_batches(triples, kind="chunk", number=4, chunk_size=16, reciprocal=True).batch(0)
    for one, other in zip(plain.corruptions, twice.corruptions, strict=True):
        assert other.side == "tail"
        assert torch.equal(other.relation_XP, one.relation_XP + (NUM_RELATIONS if one.side == "head" else 0))
        assert torch.equal(other.known_XP, one.known_XP)


def test_known_triples_do_not_count_as_negatives(triples: np.ndarray) -> None:
    known = KnownTriples([triples], num_entities=NUM_ENTITIES, num_relations=NUM_RELATIONS)
    batch = corruption_batches(triples, kind="per_positive", number=30, known=known).batch(0)
    facts = {tuple(t) for t in triples.tolist()}
    excluded = 0
    for c in batch.corruptions:
        for x, k in itertools.product(range(c.known_XP.shape[0]), range(c.candidates_XK.shape[1])):
            one, other = int(batch.entities_U[c.known_XP[x, 0]]), int(batch.entities_U[c.candidates_XK[x, k]])
            relation = int(c.relation_XP[x, 0])
            triple = (one, relation, other) if c.side == "tail" else (other, relation, one)
            assert bool(c.keep_XPK[x, 0, k]) == (triple not in facts)
            excluded += triple in facts
    assert excluded > 20


def test_batches_are_functions_of_seed_and_step(triples: np.ndarray) -> None:
    one, other = (corruption_batches(triples, kind="chunk", number=4, chunk_size=16) for _ in range(2))
    third = corruption_batches(triples, kind="chunk", number=4, chunk_size=16, seed=6)
    for step in (7, 2):
        assert torch.equal(one.batch(step).entities_U, other.batch(step).entities_U)
        assert torch.equal(one.batch(step).corruptions[0].candidates_XK, other.batch(step).corruptions[0].candidates_XK)
    assert positives_of(one.batch(0)) != positives_of(third.batch(0))


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("max_tails", [1, 2, 16])
def test_queries_hold_every_triple_once_from_each_side(triples: np.ndarray, reciprocal: bool, max_tails: int) -> None:
    table = query_table(triples, NUM_RELATIONS, reciprocal=reciprocal, max_tails=max_tails)
    batches = QueryBatches(table, NUM_ENTITIES, NegativesSection(kind="shared", number=3), 32, seed=0)
    seen: list[tuple[int, int, int]] = []
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step)
        targets = batch.targets
        assert torch.bincount(targets.query_T, minlength=len(batch.known_Q)).max() <= max_tails
        known = batch.entities_U[batch.known_Q][targets.query_T].tolist()
        answers = batch.entities_U[targets.candidate_T].tolist()
        relations = batch.relation_Q[targets.query_T]
        asks_head = relations >= NUM_RELATIONS if reciprocal else targets.query_T >= batch.num_tail_queries
        for k, r, a, head in zip(known, relations.tolist(), answers, asks_head.tolist(), strict=True):
            seen.append((a, r % NUM_RELATIONS, k) if head else (k, r, a))
        assert len(batch.entities_U) == len(batch.entities_U.unique())
    assert sorted(seen) == sorted([tuple(t) for t in triples.tolist()] * 2)


def test_sampled_candidates_estimate_the_partition_function_without_bias(triples: np.ndarray) -> None:
    table = query_table(triples, NUM_RELATIONS, reciprocal=True, max_tails=16)
    batches = QueryBatches(table, NUM_ENTITIES, NegativesSection(kind="shared", number=4), 4, seed=0)
    scores = torch.randn(NUM_ENTITIES, generator=torch.Generator().manual_seed(0)).exp()
    estimates = []
    for step in range(1000):
        batch = batches.batch(step)
        assert batch.bias_M is not None
        estimates.append((scores[batch.entities_U] * batch.bias_M.exp()).sum())
    assert float(torch.stack(estimates).mean()) == pytest.approx(float(scores.sum()), rel=0.02)


def test_few_entities_make_all_of_them_candidates(triples: np.ndarray) -> None:
    table = query_table(triples, NUM_RELATIONS, reciprocal=True, max_tails=16)
    for section in (NegativesSection(kind="all"), NegativesSection(kind="shared", number=1000)):
        batch = QueryBatches(table, NUM_ENTITIES, section, 8, seed=0).batch(0)
        assert batch.bias_M is None
        assert torch.equal(batch.entities_U, torch.arange(NUM_ENTITIES))
