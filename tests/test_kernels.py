"""The CPU kernels against their plain twins: autograd through `PrefixScan` and `negative_losses`, and brute force."""

import dataclasses
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medscale.batches.queries import Targets
from medscale.config import ModelSection
from medscale.loss import cpu_positives, cpu_softmax
from medscale.loss.bce import Logits
from medscale.loss.cpu_corruptions import corruption_terms
from medscale.loss.cpu_softmax import Softmax, product_log_probabilities
from medscale.loss.negatives import BinaryConstants, negative_losses
from medscale.loss.positives import positive_terms
from medscale.loss.softmax import log_probabilities
from medscale.model.kernels import cpu_pairs
from medscale.model.kernels.cpu_ranks import rank_counts
from medscale.model.prefix import PrefixScan, prefix_scan
from medscale.model.rows import Rows
from medscale.model.scoring import scorer_of
from medscale.ranking import _plain_counts

SCORERS = ["transe", "transe_l2", "rotate", "pairre", "simple", "complex", "distmult"]
#: MED as it is by default, which kernels have a shorter way for
PLAIN = {"both": False, "weights_learn": False}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def scan_for(name: str, dims: tuple[int, ...], damping: float, dtype: torch.dtype, reach: float = 1.0) -> PrefixScan:
    scorer, norm = ("transe", "l2") if name == "transe_l2" else (name, "l1")
    section = ModelSection(scorer=scorer, norm=norm, dims=dims, tiers={"t": dims[-1]})  # type: ignore[arg-type]
    return prefix_scan(scorer_of(section), dims, [damping] * (len(dims) - 1), reach=reach, dtype=dtype)


