"""Composed entities: what they are made of against plain searches of the graph, and real runs of both kinds."""

import dataclasses
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import toy_job

from medscale.checkpoint import load, newest_checkpoint, open_tables, verify
from medscale.config import EncoderSection, Job, conflicts
from medscale.distributed import process_group
from medscale.evaluate import evaluate
from medscale.graph.reader import Graph
from medscale.jobfile import load_job
from medscale.model.encoder import (
    Earl,
    Encoder,
    anchors_of,
    encoder_of,
    most_alike,
    nearest_anchors,
    neighbours_of,
    relation_shares,
    relations_around,
)
from medscale.prepare import prepare
from medscale.train import train
from medscale.trainer import Trainer

CPU = torch.device("cpu")
KINDS = ("nodepiece", "earl")
#: a path 0-1-2-3, a star around 4, and 9, which nothing mentions
TRIPLES = np.array([[0, 0, 1], [1, 0, 2], [2, 1, 3], [4, 1, 5], [4, 1, 6], [7, 0, 4], [4, 0, 8], [0, 1, 1]])


def hops_between(start: int) -> dict[int, int]:
    found, queue = {start: 0}, deque([start])
    while queue:
        here = queue.popleft()
        for head, _, tail in TRIPLES.tolist():
            for a, b in ((head, tail), (tail, head)):
                if a == here and b not in found:
                    found[b] = found[here] + 1
                    queue.append(b)
    return found


def test_anchors_are_central_or_drawn_and_nearest_ones_come_first() -> None:
    anchors = anchors_of(TRIPLES, 10, 4, seed=0)
    assert len(set(anchors.tolist())) == 4
    assert {4, 1} <= set(anchors.tolist()), "those of highest degree"
    places, hops = nearest_anchors(TRIPLES, 10, anchors, 3)
    for entity in range(10):
        reached = hops_between(entity)
        plain = sorted((reached.get(anchor, 7), place) for place, anchor in enumerate(anchors.tolist()))[:3]
        assert list(zip(hops[entity].tolist(), places[entity].tolist(), strict=True)) == plain


def test_relations_and_neighbours_are_those_of_the_entity() -> None:
    relations, (neighbours, edges) = (
        relations_around(TRIPLES, 10, 2, 3, seed=0),
        neighbours_of(TRIPLES, 10, 2, 3, seed=0),
    )
    for entity in range(10):
        ends = [(r, t) for h, r, t in TRIPLES.tolist() if h == entity]
        ends += [(r + 2, h) for h, r, t in TRIPLES.tolist() if t == entity]
        around = {r for r, _ in ends}
        chosen = relations[entity].tolist()
        assert len(chosen) == 3
        assert set(chosen) - {4} <= around
        assert sum(r != 4 for r in chosen) == min(3, len(around)), "none twice, and none left out for room"
        told = list(zip(edges[entity].tolist(), neighbours[entity].tolist(), strict=True))
        real = [pair for pair in told if pair != (4, entity)]
        assert set(real) <= set(ends)
        assert len(real) == min(3, len(ends))


def test_shares_add_up_and_the_alike_have_the_same_relations() -> None:
    shares = relation_shares(TRIPLES, 10, 2)
    torch.testing.assert_close(shares[4], torch.tensor([0.25, 0.5, 0.25, 0.0]))
    assert not shares[9].any()
    reserved = torch.tensor([2, 5, 8])
    places, weights = most_alike(shares, reserved, 2, 0)
    assert places[6, 0] == 1, "6 has the relations of 5 and no other"
    torch.testing.assert_close(weights.sum(1), torch.ones(10))
    cosines = torch.cosine_similarity(shares[0].unsqueeze(0), shares[reserved])
    assert places[0].tolist() == cosines.argsort(descending=True, stable=True)[:2].tolist()
    alike = torch.tensor([[1.0, 0.0]]).expand(400, 2)
    places, weights = most_alike(alike, torch.arange(20), 1, 0)
    assert len(places.unique()) == 20, "equally alike ones are drawn"
    two, weights = most_alike(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.arange(2), 2, 0)
    assert two[0].tolist() == [0, 1]
    torch.testing.assert_close(weights[0], torch.softmax(torch.tensor([5.0, 3.0]), 0), rtol=1e-4, atol=1e-4)


