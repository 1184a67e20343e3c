"""Ranks of all sub-models in one scan against a naive loop, and against an independent evaluator."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import SCORERS, toy_job

from medscale.config import GraphSection
from medscale.distributed import process_group
from medscale.errors import NonFiniteError
from medscale.graph.ingest import ingest
from medscale.graph.known_triples import KnownTriples
from medscale.graph.reader import Graph
from medscale.model import reference
from medscale.model.embedding import TableRows
from medscale.model.layout import Layout, layout_of
from medscale.ranking import Ranks, ability_retention, rank_all, records_of, relation_records, sample_triples
from medscale.trainer import Trainer

NUM_ENTITIES, NUM_RELATIONS = 60, 4


def tables_for(layout: Layout, seed: int = 0) -> tuple[TableRows, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # few distinct values, and every entity twice: many exact ties
    rows = torch.randint(-2, 3, (layout.num_entities // 2, layout.num_columns), generator=generator).double()
    rows = torch.cat([rows, rows])
    relations = torch.randn(layout.num_relation_rows, layout.num_relation_columns, generator=generator).double()
    return TableRows([rows[:, :4], rows[:, 4:]], layout.num_columns), relations


def naive_rank(scores: np.ndarray, target: int, answers: set[int]) -> float:
    """Go through all entities, one by one."""
    better = equal = 0
    for entity, score in enumerate(scores):
        if entity == target or entity in answers:
            continue
        better += score > scores[target]
        equal += score == scores[target]
    return 1 + better + equal / 2


def naive_scores(
    layout: Layout, name: str, norm: str, rows: TableRows, relations: torch.Tensor, triple: list[int], side: str
) -> np.ndarray:
    head, relation, tail = triple
    every = torch.arange(layout.num_entities)
    one, other = (torch.full_like(every, head), every) if side == "tail" else (every, torch.full_like(every, tail))
    if side == "head" and layout.reciprocal:
        one, other, relation = other, one, relation + layout.num_relations
    columns = (layout.scorer.unit_columns, layout.scorer.relation_unit_columns)
    table = rows.slice(0, layout.num_entities)
    return reference.sub_model_scores(
        name,
        norm,
        layout.dims,
        layout.damping,
        columns,
        table[one],
        relations[torch.full_like(every, relation)],
        table[other],
    ).numpy()


@pytest.mark.parametrize("scorer", [*SCORERS, "transe_l2"])
@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_ranks_equal_a_loop_over_entities(scorer: str, reciprocal: bool, kernels: str) -> None:
    name, norm = ("transe", "l2") if scorer == "transe_l2" else (scorer, "l1")
    job = toy_job(
        name,
        model={"norm": norm, "reciprocal": reciprocal, "damping": (0.5, 0.25), "dims": (2, 3, 6), "tiers": {"t": 6}},
    )
    layout = layout_of(job.model, NUM_ENTITIES, NUM_RELATIONS)
    rows, relations = tables_for(layout)
    draws = np.random.default_rng(0)
    triples = np.unique(
        np.stack([draws.integers(0, n, 300) for n in (NUM_ENTITIES, NUM_RELATIONS, NUM_ENTITIES)], 1), axis=0
    )
    known, ranked = KnownTriples([triples], num_entities=NUM_ENTITIES, num_relations=NUM_RELATIONS), triples[::15]
    ranks = rank_all(ranked, rows, relations, layout, known, memory_mib=1, kernels=kernels)
    facts = [tuple(t) for t in triples.tolist()]
    for t, (head, relation, tail) in enumerate(ranked.tolist()):
        for side, target in (("head", head), ("tail", tail)):
            answers = {
                h if side == "head" else o
                for h, r, o in facts
                if r == relation and (o == tail if side == "head" else h == head)
            }
            scores = naive_scores(layout, name, norm, rows, relations, [head, relation, tail], side)
            # the same sums in another order: round them to compare exactly, as scores of these tables are far apart
            expected = [naive_rank(s.round(9), target, answers) for s in scores]
            np.testing.assert_array_equal(ranks.of(side)[:, t], expected)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_chunks_of_any_size_give_the_same_ranks(monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    for scorer in ("transe", "complex"):
        layout = layout_of(toy_job(scorer).model, NUM_ENTITIES, NUM_RELATIONS)
        rows, relations = tables_for(layout)
        triples = np.stack([np.arange(40) % n for n in (NUM_ENTITIES, NUM_RELATIONS, 7)], 1).astype(np.int64)
        known = KnownTriples([triples], num_entities=NUM_ENTITIES, num_relations=NUM_RELATIONS)
        whole = rank_all(triples, rows, relations, layout, known, kernels=kernels)
        for size in (1, 7, 59, 60):
            monkeypatch.setattr("medscale.ranking._entities_per_chunk", lambda *_, size=size: size)
            np.testing.assert_array_equal(
                rank_all(triples, rows, relations, layout, known, kernels=kernels).of("both"), whole.of("both")
            )
        monkeypatch.undo()


def test_records_of_both_protocols_by_hand() -> None:
    ranks = Ranks((8, 16), head=np.array([[1.0, 4.0], [2.0, 11.0]]), tail=np.array([[3.0, 2.0], [1.0, 1.0]]))
    records = {(r["dim"], r["protocol"], r["side"]): r for r in records_of(ranks, "test")}
    assert len(records) == 8
    field = records[8, "field", "both"]
    assert field["mrr"] == pytest.approx((1 + 1 / 4 + 1 / 3 + 1 / 2) / 4)
    assert (field["hits@1"], field["hits@3"], field["hits@10"], field["num_queries"]) == (0.25, 0.75, 1.0, 4)
    assert field["mean_rank"] == pytest.approx(2.5)
    assert records[16, "field", "head"]["hits@10"] == 0.5
    assert records[16, "field", "tail"]["mrr"] == 1
    paper = records[8, "paper", "both"]
    assert paper["mrr"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert paper["num_queries"] == 2
    assert paper["mrr"] <= field["mrr"]


def test_relation_records_cover_each_relation_and_side() -> None:
    ranks = Ranks((8,), head=np.array([[1.0, 4.0, 2.0]]), tail=np.array([[3.0, 2.0, 2.0]]))
    records = list(relation_records(ranks, np.array([1, 0, 1]), ["likes", "buys"]))
    by_key = {(r["relation"], r["side"]): r for r in records}
    assert set(by_key) == {(r, s) for r in ("likes", "buys") for s in ("both", "head", "tail")}
    assert by_key["buys", "head"]["mrr"] == pytest.approx((1 + 1 / 2) / 2)
    assert by_key["likes", "both"]["num_queries"] == 2


def test_ability_retention_counts_queries_that_larger_models_keep() -> None:
    # five queries: kept by all; found late and kept; lost again; never found; lost and found again
    head = np.array([[1, 99, 1, 99, 5], [2, 3, 99, 99, 99], [2, 3, 99, 99, 5]], dtype=float)
    ranks = Ranks((1, 2, 3), head=head, tail=np.full((3, 0), 1.0))
    assert ability_retention(ranks.of("both") <= 10) == pytest.approx(2 / 4)


def test_samples_are_seeded_and_keep_order() -> None:
    triples = np.arange(300).reshape(100, 3)
    one, other = sample_triples(triples, 10, seed=3), sample_triples(triples, 10, seed=3)
    np.testing.assert_array_equal(one, other)
    assert len(one) == 10
    assert (np.diff(one[:, 0]) > 0).all()
    assert sample_triples(triples, None, seed=3) is triples
    assert sample_triples(triples, 1000, seed=3) is triples


@pytest.fixture(scope="module")
def umls(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    files = {split: (f"umls/{split}.tsv",) for split in ("train", "valid", "test")}
    directory = tmp_path_factory.mktemp("umls") / "graph"
    return ingest(GraphSection(**files), name="umls", seed=0, data_root=data_dir, directory=directory)


def test_umls_ranks_equal_the_naive_ones_and_pykeens_metrics(umls: Graph, tmp_path: Path) -> None:
    """A trained model, every sub-model: PyKEEN gets our float64 scores and must come to the same figures."""
    job = toy_job("complex", train={"epochs": 3}, optimizer={"kind": "adagrad"})
    with process_group(torch.device("cpu")):
        trainer = Trainer(job, umls, tmp_path, torch.device("cpu"))
        trainer.initialise()
        for step in range(3 * trainer.batches.steps_per_epoch):
            trainer.train_step(trainer.batches.batch(step))
        table = trainer.table.all_rows().slice(0, umls.num_entities).double()
    layout, relations = trainer.layout, trainer.relations.detach().double()
    rows, triples = TableRows([table], layout.num_columns), umls.triples("test")
    ranks = rank_all(triples, rows, relations, layout, KnownTriples.of_graph(umls))
    records = {(r["dim"], r["side"]): r for r in records_of(ranks, "test") if r["protocol"] == "field"}
    assert records[layout.dims[-1], "both"]["mrr"] > 0.3

    everything = np.concatenate([umls.triples(split) for split in ("train", "valid", "test")])
    shape = (len(layout.dims), len(triples), umls.num_entities)
    scores = {side: np.empty(shape) for side in ("head", "tail")}
    for t, triple in enumerate(triples):
        for side, column in (("head", 0), ("tail", 2)):
            by_dim = naive_scores(layout, "complex", "l1", rows, relations, triple.tolist(), side)
            others = [c for c in range(3) if c != column]
            answers = set(everything[(everything[:, others] == triple[others]).all(1)][:, column].tolist())
            expected = [naive_rank(s, triple[column], answers) for s in by_dim] if t % 3 == 0 else None
            if expected is not None:
                np.testing.assert_array_equal(ranks.of(side)[:, t], expected)
            scores[side][:, t] = by_dim
            scores[side][:, t, list(answers - {int(triple[column])})] = np.nan
    target = {side: triples[None, :, None, column] for side, column in (("head", 0), ("tail", 2))}
    np.savez(
        tmp_path / "scores.npz",
        hrt=triples,
        **{f"{side}_scores": scores[side] for side in scores},
        **{f"{side}_true": np.take_along_axis(scores[side], target[side], 2)[:, :, 0] for side in scores},
    )
    script = Path(__file__).with_name("pykeen_metrics.py")
    command = [sys.executable, script, tmp_path / "scores.npz"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=150)
    for dim, theirs in zip(layout.dims, json.loads(done.stdout.splitlines()[-1]), strict=True):
        for side, metrics in theirs.items():
            for metric, value in metrics.items():
                assert records[dim, side][metric] == pytest.approx(value, abs=1e-9), (dim, side, metric)


@pytest.mark.parametrize("scorer", ["complex", "transe", "rotate"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_equal_entities_tie_in_float32_too(scorer: str, threads: int, kernels: str) -> None:
    """Every entity stands in the table twice, so whatever its score, its twin's is the same: half a rank each."""
    layout = layout_of(toy_job(scorer, model={"dims": (10, 25, 50), "tiers": {"t": 50}}).model, 1000, NUM_RELATIONS)
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(500, layout.num_columns, generator=generator)
    relations = torch.randn(NUM_RELATIONS, layout.num_relation_columns, generator=generator)
    draws = np.random.default_rng(0)
    triples = np.stack([draws.integers(0, n, 300) for n in (1000, NUM_RELATIONS, 1000)], 1)
    nothing = KnownTriples([triples[:0]], num_entities=1000, num_relations=NUM_RELATIONS)
    torch.set_num_threads(threads)
    try:
        rows = TableRows([torch.cat([half, half])], layout.num_columns)
        for memory_mib in (1, 512):
            ranked = rank_all(triples, rows, relations, layout, nothing, memory_mib=memory_mib, kernels=kernels)
            ranks = ranked.of("both")
            # better entities come in pairs, and the twin counts half
            assert ((ranks - 1.5) % 2 == 0).all()
    finally:
        torch.set_num_threads(1)


