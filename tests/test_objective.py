"""A step's loss against the paper written out: loops over sub-models and triples, in float64."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import SCORERS, toy_job

from medscale.batches.corruption import CorruptionBatch
from medscale.batches.queries import QueryBatch
from medscale.config import Job
from medscale.graph.reader import Graph
from medscale.model import reference
from medscale.model.layout import Layout, layout_of
from medscale.model.prefix import prefix_scan
from medscale.objective import Objective
from medscale.trainer import batches_of


def in_float64(job: Job, layout: Layout) -> Objective:
    torch.set_default_dtype(torch.float64)
    try:
        objective = Objective(job, layout, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    objective._scan_of = lambda chosen: prefix_scan(  # type: ignore[assignment]
        layout.scorer, layout.dims, layout.damping, chosen, reach=job.med.reach, dtype=torch.float64
    )
    return objective


def rows_for(layout: Layout, batch: CorruptionBatch | QueryBatch) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    rows = torch.randn(len(batch.entities_U), layout.num_columns, dtype=torch.float64)
    return rows.requires_grad_(), torch.randn(
        layout.num_relation_rows, layout.num_relation_columns, dtype=torch.float64
    ).requires_grad_()


def require_same_gradients(
    job: Job, layout: Layout, batch: CorruptionBatch | QueryBatch, values: Tensor, relations: Tensor, plain: Tensor
) -> None:
    """Compare a step's loss, and its gradients, with a plain loss of the same rows and relations."""
    objective = in_float64(job, layout)
    rows, same_relations = objective.rows(values), relations.detach().clone().requires_grad_()
    fast = objective(batch, rows, same_relations, 0).total
    fast.backward()
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)
    row_gradient, relation_gradient = torch.autograd.grad(plain, (values, relations))
    torch.testing.assert_close(rows.gradient(), row_gradient, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(same_relations.grad, relation_gradient, rtol=1e-9, atol=1e-9)


def all_scores(
    job: Job, layout: Layout, rows: Tensor, relations: Tensor, head: Tensor, relation: Tensor, tail: Tensor
) -> Tensor:
    columns = (layout.scorer.unit_columns, layout.scorer.relation_unit_columns)
    return reference.sub_model_scores(
        job.model.scorer,
        job.model.norm,
        layout.dims,
        layout.damping,
        columns,
        rows[head],
        relations[relation],
        rows[tail],
        job.med.reach,
    )


def bernoulli_kl(teacher: Tensor, student: Tensor) -> Tensor:
    p, q = torch.sigmoid(teacher), torch.sigmoid(student)
    return p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))