def test_reserved_entities_have_vectors_of_their_own(toy_graph: Graph) -> None:
    encoder = encoder_for(job_of("earl"), toy_graph)
    assert isinstance(encoder, Earl)
    assert (encoder.place_E >= 0).sum() == 30
    alone = encoder._alone(torch.arange(90))
    for entity, place in enumerate(encoder.place_E.tolist()):
        assert torch.equal(alone[entity], encoder.reserved_AC[place]) == (place >= 0)
    encoder(torch.arange(90)).square().sum().backward()
    assert encoder.reserved_AC.grad is not None
    assert encoder.reserved_AC.grad.any(1).all(), "every one learns"


def job_of(kind: str, name: str = "composed", **train_keys: int) -> Job:
    section = EncoderSection(kind=kind, reserved=30, nearest=4, relations=4, neighbours=4, lr=0.05)  # type: ignore[arg-type]
    job = toy_job(
        "rotate", name, train={"epochs": 30, "validate_every": 10, **train_keys}, checkpoint={"every_steps": 1000}
    )
    return dataclasses.replace(job, encoder=section)


def encoder_for(job: Job, graph: Graph) -> Encoder:
    encoder = encoder_of(job.encoder, graph, 32, 0.5, 0, CPU)
    assert encoder is not None
    return encoder


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_composed_alike_alone_and_together(kind: str, toy_graph: Graph) -> None:
    encoder = encoder_for(job_of(kind), toy_graph)
    whole = encoder.all_columns(0, 90, 32)
    assert whole.shape == (90, 32)
    np.testing.assert_allclose(encoder(torch.tensor([7, 3])).detach().numpy(), whole[[7, 3]], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(encoder.all_columns(5, 9, 8), whole[5:9, :8], rtol=1e-5, atol=1e-6)
    assert len(np.unique(whole.round(5), axis=0)) > 80, "entities differ"
    assert encoder.all_columns(4, 4, 8).shape == (0, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_the_composed_rows(kind: str, toy_graph: Graph, tmp_path: Path) -> None:
    job = job_of(kind)
    train(job, toy_graph, tmp_path / job.name)
    with process_group(CPU):
        trainer = Trainer(job, toy_graph, tmp_path / "again", CPU)
        assert trainer.encoder is not None
        before = trainer.encoder.all_columns(0, 90, 32)
        load(verify(newest_checkpoint(tmp_path / job.name)), trainer._state(), collective=True)
        after = trainer.encoder.all_columns(0, 90, 32)
    rows = open_tables(newest_checkpoint(tmp_path / job.name)).rows().slice(0, 90).numpy()
    np.testing.assert_array_equal(rows, after)
    assert (before != after).any(1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_composed_entities_answer_queries(kind: str, data_dir: Path, tmp_path: Path) -> None:
    job = load_job(Path(__file__).resolve().parents[1] / "jobs" / "umls.yaml")
    section = EncoderSection(kind=kind, reserved=60, nearest=5, lr=0.05)  # type: ignore[arg-type]
    job = dataclasses.replace(job, encoder=section, train=dataclasses.replace(job.train, epochs=10))
    graph = prepare(job, data_root=data_dir, graphs_root=tmp_path)
    train(job, graph, tmp_path / "umls")
    records, _ = evaluate(job, graph, tmp_path / "umls")
    (mrr,) = (r["mrr"] for r in records if (r["dim"], r["side"], r["protocol"]) == (50, "both", "field"))
    assert mrr > 0.3, "by chance: .04"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_bit_for_bit(kind: str, toy_graph: Graph, tmp_path: Path) -> None:
    tables = []
    for name, stops in (("once", (6,)), ("twice", (3, 6))):
        for epochs in stops:
            train(job_of(kind, name, epochs=epochs, validate_every=3), toy_graph, tmp_path / name)
        found = open_tables(newest_checkpoint(tmp_path / name, 36))
        tables.append((found.rows().slice(0, 90), found.relation_table))
    assert torch.equal(tables[0][0], tables[1][0])
    assert torch.equal(tables[0][1], tables[1][1])


def test_what_cannot_be_composed_is_refused() -> None:
    job = job_of("earl")
    job = dataclasses.replace(job, runtime=dataclasses.replace(job.runtime, workers=2))
    assert "must be 1 with an encoder" in dict(conflicts(job))["runtime.workers"]
    job = dataclasses.replace(job, distill=dataclasses.replace(job.distill, teacher="other"))
    assert "rows are composed" in str(list(conflicts(job)))
