"""The losses against plain twins that loop over sub-models and triples, in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from toy import toy_job

from medscale.config import LossSection
from medscale.loss.bce import Logits, logits_of
from medscale.loss.med import (
    ScalingParameters,
    binary_divergence,
    dynamic_weights,
    mutual_divergence,
    mutual_huber,
    negative_weights,
    positive_weights,
    size_balance,
)
from medscale.loss.negatives import BinaryConstants, negative_losses
from medscale.loss.positives import positive_losses, positive_terms
from medscale.loss.regularizer import column_strengths, row_penalties
from medscale.model.layout import layout_of
from medscale.objective import Objective

W = torch.tensor(1.3, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_positive_weights_follow_equation_3() -> None:
    scores = -torch.rand(3, 5, dtype=torch.float64) * 9 - 0.1
    weights = positive_weights(scores, W, form="paper")
    for row, plain in zip(weights, scores, strict=True):
        exponentials = [math.exp(1.3 / s) for s in plain.tolist()]
        torch.testing.assert_close(
            row, torch.tensor([e / sum(exponentials) for e in exponentials], dtype=torch.float64)
        )
    probability = torch.rand(3, 5, dtype=torch.float64)
    bounded = positive_weights(probability, W, form="bounded")
    torch.testing.assert_close(bounded, torch.softmax(1.3 * (1 - probability), 1))
    # both forms: the worse a positive scores, the more it weighs
    for evidence, form in ((scores, "paper"), (probability, "bounded")):
        order = evidence[0].argsort()
        assert (positive_weights(evidence, W, form=form)[0][order].diff() <= 0).all()


@pytest.mark.parametrize("over", ["positive", "batch"])
def test_negative_weights_follow_equation_4(over: str) -> None:
    evidence = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    keep = torch.rand(3, 4, 5) < 0.7
    weights = negative_weights(evidence, W, keep, over=over)
    assert (weights[:, ~keep] == 0).all()
    for i in range(2):
        exponentials = (1.3 * evidence[i]).exp() * keep
        norm = exponentials.sum() if over == "batch" else exponentials.sum(-1, keepdim=True) * 12
        torch.testing.assert_close(weights[i], exponentials / norm)


def test_a_positive_without_negatives_adds_nothing() -> None:
    keep = torch.ones(1, 2, 3, dtype=torch.bool)
    keep[0, 1] = False
    weights = negative_weights(torch.randn(2, 1, 2, 3), torch.tensor(1.0), keep, over="positive")
    assert (weights[:, 0, 1] == 0).all()
    assert torch.isfinite(weights).all()


def test_negative_losses_are_equation_5() -> None:
    n, x, p, k = 2, 2, 1, 3
    scores, keep = torch.randn(n, x, p, k, dtype=torch.float64), torch.ones(x, p, k, dtype=torch.bool)
    ones = torch.ones(n, dtype=torch.float64)
    constants = BinaryConstants(Logits(0 * ones, ones), (-1, -1), (False, True), False, False, False)
    hard, mutual = negative_losses(constants, W, scores, keep)
    for i in range(n):
        plain = -sum(math.log(1 - 1 / (1 + math.exp(-s))) for s in scores[i].flatten()) / (x * p * k)
        torch.testing.assert_close(hard[i], torch.tensor(plain, dtype=torch.float64))
    assert mutual[0] == 0
    assert mutual[1] > 0


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("evidence", [(0, 1, 2), (-1, 0, 1), (-1, -1, -1)])
@pytest.mark.parametrize("num_positives", [1, 7])
@pytest.mark.parametrize(("divergence", "evaluated"), [(False, False), (True, False), (True, True)])
def test_gradients_of_positives_by_hand_equal_autograd(
    num_positives: int, evidence: tuple[int, ...], *, both: bool, raw: bool, divergence: bool, evaluated: bool
) -> None:
    sizes = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    constants = BinaryConstants(
        Logits(sizes, 3 / sizes), evidence, (False, True, False), raw, over_batch=raw, both=both,
        weights_learn=not evaluated, divergence=divergence, evaluated=evaluated,
    )  # fmt: skip
    scores = -3 * torch.rand(3, num_positives, dtype=torch.float64) - 0.1
    hard_weights, mutual_weights = torch.rand(2, 3, dtype=torch.float64)
    leaf, w1 = scores.clone().requires_grad_(), W.clone().requires_grad_()
    hard, mutual = positive_losses(constants, w1, leaf)
    total = (hard_weights * hard).sum() + (mutual_weights * mutual).sum()
    gradient, slope = torch.autograd.grad(total, [leaf, w1], materialize_grads=True)
    slope = slope * constants.weights_learn
    terms = positive_terms(constants, W, scores, hard_weights, mutual_weights)
    plain = (hard.detach(), mutual.detach(), slope, gradient)
    for fast, slow in zip((terms.hard_n, terms.mutual_n, terms.w1_slope, terms.gradient_nR), plain, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)


def test_logits_grow_margins_and_shrink_temperatures_with_the_square_root() -> None:
    logits = logits_of(LossSection(margin=8.0), (16, 64), is_distance=True, device=torch.device("cpu"))
    torch.testing.assert_close(logits.margins, torch.tensor([4.0, 8.0]))
    torch.testing.assert_close(logits.temperatures, torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(logits(-torch.ones(2, 3))[0], torch.full((3,), 6.0))
    product = logits_of(LossSection(margin=8.0), (16, 64), is_distance=False, device=torch.device("cpu"))
    torch.testing.assert_close(product(torch.ones(2, 3)), torch.ones(2, 3))


def test_mutual_huber_is_a_sum_per_pair() -> None:
    small, large = torch.randn(2, 6, dtype=torch.float64) * 2, torch.randn(2, 6, dtype=torch.float64)
    gap = (small - large).abs()
    plain = torch.where(gap <= 1, gap**2 / 2, gap - 0.5).sum(1)
    torch.testing.assert_close(mutual_huber(small, large).sum(1), plain)


def test_binary_divergence_is_kl_of_true_and_false() -> None:
    small, large = torch.randn(2, 6, dtype=torch.float64) * 2, torch.randn(2, 6, dtype=torch.float64)

    def outcomes(logits: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.sigmoid(logits), torch.sigmoid(-logits)], -1).log()

    def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        return F.kl_div(outcomes(student), outcomes(teacher), reduction="none", log_target=True).sum(-1)

    torch.testing.assert_close(binary_divergence(small, large, both=False), divergence(large, small))
    both = divergence(large, small) + divergence(small, large)
    torch.testing.assert_close(binary_divergence(small, large, both=True), both)


def test_mutual_divergence_is_kl_and_spares_the_teacher() -> None:
    raw = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    small, large = (F.log_softmax(r, 1) for r in raw)
    loss = mutual_divergence(small, large, both=False)
    plain = (large.exp() * (large - small)).sum(1).mean()
    torch.testing.assert_close(loss, plain)
    loss.backward()
    assert raw[0].grad is not None
    assert raw[1].grad is None
    both = mutual_divergence(small, large, both=True)
    torch.testing.assert_close(both, plain + (small.exp() * (small - large)).sum(1).mean())


def test_dynamic_weights_are_equation_6() -> None:
    weights = dynamic_weights(torch.tensor([10.0, 100.0, 500.0]), torch.tensor(2.0))
    torch.testing.assert_close(weights, torch.tensor([math.exp(0.04), math.exp(0.4), math.exp(2.0)]))


def test_balance_falls_with_size_and_is_for_products_with_binary_losses() -> None:
    weights = size_balance(torch.tensor([10.0, 20.0, 640.0]), 1.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 1 / 2, 1 / 64]))
    assert size_balance(torch.arange(10.0, 641, 10), 2.0).sum() < 2, "all others weigh less than the smallest"
    assert torch.equal(size_balance(torch.tensor([10.0, 640.0]), 0.0), torch.ones(2))
    of_scorers = {scorer: toy_job(scorer, loss={"kind": "bce"}).balance for scorer in ("simple", "complex", "transe")}
    assert of_scorers == {"simple": 2, "complex": 2, "transe": 0}
    assert toy_job("complex", loss={"kind": "softmax"}, negatives={"kind": "shared"}).balance == 0
    assert toy_job("simple", loss={"kind": "bce"}, med={"balance": 0.5}).balance == 0.5


def test_learnable_scaling_parameters_stay_positive_under_the_barrier() -> None:
    scaling = ScalingParameters(1.0, 1.0, 1.0, learnable=True, barrier=0.1)
    for _ in range(2000):
        loss = (scaling.values * torch.tensor([3.0, 2.0, 1.0])).sum() + scaling.barrier()
        loss.backward()
        with torch.no_grad():
            scaling.values -= 1e-2 * scaling.values.grad
        scaling.values.grad = None
        scaling.clamp()
    # the minimum of c w - b log w is at b / c
    torch.testing.assert_close(scaling.values.detach(), torch.tensor([0.1 / 3, 0.05, 0.1]), rtol=1e-2, atol=1e-4)
    assert ScalingParameters(1, 1, 1, learnable=False, barrier=0.1).barrier() == 0


def test_regularizers_count_each_column_once_with_its_levels_strength() -> None:
    rows = torch.randn(3, 8, dtype=torch.float64)
    strengths = column_strengths([0.1, 0.5], (1, 4), 2).double()
    assert strengths.tolist() == pytest.approx([0.1] * 2 + [0.5] * 6)
    assert column_strengths([0.3], (1, 4), 1).tolist() == pytest.approx([0.3] * 4)
    modulus = rows.view(3, 4, 2).norm(dim=-1)
    plain = (modulus**3 * torch.tensor([0.1, 0.5, 0.5, 0.5], dtype=torch.float64)).sum(1)
    torch.testing.assert_close(row_penalties(rows, strengths, "n3", complex_units=True), plain)
    torch.testing.assert_close(
        row_penalties(rows, strengths, "n3", complex_units=False), (rows.abs() ** 3 * strengths).sum(1)
    )
    torch.testing.assert_close(row_penalties(rows, strengths, "l2", complex_units=False), (rows**2 * strengths).sum(1))


def test_chosen_sub_models_hold_both_ends_and_neighbours_for_softmax() -> None:
    dims = tuple(range(2, 34, 2))
    for scorer in ("transe", "complex"):
        job = toy_job(scorer, model={"dims": dims, "tiers": {"t": 32}}, med={"sub_models_per_step": 5})
        objective = Objective(job, layout_of(job.model, 90, 4), torch.device("cpu"))
        draws = [objective._chosen(step) for step in range(200)]
        assert all(len(c) == 5 and c[0] == 0 and c[-1] == 15 and c == sorted(set(c)) for c in draws)
        assert set().union(*draws) == set(range(16))
        if scorer == "complex":
            assert all(any(b == a + 1 for a, b in itertools.pairwise(c)) for c in draws)
