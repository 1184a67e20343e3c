"""Crops of a directly trained model: units in the order of their importance, axes in the order of their variance."""

from typing import Any

import numpy as np
import pytest
import torch
from toy import toy_job

from medscale.baselines.crops import METHODS, arranged, unit_losses, unit_magnitudes
from medscale.config import Job
from medscale.errors import ConfigError
from medscale.model.layout import Layout, layout_of
from medscale.model.prefix import prefix_scan

ENTITIES, RELATIONS, UNITS = 30, 3, 6
SCORERS = ("transe", "transe_l2", "rotate", "pairre", "simple", "complex", "distmult")


def job_of(scorer: str, **changes: Any) -> Job:
    name, _, norm = scorer.partition("_")
    model = {"scorer": name, "dims": (UNITS,), "tiers": {"all": UNITS}, **({"norm": norm} if norm else {})}
    return toy_job(name, model=model, **changes)


def model_of(job: Job) -> tuple[torch.Tensor, torch.Tensor, Layout]:
    layout = layout_of(job.model, ENTITIES, RELATIONS)
    draw = torch.Generator().manual_seed(1)
    rows_EC = torch.randn(ENTITIES, layout.num_columns, generator=draw)
    return rows_EC, torch.randn(layout.num_relation_rows, layout.num_relation_columns, generator=draw), layout


def triples(number: int = 20) -> np.ndarray[Any, np.dtype[np.int64]]:
    draw = np.random.default_rng(2)
    sizes = (ENTITIES, RELATIONS, ENTITIES)
    return np.stack([draw.integers(0, size, number) for size in sizes], 1)


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_unit_without_weight_is_removed_without_loss(scorer: str) -> None:
    """A unit whose columns are all 0 adds nothing to any score (RotatE's relations turn it, and it stays 0)."""
    job = job_of(scorer)
    rows_EC, relations_RC, layout = model_of(job)
    rows_EC.unflatten(1, (UNITS, -1))[:, 2] = 0
    if layout.scorer.name.startswith("transe"):
        relations_RC[:, 2] = 0
    losses_U = unit_losses(job, rows_EC, relations_RC, layout, triples())
    whole = torch.cat([rows_EC, torch.zeros(ENTITIES, layout.scorer.unit_columns)], 1)
    extra = torch.zeros(len(relations_RC), layout.scorer.relation_unit_columns)
    wider = job_of(scorer, loss={"margin": job.loss.margin})
    wide_layout = Layout(layout.scorer, (UNITS + 1,), {}, ENTITIES, RELATIONS, layout.reciprocal, ())
    unharmed_U = unit_losses(wider, whole, torch.cat([relations_RC, extra], 1), wide_layout, triples())
    # Removing the unit of zeros is removing nothing: what an added unit of zeros costs.
    torch.testing.assert_close(losses_U[2], unharmed_U[-1], rtol=1e-5, atol=1e-6)
    assert (losses_U - losses_U[2]).abs().max() > 1e-3, "other units matter"


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "pca"])
def test_all_units_in_another_order_score_alike(method: Any, scorer: str) -> None:
    job = job_of(scorer)
    rows_EC, relations_RC, layout = model_of(job)
    model = arranged(method, job, rows_EC, relations_RC, layout, triples())

    def scores(rows: torch.Tensor, relations: torch.Tensor) -> torch.Tensor:
        scan, ids = prefix_scan(layout.scorer, layout.dims), torch.from_numpy(triples())
        relation_PC = relations[ids[:, 1]]
        scale = None if layout.scorer.scale is None else layout.scorer.scale(relation_PC, "tail")
        return scan.pair_scores(layout.scorer.query(rows[ids[:, 0]], relation_PC, "tail"), rows[ids[:, 2]], scale)

    torch.testing.assert_close(scores(model.rows_EC, model.relations_RC), scores(rows_EC, relations_RC))
    if method == "ext":
        assert torch.equal(model.rows_EC, rows_EC)
    if method == "ext-v":
        magnitudes_U = unit_magnitudes(model.rows_EC, model.relations_RC, layout.scorer)
        assert torch.equal(magnitudes_U, magnitudes_U.sort(descending=True).values)
    if method == "ext-l":
        losses_U = unit_losses(job, model.rows_EC, model.relations_RC, layout, triples())
        assert torch.equal(losses_U, losses_U.sort(descending=True).values)


def test_principal_axes_keep_distances_and_come_by_variance() -> None:
    job = job_of("transe_l2")
    rows_EC, relations_RC, layout = model_of(job)
    rows_EC *= torch.tensor([1.0, 5.0, 0.1, 2.0, 3.0, 0.5])
    model = arranged("pca", job, rows_EC, relations_RC, layout, triples())
    apart, apart_before = (rows[:1] - rows for rows in (model.rows_EC, rows_EC))
    torch.testing.assert_close(apart.norm(dim=1), apart_before.norm(dim=1))
    variances_C = model.rows_EC.var(0)
    assert torch.equal(variances_C, variances_C.sort(descending=True).values)
    translated = rows_EC[:RELATIONS] + relations_RC[:RELATIONS]
    torch.testing.assert_close(
        (model.rows_EC[:RELATIONS] + model.relations_RC[:RELATIONS]).norm(dim=1), translated.norm(dim=1)
    )


@pytest.mark.parametrize("scorer", ["rotate", "pairre", "simple", "complex", "distmult"])
def test_principal_axes_keep_relations_that_act_on_all_units_alike(scorer: str) -> None:
    job = job_of(scorer)
    rows_EC, relations_RC, layout = model_of(job)
    rows_EC *= torch.tensor([1.0, 5.0, 0.1, 2.0, 3.0, 0.5]).repeat_interleave(layout.scorer.unit_columns)
    relations_RC = relations_RC[:, : layout.scorer.relation_unit_columns].repeat(1, UNITS)
    model = arranged("pca", job, rows_EC, relations_RC, layout, triples())
    torch.testing.assert_close(model.relations_RC, relations_RC, rtol=1e-5, atol=1e-5)
    size_of_unit_U = model.rows_EC.sub(model.rows_EC.mean(0)).square().sum(0).unflatten(0, (UNITS, -1)).sum(1)
    assert torch.equal(size_of_unit_U, size_of_unit_U.sort(descending=True).values)
    query_TC, query_before_TC = (
        layout.scorer.query(rows[:RELATIONS], relations, "tail")
        for rows, relations in ((model.rows_EC, model.relations_RC), (rows_EC, relations_RC))
    )
    torch.testing.assert_close(query_TC.norm(dim=1), query_before_TC.norm(dim=1), rtol=1e-5, atol=1e-5)
    if not layout.scorer.is_distance:
        torch.testing.assert_close(query_TC @ model.rows_EC.T, query_before_TC @ rows_EC.T, rtol=1e-4, atol=1e-4)


def test_crops_are_first_columns_and_no_wider_than_the_model() -> None:
    job = job_of("complex")
    rows_EC, relations_RC, layout = model_of(job)
    crop = arranged("ext", job, rows_EC, relations_RC, layout, triples()).cropped((2, 4))
    assert torch.equal(crop.rows_EC, rows_EC[:, :8])
    assert torch.equal(crop.relations_RC, relations_RC[:, :8])
    assert (crop.layout.dims, crop.layout.damping, crop.table().num_columns) == ((2, 4), (1.0,), 8)
    whole = arranged("ext", job, rows_EC, relations_RC, layout, triples())
    with pytest.raises(ConfigError, match="a model of 6 units has no crop of 7"):
        whole.cropped((7,))