def plain_binary_loss(job: Job, layout: Layout, batch: CorruptionBatch, rows: Tensor, relations: Tensor) -> Tensor:
    """Equations 2 to 6, one sub-model and one triple after the other."""
    med, n, dims = job.med, len(layout.dims), layout.dims
    num_positives = sum(c.num_positives for c in batch.corruptions)
    hard, mutual = [torch.zeros((), dtype=torch.float64)] * n, [torch.zeros((), dtype=torch.float64)] * n

    def logit(i: int, s: Tensor) -> Tensor:
        ratio = math.sqrt(dims[i] / dims[-1])
        if not layout.scorer.is_distance:
            return s
        margin = job.loss.margin * (ratio if job.loss.margin_scaling == "sqrt" else 1)
        return (1 / ratio if job.loss.temperature == "sqrt" else 1) * (margin + s)

    for c in batch.corruptions:
        share = c.num_positives / num_positives

        def triple(x: int, p: int, other: Tensor, c: Any = c) -> tuple[Tensor, Tensor, Tensor]:
            known = c.known_XP[x, p]
            return (known, c.relation_XP[x, p], other) if c.side == "tail" else (other, c.relation_XP[x, p], known)

        positions = [(x, p) for x in range(c.known_XP.shape[0]) for p in range(c.known_XP.shape[1])]
        positive = {
            (x, p): all_scores(job, layout, rows, relations, *(t.view(1) for t in triple(x, p, c.target_XP[x, p])))[
                :, 0
            ]
            for x, p in positions
        }
        negative = {
            (x, p, k): all_scores(
                job, layout, rows, relations, *(t.view(1) for t in triple(x, p, c.candidates_XK[x, k]))
            )[:, 0]
            for x, p in positions
            for k in range(c.candidates_XK.shape[1])
        }
        kept = {key for key in negative if bool(c.keep_XPK[key])}

        def right(i: int, key: tuple[int, ...], s: Tensor) -> Tensor:
            """Return sub-model i's probability of being right: two numbers name a positive, three a negative."""
            return torch.sigmoid(logit(i, s[i]) * (1 if len(key) == 2 else -1)).detach()

        def trust(i: int, key: tuple[int, ...], s: Tensor) -> Tensor | float:
            is_taught = med.labels == "evaluated" and med.mutual != "off" and i + 1 < n
            return 1 - right(i + 1, key, s) if is_taught else 1.0

        for i in range(n):
            before = i - 1 if med.evolution == "previous" else i
            even = med.evolution == "off" or (med.evolution == "previous" and i == 0)

            def positive_exponent(s: Tensor, before: int = before, even: bool = even) -> Tensor:
                if even:
                    return torch.zeros((), dtype=torch.float64)
                s = s[before].detach()
                return med.w1 / s if med.form == "paper" else med.w1 * (1 - torch.sigmoid(logit(before, s)))

            def negative_exponent(s: Tensor, before: int = before, even: bool = even) -> Tensor:
                if even:
                    return torch.zeros((), dtype=torch.float64)
                s = s[before].detach()
                return med.w2 * (s if med.form == "paper" else logit(before, s))

            total = sum(torch.exp(positive_exponent(s)) for s in positive.values())
            for place, s in positive.items():
                weight = torch.exp(positive_exponent(s)) / total * trust(i, place, s)
                hard[i] = hard[i] - share * weight * torch.log(torch.sigmoid(logit(i, s[i])))
            whole = sum(torch.exp(negative_exponent(negative[key])) for key in kept)
            for x, p in positions:
                own = [key for key in kept if key[:2] == (x, p)]
                part = sum(torch.exp(negative_exponent(negative[key])) for key in own)
                for key in own:
                    norm = whole if med.normalize == "batch" else part * len(positions)
                    weight = torch.exp(negative_exponent(negative[key])) / norm * trust(i, key, negative[key])
                    hard[i] = hard[i] - share * weight * torch.log(1 - torch.sigmoid(logit(i, negative[key][i])))
            if i and med.mutual != "off":
                everything = positive | negative
                for key, s in everything.items():
                    smaller, larger = logit(i - 1, s[i - 1]), logit(i, s[i])
                    if med.mutual_loss == "kl":
                        size = bernoulli_kl(larger.detach(), smaller)
                        if med.mutual == "both":
                            size = size + bernoulli_kl(smaller.detach(), larger)
                    else:
                        gap = smaller - (larger if med.mutual == "both" else larger.detach())
                        size = torch.where(gap.abs() <= 1, gap**2 / 2, gap.abs() - 0.5)
                    if med.labels == "evaluated":
                        size = size * right(i, key, s)
                    mutual[i] = mutual[i] + share * size / len(everything)
    # of the first step
    balance = [(dims[0] / dim) ** job.balance for dim in dims]
    mutual_weight = med.mutual_weight / max(1, med.mutual_warmup_steps)
    loss = mutual_weight * sum(balance[i - 1] * mutual[i] for i in range(1, n))
    for i in range(n):
        loss = loss + balance[i] * (math.exp(med.w3 * dims[i] / dims[-1]) if med.dynamic_weight else 1) * hard[i]
    return loss  # type: ignore[return-value]


VARIANTS: list[dict[str, Any]] = [
    {},
    {"evolution": "previous", "reach": 0.5},
    {"evolution": "previous", "normalize": "batch", "mutual": "both", "w1": 0.7, "w2": 0.4, "w3": 1.5},
    {"evolution": "off", "mutual": "off", "dynamic_weight": False},
    {"mutual_loss": "kl", "mutual_warmup_steps": 4, "balance": 0.5, "reach": 0.7},
    {"mutual_loss": "kl", "labels": "evaluated", "mutual": "both", "reach": 0.0},
    {"labels": "evaluated", "mutual_weight": 0.3},
]
DAMPINGS = [(0.5, 0.25), (1.0,), (0.5, 0.25), (1.0,), (0.5, 0.0), (1.0,), (0.0, 0.0)]


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("scorer", [*SCORERS, "transe_l2"])
@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_binary_losses_equal_the_paper_written_out(toy_graph: Graph, scorer: str, variant: int, kernels: str) -> None:
    scorer, norm = (scorer, "l1") if scorer != "transe_l2" else ("transe", "l2")
    med = dict(VARIANTS[variant])
    if scorer in ("transe", "pairre") and med.get("normalize") == "batch":
        med["form"] = "paper"
    job = toy_job(
        scorer, med=med, loss={"kind": "bce"}, train={"batch_size": 6}, runtime={"kernels": kernels},
        model={"dims": (2, 4, 5), "norm": norm, "damping": DAMPINGS[variant]},
        negatives={"kind": ("chunk", "per_positive", "in_batch", "chunk")[variant % 4], "number": 4, "chunk_size": 3},
    )  # fmt: skip
    layout = layout_of(job.model, toy_graph.num_entities, toy_graph.num_relations)
    batch = batches_of(job, toy_graph).batch(0)
    assert isinstance(batch, CorruptionBatch)
    rows, relations = rows_for(layout, batch)
    plain = plain_binary_loss(job, layout, batch, rows, relations)
    require_same_gradients(job, layout, batch, rows, relations, plain)


