"""Units, levels and blocks; initial tables."""

import pytest
import torch
from toy import SCORERS, toy_job

from medscale.config import ModelSection
from medscale.distributed import process_group
from medscale.errors import UnsupportedError
from medscale.graph.reader import Graph
from medscale.model.embedding import EntityTable, initial_relations
from medscale.model.layout import layout_of
from medscale.model.prefix import prefix_scan
from medscale.optimizer import fused_optimizer
from medscale.trainer import initial_scale


def test_blocks_are_cut_at_tiers_rounded_up_to_four_columns() -> None:
    section = ModelSection(scorer="transe", dims=(10, 100, 500), tiers={"phone": 10, "pc": 100, "server": 500})
    blocks = [(b.start, b.width) for b in layout_of(section, 7, 3).blocks]
    assert blocks == [(0, 12), (12, 88), (100, 400)]
    pairs = ModelSection(scorer="complex", dims=(10, 100, 500), tiers={"phone": 10, "pc": 100, "server": 500})
    assert [b.width for b in layout_of(pairs, 7, 3).blocks] == [20, 180, 800]
    odd = ModelSection(scorer="distmult", dims=(1, 2, 7), tiers={"a": 1, "b": 2})
    assert [(b.start, b.width) for b in layout_of(odd, 7, 3).blocks] == [(0, 4), (4, 4)]


def test_values_of_tiers_are_spread_over_their_columns() -> None:
    section = ModelSection(scorer="complex", dims=(1, 2, 4), tiers={"phone": 1, "watch": 1, "pc": 2})
    layout = layout_of(section, 7, 3)
    assert layout.of_columns((0.5,), 1) == [0.5] * 4
    assert layout.of_columns((3.0, 1.0), 2) == [3.0, 3.0, *[1.0] * 6]


def test_parameters_are_those_of_the_paper() -> None:
    """Table 4: RotatE at 1000 units on FB15k-237 has 29.3 million parameters, so a unit is two reals."""
    section = ModelSection(scorer="rotate", dims=(1000,), tiers={"large": 1000})
    assert layout_of(section, 14_541, 237).num_parameters(1000) / 1e6 == pytest.approx(29.3, abs=0.05)


@pytest.mark.parametrize("scorer", SCORERS)
def test_initial_tables_do_not_depend_on_anything_but_the_seed_and_score_sanely(toy_graph: Graph, scorer: str) -> None:
    job = toy_job(scorer, model={"dims": (8, 64, 256), "tiers": {"phone": 8, "server": 256}}, loss={"kind": "bce"})
    layout = layout_of(job.model, toy_graph.num_entities, toy_graph.num_relations)
    device = torch.device("cpu")
    tables = []
    with process_group(device):
        for _ in range(2):
            table = EntityTable(layout, *fused_optimizer(job.optimizer, device), device=device)
            table.initialise(5, initial_scale(job))
            tables.append(table.all_rows().slice(0, 90).clone())
    assert torch.equal(*tables)
    relations = initial_relations(layout, 5, initial_scale(job))
    every = torch.arange(90)
    query = layout.scorer.query(tables[0], relations[every % 4], "tail")
    scale = layout.scorer.scale(relations[every % 4], "tail") if layout.scorer.scale else None
    scores = prefix_scan(layout.scorer, layout.dims).pair_scores(query, tables[0].flip(0), scale)
    assert torch.isfinite(scores).all()
    # no prefix starts saturated, and none starts dead
    assert (scores.abs().mean(1) < 2 * job.loss.margin + 6).all()
    assert (scores.std(1) > 1e-4).all()


def test_the_variable_that_lifts_the_bounds_check_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FBGEMM_TBE_BOUNDS_CHECK_MODE", "3")
    job = toy_job()
    with pytest.raises(UnsupportedError, match="FBGEMM_TBE_BOUNDS_CHECK_MODE"):
        EntityTable(
            layout_of(job.model, 9, 2), *fused_optimizer(job.optimizer, torch.device("cpu")), device=torch.device("cpu")
        )