def test_a_model_that_is_not_finite_is_not_ranked() -> None:
    layout = layout_of(toy_job("complex").model, NUM_ENTITIES, NUM_RELATIONS)
    rows, relations = tables_for(layout)
    rows.blocks[1][7] = torch.nan
    known = KnownTriples([np.zeros((0, 3), dtype=np.int64)], num_entities=NUM_ENTITIES, num_relations=NUM_RELATIONS)
    for triple in ([7, 0, 1], [1, 0, 2]):
        with pytest.raises(NonFiniteError, match="cannot be ranked"):
            rank_all(np.array([triple]), rows, relations, layout, known)


@pytest.mark.parametrize("scorer", ["pairre", "transe", "complex"])
def test_scores_beyond_all_numbers_are_not_ranked(scorer: str) -> None:
    """A broken factor, or finite columns whose sum is none, would rank first."""
    layout = layout_of(toy_job(scorer).model, NUM_ENTITIES, NUM_RELATIONS)
    rows, relations = tables_for(layout)
    relations = relations.clone()
    relations[0, 1] = torch.nan if scorer == "pairre" else 1e308
    rows.blocks[0][:, 1] = 1e308
    known = KnownTriples([np.zeros((0, 3), dtype=np.int64)], num_entities=NUM_ENTITIES, num_relations=NUM_RELATIONS)
    with pytest.raises(NonFiniteError, match="cannot be ranked"):
        rank_all(np.array([[1, 0, 2]]), rows, relations, layout, known)