@pytest.mark.parametrize("scorer", ["simple", "complex", "transe", "pairre"])
@pytest.mark.parametrize("evolution", ["off", "previous", "own"])
@pytest.mark.parametrize("damping", [(1.0,), (0.5, 0.25)])
@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_softmax_losses_equal_single_triples_written_out(
    toy_graph: Graph, scorer: str, evolution: str, damping: tuple[float, ...], reciprocal: bool, kernels: str
) -> None:
    job = toy_job(
        scorer, med={"evolution": evolution, "mutual": "both", "balance": 0.5 if reciprocal else None},
        runtime={"kernels": kernels}, train={"batch_size": 5},
        model={"dims": (2, 4, 5), "damping": damping, "reciprocal": reciprocal},
        loss={"kind": "softmax", "regularizer": "n3", "regularizer_weights": (0.1, 0.2, 0.3)},
        negatives={"kind": "shared"},
    )  # fmt: skip
    layout = layout_of(job.model, toy_graph.num_entities, toy_graph.num_relations)
    batch = batches_of(job, toy_graph).batch(1)
    assert isinstance(batch, QueryBatch)
    rows, relations = rows_for(layout, batch)

    every = torch.arange(len(batch.entities_U))
    logs = []
    for q in range(len(batch.known_Q)):
        known, relation = batch.known_Q[q].expand(len(every)), batch.relation_Q[q].expand(len(every))
        head, tail = (known, every) if q < batch.num_tail_queries else (every, known)
        scores = all_scores(job, layout, rows, relations, head, relation, tail)
        if layout.scorer.is_distance:
            ratio = torch.tensor(layout.dims, dtype=torch.float64).div(layout.dims[-1]).sqrt()[:, None]
            scores = (job.loss.margin * ratio + scores) / ratio
        logs.append(torch.log_softmax(scores if batch.bias_M is None else scores + batch.bias_M, 1))
    log_nQM = torch.stack(logs, 1)
    log_nT = log_nQM[:, batch.targets.query_T, batch.targets.candidate_T]
    plain = torch.zeros((), dtype=torch.float64)
    for i, dim in enumerate(layout.dims):
        weights = torch.full_like(log_nT[i], 1 / log_nT.shape[1])
        if evolution == "own" or (evolution == "previous" and i > 0):
            evidence = log_nT[i if evolution == "own" else i - 1].detach().exp()
            weights = torch.softmax(1 - evidence, 0)
        balance = [(layout.dims[0] / dim) ** (0.5 if reciprocal else 0) for dim in layout.dims]
        plain = plain - balance[i] * math.exp(dim / layout.dims[-1]) * (weights * log_nT[i]).sum()
        if i:
            small, large = log_nQM[i - 1], log_nQM[i]
            one = (large.detach().exp() * (large.detach() - small)).sum(1).mean()
            plain = plain + balance[i - 1] * (one + (small.detach().exp() * (small.detach() - large)).sum(1).mean())
    strength = torch.tensor([0.1, 0.1, 0.2, 0.2, 0.3], dtype=torch.float64)
    for t in range(len(batch.targets.query_T)):
        q = batch.targets.query_T[t]
        parts = [rows[batch.known_Q[q]], relations[batch.relation_Q[q]], rows[batch.targets.candidate_T[t]]]
        for part in parts:
            if scorer == "complex":
                cubes = part.view(-1, 2).norm(dim=1) ** 3 * strength
            else:
                cubes = part.abs() ** 3 * strength.repeat_interleave(len(part) // len(strength))
            plain = plain + cubes.sum() / len(batch.targets.query_T)
    require_same_gradients(job, layout, batch, rows, relations, plain)


def test_sampled_sub_models_are_some_of_all(toy_graph: Graph) -> None:
    """Their hard losses are those of the full step; neighbours come from the full list."""
    job = toy_job("transe", model={"dims": (2, 4, 6, 8, 12), "tiers": {"t": 12}}, med={"evolution": "previous"})
    layout = layout_of(job.model, toy_graph.num_entities, toy_graph.num_relations)
    batch = batches_of(job, toy_graph).batch(0)
    rows, relations = rows_for(layout, batch)
    whole = (objective := in_float64(job, layout))(batch, objective.rows(rows), relations, 0)
    some_job = dataclasses.replace(job, med=dataclasses.replace(job.med, sub_models_per_step=3))
    some = (objective := in_float64(some_job, layout))(batch, objective.rows(rows), relations, 0)
    assert len(some.dims) == 3
    for dim, loss in zip(some.dims, some.hard, strict=True):
        torch.testing.assert_close(loss, whole.hard[layout.dims.index(dim)])
    for dim, loss in zip(some.mutual_dims, some.mutual, strict=True):
        torch.testing.assert_close(loss, whole.mutual[whole.mutual_dims.index(dim)])