def constants_for(num_sub_models: int, dtype: torch.dtype, **changes: Any) -> BinaryConstants:
    sizes = torch.linspace(1, 2, num_sub_models, dtype=dtype)
    plain = BinaryConstants(
        logits=Logits(3 * sizes, 2 / sizes), evidence=tuple(range(num_sub_models)),
        taught=tuple(i > 0 for i in range(num_sub_models)), raw=False, over_batch=False, both=True, weights_learn=True,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def close(fast: Tensor, plain: Tensor, dtype: torch.dtype, size: float = 0.0) -> None:
    """Compare relative to the largest number (or `size`), as sums of many terms can only agree to that."""
    tolerance = TOLERANCE[dtype]
    size = max(size, 1e-25, float(plain[plain.isfinite()].abs().max()) if plain.isfinite().any() else 0.0)
    torch.testing.assert_close(fast, plain, rtol=tolerance, atol=tolerance * size, equal_nan=True)


def compare_corruption(
    scan: PrefixScan, constants: BinaryConstants, query: Tensor, rows: Tensor, candidates: Tensor, keep: Tensor,
    sharpness: float = 0.7,
) -> None:  # fmt: skip
    """Compare losses and gradients of chunks of queries against their candidates."""
    dtype, n = query.dtype, len(scan.dims)
    scale = torch.randn_like(query) if scan.scorer.scale else None
    hard_weights, mutual_weights = torch.rand(n, dtype=dtype), torch.rand(n, dtype=dtype) / max(1, keep.numel())
    hard_weights[n // 2] = 0 if n > 2 and sharpness != 1 else 1
    leaves = [query.clone().requires_grad_(), rows.clone().requires_grad_()]
    leaves += [scale.clone().requires_grad_()] if scale is not None else []
    w2 = torch.tensor(sharpness, dtype=dtype, requires_grad=True)
    scores = scan.scores(leaves[0], leaves[1][candidates], leaves[2] if scale is not None else None)
    hard, mutual = negative_losses(constants, w2, scores, keep)
    total = (hard_weights * hard).sum() + (mutual_weights * mutual).sum()
    gradients = torch.autograd.grad(total, [*leaves, w2])

    row_gradients = torch.zeros_like(rows)
    terms = corruption_terms(
        scan.levels, constants, sharpness, query, rows, candidates, keep, scale, hard_weights, mutual_weights,
        row_gradients,
    )  # fmt: skip
    close(terms.hard_n * (hard_weights > 0), hard.detach() * (hard_weights > 0), dtype)
    close(terms.mutual_n, mutual.detach(), dtype)
    close(terms.query_gradient_XPC, gradients[0], dtype)
    close(row_gradients, gradients[1], dtype)
    if scale is not None:
        assert terms.scale_gradient_XPC is not None
        close(terms.scale_gradient_XPC, gradients[2], dtype)
    if constants.weights_learn:
        close(terms.w2_slope, gradients[-1], dtype, float(hard.detach().abs().sum()))


def numbers_for(
    scan: PrefixScan, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (queries [X, P, C], rows [U, C], candidates [X, K]); more columns than the scan needs."""
    num_chunks, num_queries, num_candidates, num_rows = shape
    torch.manual_seed(0)
    columns = scan.num_columns + 3
    query, rows = (
        torch.randn(num_chunks, num_queries, columns, dtype=dtype),
        torch.randn(num_rows, columns, dtype=dtype),
    )
    return query, rows, torch.randint(0, num_rows, (num_chunks, num_candidates))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize(
    ("dims", "damping", "reach", "shape"),
    [
        ((3, 10, 17), 1.0, 1.0, (3, 5, 7, 11)),  # odd everything, candidates repeat
        ((2, 6, 17), 1.0, 0.3, (3, 5, 7, 11)),  # levels that larger sub-models move less
        ((3, 13), 0.0, 1.0, (3, 5, 7, 11)),  # two models side by side
        ((2, 4, 6, 8), 0.5, 0.7, (2, 1, 70, 40)),  # three tiles of candidates, fresh for each positive
        ((1,), 1.0, 1.0, (1, 1, 1, 1)),  # one row
        (tuple(range(2, 34, 2)), 1.0, 1.0, (2, 33, 32, 50)),  # 16 sub-models
    ],
)
def test_corruptions_equal_autograd(
    scorer: str, dims: tuple[int, ...], damping: float, reach: float, shape: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    scan = scan_for(scorer, dims, damping, dtype, reach)
    query, rows, candidates = numbers_for(scan, shape, dtype)
    keep = torch.rand(*query.shape[:2], candidates.shape[1]) < 0.8
    keep[0, 0] = False  # nothing to compare this positive with
    n = len(dims)
    for changes in (
        {}, {"over_batch": True, "raw": True}, {"both": False, "evidence": tuple(range(-1, n - 1))},
        {"evidence": (-1,) * n, "taught": (False,) * n}, {"divergence": True},
        {"divergence": True, "both": False, "evaluated": True, "weights_learn": False},
        {"evaluated": True, "weights_learn": False, "taught": tuple(i % 2 == 1 for i in range(n))},
    ):  # fmt: skip
        compare_corruption(scan, constants_for(n, dtype, **changes), query, rows, candidates, keep)
    # one exponential for all: near logits, a mixture, and all of them far, as columns of that size make them
    for size in (0.1, 1.0, 4.0 if dtype == torch.float32 else 30.0):
        for changes in ({"weights_learn": False}, {"over_batch": True, "weights_learn": False}, PLAIN):
            constants = constants_for(n, dtype, **changes)
            compare_corruption(scan, constants, query * size, rows * size, candidates, keep, sharpness=1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_positives", [0, 1, 64, 131])
@pytest.mark.parametrize("num_sub_models", [1, 2, 16, 21])
def test_positives_equal_their_twin(num_sub_models: int, num_positives: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hard_weights, mutual_weights = torch.rand(2, num_sub_models, dtype=dtype)
    sizes = (0.1, 3.0) if dtype == torch.float32 else (0.1, 5.0, 500.0)
    for size, w1, both in itertools.product(sizes, (0.5, 3.0), (False, True)):
        scores = -size * torch.rand(num_sub_models, num_positives, dtype=dtype)
        constants, given = (
            constants_for(num_sub_models, dtype, **{**PLAIN, "both": both}),
            (hard_weights, mutual_weights),
        )
        assert cpu_positives.applies(constants, w1)
        fast = cpu_positives.positive_terms(constants, w1, scores, *given)
        plain = positive_terms(constants, torch.tensor(w1, dtype=dtype), scores, *given)
        close(fast.hard_n, plain.hard_n, dtype)
        close(fast.mutual_n, plain.mutual_n, dtype)
        close(fast.gradient_nR, plain.gradient_nR, dtype, size=1.0)  # differences of logits are as exact as these


def test_a_broken_positive_shows_in_the_loss() -> None:
    for value in (math.nan, -math.inf):
        scores = -torch.rand(3, 70)
        scores[1, 65] = value
        terms = cpu_positives.positive_terms(constants_for(3, torch.float32, **PLAIN), 1.0, scores, *torch.ones(2, 3))
        assert terms.hard_n.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)])
def test_empty_corruptions_have_no_loss(scorer: str, shape: tuple[int, int, int, int]) -> None:
    scan = scan_for(scorer, (2, 3), 1.0, torch.float32)
    query, rows, candidates = numbers_for(scan, shape, torch.float32)
    ones, gradients = torch.ones(2), torch.zeros_like(rows)
    keep = torch.ones(*query.shape[:2], candidates.shape[1], dtype=torch.bool)
    terms = corruption_terms(
        scan.levels, constants_for(2, torch.float32), 1.0, query, rows, candidates, keep,
        query if scan.scorer.scale else None, ones, ones, gradients,
    )  # fmt: skip
    for tensor in (terms.hard_n, terms.mutual_n, terms.w2_slope, terms.query_gradient_XPC, gradients):
        assert not tensor.any()


@pytest.mark.parametrize("scorer", SCORERS)
def test_candidates_equal_to_the_query_pull_nowhere(scorer: str) -> None:
    """A distance's gradient at 0 is 0, with all of the row's columns or some of them equal."""
    scan = scan_for(scorer, (2, 5), 1.0, torch.float64)
    query, rows, candidates = numbers_for(scan, (2, 1, 3, 4), torch.float64)
    rows[:2, :4], rows[2] = query[0, 0, :4], query[1, 0]
    rows[3], query[1] = 0, 0
    keep = torch.ones(2, 1, 3, dtype=torch.bool)
    candidates = torch.tensor([[0, 1, 2], [2, 3, 3]])
    compare_corruption(scan, constants_for(2, torch.float64), query, rows, candidates, keep)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("size", [1e-42, 1e-20, 1e6])
def test_tiny_and_huge_numbers_score_as_in_torch(scorer: str, size: float) -> None:
    """Denormals too; the roots of l2 and the moduli of float32 lose squares below 1e-38, as torch's do."""
    scan = scan_for(scorer, (3, 8), 1.0, torch.float32)
    query, rows, candidates = numbers_for(scan, (2, 2, 5, 6), torch.float32)
    keep = torch.ones(2, 2, 5, dtype=torch.bool)
    if size < 1 and scorer in ("rotate", "transe_l2"):
        query, rows = query.double(), rows.double()
        scan = scan_for(scorer, (3, 8), 1.0, torch.float64)
    compare_corruption(scan, constants_for(2, query.dtype), query * size, rows * size, candidates, keep)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_infinities_and_nan_show_in_the_loss(scorer: str, value: float) -> None:
    """A broken query must not look like a good step: the guard of the trainer reads the loss."""
    scan = scan_for(scorer, (3, 8), 1.0, torch.float32)
    query, rows, candidates = numbers_for(scan, (2, 2, 5, 6), torch.float32)
    query[1, 1, 0] = value
    keep, gradients = torch.ones(2, 2, 5, dtype=torch.bool), torch.zeros_like(rows)
    terms = corruption_terms(
        scan.levels, constants_for(2, torch.float32), 1.0, query, rows, candidates, keep,
        torch.ones_like(query) if scan.scorer.scale else None, torch.ones(2), torch.ones(2), gradients,
    )  # fmt: skip
    finite = torch.isfinite(terms.hard_n).all() and torch.isfinite(terms.mutual_n).all()
    assert not finite


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_broken_candidates_show_in_gradients_without_losses(scorer: str, value: float) -> None:
    """A broken query shows in the loss of its positive, whose row no negative has to share."""
    scan = scan_for(scorer, (3, 8, 9), 1.0, torch.float32)
    query, rows, candidates = numbers_for(scan, (2, 2, 5, 6), torch.float32)
    rows[candidates[1, 3], 1] = value
    gradients = torch.zeros_like(rows)
    terms = corruption_terms(
        scan.levels, constants_for(3, torch.float32, **PLAIN), 1.0, query, rows, candidates,
        torch.ones(2, 2, 5, dtype=torch.bool), torch.ones_like(query) if scan.scorer.scale else None, torch.ones(3),
        torch.ones(3), gradients, losses=False,
    )  # fmt: skip
    assert not (gradients.isfinite().all() and terms.query_gradient_XPC.isfinite().all())


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("size", [0.1, 1.0, 1e6])
@pytest.mark.parametrize("sharpness", [1.0, 0.7])
def test_gradients_are_the_same_bits_without_losses(scorer: str, size: float, sharpness: float) -> None:
    """Else a run would depend on which of its steps are logged."""
    for dtype in (torch.float32, torch.float64):
        scan = scan_for(scorer, (10, 20, 30), 1.0, dtype)
        query, rows, candidates = numbers_for(scan, (4, 3, 33, 25), dtype)
        keep = torch.rand(4, 3, 33) < 0.8
        results = []
        for losses in (True, False):
            gradients = torch.zeros_like(rows)
            terms = corruption_terms(
                scan.levels, constants_for(3, dtype, **PLAIN), sharpness, size * query, size * rows, candidates, keep,
                query if scan.scorer.scale else None, torch.ones(3), torch.ones(3), gradients, losses=losses,
            )  # fmt: skip
            assert terms.mutual_n.any() == losses
            results.append([gradients, terms.query_gradient_XPC, terms.scale_gradient_XPC])
        for with_losses, without in zip(*results, strict=True):
            assert (with_losses is without is None) or torch.equal(with_losses, without)


def test_batch_weights_survive_a_positive_without_negatives() -> None:
    """Its missing weights must not stand in for the largest: all others may be far smaller."""
    scan = scan_for("transe", (3, 8), 1.0, torch.float32)
    query, rows, candidates = numbers_for(scan, (2, 2, 5, 6), torch.float32)
    keep = torch.ones(2, 2, 5, dtype=torch.bool)
    keep[0, 1] = False
    constants = constants_for(2, torch.float32, over_batch=True, raw=True)
    compare_corruption(scan, constants, query * 100, rows * 100, candidates, keep)


@pytest.mark.parametrize("scorer", SCORERS)
def test_any_number_of_threads_gives_the_same_bits(scorer: str) -> None:
    scan = scan_for(scorer, (10, 20, 30), 1.0, torch.float32)
    query, rows, candidates = numbers_for(scan, (40, 3, 33, 25), torch.float32)
    keep = torch.ones(40, 3, 33, dtype=torch.bool)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            gradients = torch.zeros_like(rows)
            of_positives = cpu_positives.positive_terms(
                constants_for(3, torch.float32, **PLAIN), 1.0, -torch.arange(600.0).reshape(3, 200) / 300,
                *torch.ones(2, 3),
            )  # fmt: skip
            result = [of_positives.hard_n, of_positives.mutual_n, of_positives.gradient_nR, gradients]
            for changes in ({}, PLAIN):
                terms = corruption_terms(
                    scan.levels, constants_for(3, torch.float32, **changes), 1.0, query, rows, candidates, keep,
                    query if scan.scorer.scale else None, torch.ones(3), torch.ones(3), gradients,
                )  # fmt: skip
                result += [terms.hard_n, terms.mutual_n, terms.query_gradient_XPC]
        finally:
            torch.set_num_threads(1)
        results.append(result)
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert torch.equal(one, same)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("count", [0, 1, 9])
def test_pairs_equal_autograd(scorer: str, dtype: torch.dtype, count: int) -> None:
    scan = scan_for(scorer, (3, 10, 17), 0.5, dtype)
    query, target, _ = numbers_for(scan, (count, 1, 1, max(count, 1)), dtype)
    target = target[:count]
    leaves = [query[:, 0].clone().requires_grad_(), target.clone().requires_grad_()]
    if scan.scorer.scale:
        leaves.append(torch.randn_like(target).requires_grad_())
    plain = scan.pair_scores(*leaves)
    pull = torch.randn_like(plain)
    fast = cpu_pairs.pair_scores(scan.levels, *leaves)
    close(fast, plain.detach(), dtype)
    gradients = cpu_pairs.pair_gradients(scan.levels, pull, fast, *leaves)
    for one, other in zip(gradients, torch.autograd.grad(plain, leaves, pull), strict=False):
        assert one is not None
        close(one, other, dtype)


def test_rows_are_added_where_they_belong_however_often_they_repeat() -> None:
    values, positions, rows = torch.randn(50, 37), torch.randint(0, 4, (50,)), torch.randn(4, 37)
    plain = rows.clone().index_add_(0, positions, values)
    cpu_pairs.add_rows(values, positions, rows)
    torch.testing.assert_close(rows, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize(("num_queries", "num_entities"), [(1, 1), (5, 33), (70, 96), (3, 0)])
def test_ranks_equal_counting_all_scores(scorer: str, dtype: torch.dtype, num_queries: int, num_entities: int) -> None:
    """Whole numbers tie often, and their scores are exact in any order of summation."""
    scan = scan_for(scorer, (2, 5, 9), 1.0, dtype)
    query, rows, _ = numbers_for(scan, (num_queries, 1, 1, max(num_entities, 1)), dtype)
    query, rows = query[:, 0, : scan.num_columns].mul(2).round(), rows[:, : scan.num_columns].mul(2).round()
    if scorer in ("rotate", "transe_l2"):
        query[:, 1::2], rows[:, 1::2] = 0, 0  # so that roots are whole
    target = rows[torch.randint(0, len(rows), (num_queries,))]
    scale = torch.ones_like(query) if scan.scorer.scale else None
    pairs = torch.unique(torch.randint(0, max(num_entities, 1), (num_queries * 2,))) if num_entities else torch.zeros(0)
    entities = 100 + pairs.long()
    queries = torch.arange(len(entities)) % num_queries
    fast, plain = torch.zeros(2, 3, num_queries, dtype=torch.int64)
    arguments = (query, scale, target, rows[:num_entities], 100, queries, entities)
    rank_counts(scan.levels, *arguments, fast)
    _plain_counts(scan, *arguments, plain)
    assert torch.equal(fast, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("damping", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("narrow", [0, 48])
@pytest.mark.parametrize("num_candidates", [1, 9, 64])
def test_softmax_equals_autograd(
    num_candidates: int, narrow: int, damping: float, both: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Levels of few columns, whose products are transposed, and of many."""
    monkeypatch.setattr(cpu_softmax, "_NARROW", narrow)
    scan = scan_for("complex", (3, 10, 17), damping, dtype)
    query, rows, _ = numbers_for(scan, (6, 1, 1, num_candidates), dtype)
    query, rows = query[:, 0] / 3, rows / 3
    targets = Targets(torch.tensor([0, 0, 2, 5]), torch.tensor([0, num_candidates - 1, num_candidates // 2, 0]))
    bias, pull, mutual_pull = (
        torch.rand(num_candidates, dtype=dtype),
        torch.randn(3, 4, dtype=dtype),
        torch.rand(3, dtype=dtype),
    )
    leaves = [query.clone().requires_grad_(), rows.clone().requires_grad_()]
    scores = torch.cat(scan.product_scores(*(leaf.unsqueeze(0)[..., : scan.num_columns] for leaf in leaves)))
    logs = log_probabilities(scores, bias)
    plain_mT = logs[:, targets.query_T, targets.candidate_T]
    kl = torch.nn.functional.kl_div
    divergences = [torch.zeros((), dtype=dtype)]
    for m in (1, 2):
        one = kl(logs[m - 1], logs[m].detach(), reduction="batchmean", log_target=True)
        other = kl(logs[m], logs[m - 1].detach(), reduction="batchmean", log_target=True)
        divergences.append(one + other if both else one)
    plain_m = torch.stack(divergences)
    plain = torch.autograd.grad((plain_mT * pull).sum() + (plain_m * mutual_pull).sum(), leaves)

    step = Rows(rows, cpu_pairs.add_rows)
    leaf = query.clone().requires_grad_()
    fast_mT, fast_m = product_log_probabilities(Softmax(scan, (False, True, True), both), leaf, step, bias, targets)
    ((fast_mT * pull).sum() + (fast_m * mutual_pull).sum()).backward()
    close(fast_mT.detach(), plain_mT.detach(), dtype, 1.0)
    torch.testing.assert_close(fast_m.detach(), plain_m.detach(), rtol=1e-4, atol=10 * TOLERANCE[dtype])
    close(leaf.grad, plain[0], dtype, 1.0)  # type: ignore[arg-type]
    close(step.gradient(), plain[1], dtype, 1.0)


def test_without_a_compiler_the_message_names_the_ways_out(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", "from medscale.model.kernels.library import library; library()"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    for words in ("no-such-compiler", "install g++", "runtime.kernels"):
        assert words in done.stderr


@pytest.mark.parametrize("scorer", SCORERS)
def test_levels_that_stay_have_no_gradient_and_the_others_theirs(scorer: str) -> None:
    scan = scan_for(scorer, (3, 13), 0.0, torch.float32)
    query, rows, candidates = numbers_for(scan, (2, 5, 7, 11), torch.float32)
    keep = torch.ones(2, 5, 7, dtype=torch.bool)
    scale, weights, results = torch.rand_like(query) if scan.scorer.scale else None, torch.ones(2), []
    for num_kept in (0, 1):
        gradients = torch.zeros_like(rows)
        constants = constants_for(2, torch.float32, num_kept=num_kept)
        terms = corruption_terms(
            scan.levels, constants, 1.0, query, rows, candidates, keep, scale, weights, weights, gradients
        )
        results.append((terms.hard_n, terms.query_gradient_XPC, gradients))
    (hard, query_all, rows_all), (hard_kept, query_kept, rows_kept) = results
    first = 3 * scan.scorer.unit_columns
    assert torch.equal(hard, hard_kept)
    assert torch.equal(query_all[..., :first], query_kept[..., :first])
    assert torch.equal(rows_all[:, :first], rows_kept[:, :first])
    assert rows_all[:, first:].any()
    assert not query_kept[..., first:].any()
    assert not rows_kept[:, first:].any()
