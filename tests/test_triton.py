"""The GPU kernels against their plain twins: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are declared
pytest.importorskip("triton")

from medscale.config import ModelSection
from medscale.loss import negatives, triton_negatives
from medscale.loss.bce import Logits
from medscale.loss.negatives import BinaryConstants, NegativeTerms
from medscale.model.kernels.levels import Levels
from medscale.model.kernels.triton_ranks import rank_counts
from medscale.model.kernels.triton_scores import add_rows, chunk_gradients, chunk_scores, pair_gradients, pair_scores
from medscale.model.prefix import PrefixScan, prefix_scan
from medscale.model.scoring import Scorer, scorer_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCORERS = [("transe", "l1"), ("transe", "l2"), ("rotate", "l1"), ("pairre", "l1"), ("complex", "l1")]
GEOMETRIES = ["l1", "l2", "modulus", "product"]
UNIFORM = tuple(range(10, 170, 10))
#: units of sub-models, kappas of levels above the first, sub-models scored
CASES = {
    "odd": ((3, 10, 17), None, None),
    "damped": ((4, 8, 12), (0.5, 0.7), None),
    "skipped": ((2, 6, 7, 16), None, (1, 3)),
    "damped and skipped": ((3, 5, 6, 9), (0.9, 0.3, 0.6), (0, 2)),
    "one": ((5,), None, None),
}
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def scorer_named(name: str, norm: str) -> Scorer:
    return scorer_of(ModelSection(scorer=name, norm=norm, dims=(1,), tiers={"t": 1}))  # type: ignore[arg-type]


def constants_of(
    scorer: Scorer, dims: tuple[int, ...], damping: tuple[float, ...] | None, selected: tuple[int, ...] | None
) -> tuple[PrefixScan, Levels]:
    """Return the plain scan and the kernels' levels of the same sub-models."""
    scan = prefix_scan(scorer, dims, damping, selected, dtype=torch.float64, device=DEVICE)
    chosen = list(selected or range(len(dims)))
    levels = range(chosen[-1] + 1)
    return scan, Levels(
        geometry=scorer.geometry,
        ends=tuple(dims[level] * scorer.unit_columns for level in levels),
        kappas=(1.0, *(damping or (1.0,) * len(dims)))[: len(levels)],
        outputs=tuple(chosen.index(level) if level in chosen else -1 for level in levels),
    )


def plain_levels(geometry: str, *ends: int) -> Levels:
    return Levels(geometry, ends, (1.0,) * len(ends), tuple(range(len(ends))))  # type: ignore[arg-type]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=DEVICE)


def choices(limit: int, *shape: int) -> Tensor:
    return torch.randint(0, limit, shape, device=DEVICE)


def assert_near(actual: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    if expected is None or actual is None:
        assert actual is expected
        return
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * max(largest, 1e-300))


# -- scores and their gradients ---------------------------------------------------------------------------------


def check_chunks(
    scan: PrefixScan, levels: Levels, num_rows: int, shape: tuple[int, int, int], dtype: torch.dtype = torch.float64
) -> None:
    """Compare scores and gradients of random rows with the plain scan's; columns beyond the levels are NaN."""
    (X, P, K), C = shape, levels.num_columns
    query_XPC, rows_UC, candidates_XK = randn(X, P, C), randn(num_rows, C), choices(num_rows, X, K)
    scale_XPC = randn(X, P, C) if scan.scorer.scale else None
    inputs = [t.requires_grad_() for t in (query_XPC, rows_UC, scale_XPC) if t is not None]
    expected_nXPK = scan.scores(query_XPC, rows_UC[candidates_XK], scale_XPC)
    gradient_nXPK = torch.randn_like(expected_nXPK)
    expected = torch.autograd.grad((expected_nXPK * gradient_nXPK).sum(), inputs)

    def wider(rows: Tensor) -> Tensor:
        return torch.cat([rows.detach().to(dtype), rows.new_full((*rows.shape[:-1], 2), torch.nan, dtype=dtype)], -1)

    query_XPC, rows_UC, *scale = map(wider, inputs)
    scale_XPC = scale[0] if scale else None
    scores_nXPK = chunk_scores(levels, query_XPC, rows_UC, candidates_XK, scale_XPC)
    row_gradients_UC = torch.ones_like(rows_UC)
    query_gradient_XPC, scale_gradient_XPC = chunk_gradients(
        levels, gradient_nXPK.to(dtype), scores_nXPK, query_XPC, rows_UC, candidates_XK, scale_XPC, row_gradients_UC
    )
    tolerance = TOLERANCES[dtype]
    assert_near(scores_nXPK, expected_nXPK.detach(), tolerance)
    gradients = [g for g in (query_gradient_XPC, row_gradients_UC - 1, scale_gradient_XPC) if g is not None]
    for actual, wanted in zip(gradients, expected, strict=True):
        assert (actual[..., C:] == 0).all()
        assert_near(actual[..., :C], wanted, tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("named", SCORERS)
def test_scores_and_gradients_equal_the_plain_scan(named: tuple[str, str], case: str) -> None:
    constants = constants_of(scorer_named(*named), *CASES[case])
    check_chunks(*constants, 7, (2, 1, 5))
    check_chunks(*constants, 9, (1, 3, 6))


@pytest.mark.parametrize("named", SCORERS)
def test_single_precision_and_many_sub_models(named: tuple[str, str]) -> None:
    scorer = scorer_named(*named)
    check_chunks(*constants_of(scorer, *CASES["damped"]), 5, (2, 3, 4), torch.float32)
    check_chunks(*constants_of(scorer, UNIFORM, None, None), 6, (2, 1, 5), torch.float32)
    check_chunks(*constants_of(scorer, UNIFORM, None, None), 6, (1, 2, 3))


@pytest.mark.parametrize(
    ("num_rows", "shape"),
    [(1, (1, 1, 1)), (2, (1, 1, 90)), (50, (1, 1, 70)), (1, (2, 11, 2)), (9, (2, 11, 2)), (2, (1, 40, 3))],
)
def test_any_number_of_positives_candidates_and_repeats(num_rows: int, shape: tuple[int, int, int]) -> None:
    """Rows that repeat more often than a program walks are summed in segments."""
    check_chunks(*constants_of(scorer_named("pairre", "l1"), *CASES["odd"]), num_rows, shape)


def test_repeated_runs_agree_bit_for_bit() -> None:
    levels = plain_levels("l2", 4, 11)
    query_XPC, rows_UC, candidates_XK = randn(2, 2, 11).float(), randn(2, 11).float(), choices(2, 2, 25)
    scores_nXPK = chunk_scores(levels, query_XPC, rows_UC, candidates_XK, None)
    runs = []
    for _ in range(2):
        row_gradients_UC = torch.zeros_like(rows_UC)
        chunk_gradients(levels, scores_nXPK, scores_nXPK, query_XPC, rows_UC, candidates_XK, None, row_gradients_UC)
        runs.append(row_gradients_UC)
    assert torch.equal(*runs)


@pytest.mark.parametrize("named", SCORERS)
def test_pairs_equal_the_plain_scan(named: tuple[str, str]) -> None:
    scorer = scorer_named(*named)
    scan, levels = constants_of(scorer, *CASES["damped and skipped"])
    rows = [randn(5, levels.num_columns).requires_grad_() for _ in range(3 if scorer.scale else 2)]
    expected_nR = scan.pair_scores(*rows)
    gradient_nR = torch.randn_like(expected_nR)
    expected = torch.autograd.grad((expected_nR * gradient_nR).sum(), rows)
    query_RC, target_RC, scale_RC = (*(r.detach() for r in rows), None)[:3]
    scores_nR = pair_scores(levels, query_RC, target_RC, scale_RC)
    assert_near(scores_nR, expected_nR.detach(), 1e-9)
    gradients = pair_gradients(levels, gradient_nR, scores_nR, query_RC, target_RC, scale_RC)
    for actual, wanted in zip(gradients, (*expected, None), strict=False):
        assert_near(actual, wanted, 1e-9)


def test_repeated_positions_add_up() -> None:
    rows_UC, values_RC, positions_R = randn(4, 3), randn(9, 3), choices(4, 9)
    expected_UC = rows_UC.index_add(0, positions_R, values_RC)
    add_rows(values_RC, positions_R, rows_UC)
    assert_near(rows_UC, expected_UC, 1e-12)


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_empty_batches(shape: tuple[int, int, int]) -> None:
    X, P, K = shape
    levels = plain_levels("l1", 2, 4)
    query_XPC, rows_UC, candidates_XK = randn(X, P, 4), randn(3, 4), choices(3, X, K)
    row_gradients_UC = torch.zeros_like(rows_UC)
    scores_nXPK = chunk_scores(levels, query_XPC, rows_UC, candidates_XK, None)
    assert scores_nXPK.shape == (2, X, P, K)
    query_gradient_XPC, _ = chunk_gradients(
        levels, scores_nXPK, scores_nXPK, query_XPC, rows_UC, candidates_XK, None, row_gradients_UC
    )
    assert torch.equal(query_gradient_XPC, torch.zeros_like(query_XPC))
    assert not row_gradients_UC.any()
    if not X:
        assert pair_scores(levels, randn(0, 4), randn(0, 4), None).shape == (2, 0)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_gradients_where_distances_are_zero_or_denormal(geometry: str, dtype: torch.dtype) -> None:
    levels = plain_levels(geometry, 2, 4)
    smallest = torch.finfo(dtype).tiny / 8
    for offset in (0.0, smallest):
        rows_UC = torch.ones((1, 4), dtype=dtype, device=DEVICE) * (smallest if offset else 1.0)
        query_RC = rows_UC + offset
        scores_nR = pair_scores(levels, query_RC, rows_UC, None)
        plain = {"l1": -(query_RC - rows_UC).abs(), "product": query_RC * rows_UC}.get(geometry)
        if plain is not None:
            assert torch.equal(scores_nR[:, 0], plain.cumsum(1)[0, [1, 3]])
        gradients = pair_gradients(levels, torch.ones_like(scores_nR), scores_nR, query_RC, rows_UC, None)
        assert all(g is None or torch.isfinite(g).all() for g in gradients)
        if geometry != "product" and not offset:
            assert not gradients[0].any()
            assert not gradients[1].any()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_infinities_and_nan_reach_every_sub_model_that_holds_them_and_no_other(geometry: str) -> None:
    levels = plain_levels(geometry, 2, 4, 8)
    query_RC, target_RC = randn(3, 8).abs() + 0.1, randn(3, 8)
    plain_nR = pair_scores(levels, query_RC, target_RC, None)
    target_RC[1, 2], target_RC[2, 2] = torch.inf, torch.nan
    scores_nR = pair_scores(levels, query_RC, target_RC, None)
    assert torch.equal(scores_nR[0], plain_nR[0])
    assert torch.equal(scores_nR[:, 0], plain_nR[:, 0])
    assert torch.isinf(scores_nR[1:, 1]).all()
    assert torch.isnan(scores_nR[1:, 2]).all()


# -- ranks ------------------------------------------------------------------------------------------------------


def brute_force_halves(
    scan: PrefixScan, query_QC: Tensor, scale_QC: Tensor | None, entities_NC: Tensor, target_Q: Tensor, kept_QN: Tensor
) -> Tensor:
    scale_1QC = None if scale_QC is None else scale_QC.unsqueeze(0)
    scores_nQN = scan.scores(query_QC.unsqueeze(0), entities_NC.unsqueeze(0), scale_1QC).squeeze(1)
    target_nQ1 = scores_nQN[:, torch.arange(len(query_QC)), target_Q].unsqueeze(2)
    return (2 * (scores_nQN > target_nQ1) + (scores_nQN == target_nQ1) * 1).mul(kept_QN).sum(2)


@pytest.mark.parametrize("case", ["odd", "damped and skipped"])
@pytest.mark.parametrize("named", SCORERS)
def test_rank_counts_equal_brute_force(named: tuple[str, str], case: str) -> None:
    """Columns are small integers: sums are exact, and many entities tie."""
    scorer = scorer_named(*named)
    dims, damping, selected = CASES[case]
    scan, levels = constants_of(scorer, dims, damping and (0.5,) * len(damping), selected)
    num_queries, num_entities, C = 5, 75, levels.num_columns
    query_QC, entities_NC = ((choices(4, size, C) - 1).double() for size in (num_queries, num_entities))
    if scorer.geometry == "modulus":  # exact roots
        query_QC[:, 1::2], entities_NC[:, 1::2] = 0, 0
    scale_QC = choices(3, num_queries, C).double() if scorer.scale else None
    target_Q = choices(num_entities, num_queries)
    kept_QN = torch.rand(num_queries, num_entities, device=DEVICE) < 0.8
    kept_QN[torch.arange(num_queries), target_Q] = False
    excluded_entity_E, excluded_query_E = (~kept_QN.T).nonzero(as_tuple=True)
    halves_nQ = torch.zeros((levels.num_scored, num_queries), dtype=torch.int64, device=DEVICE)
    for part in (slice(0, 33), slice(33, 33), slice(33, 75)):  # global ids start at 100
        rank_counts(
            levels, query_QC, scale_QC, entities_NC[target_Q], entities_NC[part], 100 + part.start, excluded_query_E,
            excluded_entity_E + 100, halves_nQ,
        )  # fmt: skip
    assert torch.equal(halves_nQ, brute_force_halves(scan, query_QC, scale_QC, entities_NC, target_Q, kept_QN))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_equal_rows_tie_exactly_wherever_they_stand(geometry: str) -> None:
    levels = plain_levels(geometry, 6, 22, 50)
    query_QC, rows_NC = randn(130, 50).float(), randn(9, 50).float()
    entities_NC = rows_NC.repeat(8, 1)
    target_QC = rows_NC[choices(9, 130)]
    nothing = choices(1, 0)
    halves_nQ = torch.zeros((3, 130), dtype=torch.int64, device=DEVICE)
    rank_counts(levels, query_QC, None, target_QC, entities_NC, 0, nothing, nothing, halves_nQ)
    assert (halves_nQ % 16 == 8).all()


# -- loss of negatives ------------------------------------------------------------------------------------------


def terms_of(
    dtype: torch.dtype, raw: bool, over_batch: bool, both: bool, shape: tuple[int, ...]
) -> list[NegativeTerms]:
    """Return the fast and the plain terms of random scores, the plain ones in double precision."""
    n = shape[0]
    scores_nXPK, keep_XPK = -5 * torch.rand(shape, dtype=torch.float64, device=DEVICE), randn(*shape[1:]) < 0.5
    keep_XPK[:, :1] = False
    margins, temperatures, hard, mutual = (randn(n).abs() + 0.5 for _ in range(4))
    results = []
    for function, kind in ((triton_negatives.negative_terms, dtype), (negatives.negative_terms, torch.float64)):
        constants = BinaryConstants(
            logits=Logits(margins.to(kind), temperatures.to(kind)),
            evidence=tuple(i - (i + 1) % 2 for i in range(n)),
            taught=tuple(i > 0 and i != 2 for i in range(n)),
            raw=raw, over_batch=over_batch, both=both,
        )  # fmt: skip
        results.append(function(constants, 1.3, scores_nXPK.to(kind), keep_XPK, hard.to(kind), mutual.to(kind)))
    return results


def assert_same_terms(fast: NegativeTerms, plain: NegativeTerms, tolerance: float) -> None:
    for name in ("hard_n", "mutual_n", "w2_slope", "gradient_nXPK"):
        assert_near(getattr(fast, name), getattr(plain, name), tolerance)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("over_batch", [False, True])
@pytest.mark.parametrize("raw", [False, True])
def test_negative_terms_equal_the_plain_twin(raw: bool, over_batch: bool, both: bool) -> None:
    for dtype, shape in ((torch.float64, (5, 2, 3, 7)), (torch.float32, (3, 4, 2, 16)), (torch.float64, (1, 1, 2, 1))):
        assert_same_terms(*terms_of(dtype, raw, over_batch, both, shape), TOLERANCES[dtype])


def test_negative_terms_of_nothing_are_zero() -> None:
    for shape in ((2, 0, 1, 3), (2, 1, 3, 0)):
        for over_batch in (False, True):
            terms = triton_negatives.negative_terms(
                BinaryConstants(Logits(randn(2), randn(2)), (-1, 0), (False, True), False, over_batch, False),
                1.0, randn(*shape), randn(*shape[1:]) < 0, randn(2), randn(2),
            )  # fmt: skip
            assert terms.gradient_nXPK.shape == shape
            assert not any(t.any() for t in (terms.hard_n, terms.mutual_n, terms.w2_slope))


# -- all ----------------------------------------------------------------------------------------------------------


def guarded(tensor: Tensor) -> Tensor:
    """Return the tensor in the middle of memory that poisons whoever reads it by mistake."""
    poison = torch.nan if tensor.is_floating_point() else 1 << 40
    around = tensor.new_full((tensor.numel() + 8192,), True if tensor.dtype == torch.bool else poison)
    inside = around[4096 : 4096 + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor)


def test_kernels_touch_no_memory_beside_their_tensors() -> None:
    levels = plain_levels("modulus", 6, 10, 18, 20, 26)
    query_XPC, rows_UC = guarded(randn(2, 3, 26)), guarded(randn(4, 26))
    candidates_XK, row_gradients_UC = guarded(choices(4, 2, 5)), guarded(torch.zeros_like(rows_UC))
    scores_nXPK = chunk_scores(levels, query_XPC, rows_UC, candidates_XK, query_XPC)
    gradients = chunk_gradients(
        levels, guarded(scores_nXPK), guarded(scores_nXPK), query_XPC, rows_UC, candidates_XK, query_XPC,
        row_gradients_UC,
    )  # fmt: skip
    taught = (False, True, True, True, True)
    constants = BinaryConstants(
        Logits(guarded(randn(5)), guarded(randn(5))), (-1, 0, 1, 2, 3), taught, False, False, True
    )
    terms = triton_negatives.negative_terms(
        constants, 1.0, guarded(scores_nXPK), guarded(scores_nXPK[0] < 0), guarded(randn(5)), guarded(randn(5))
    )
    for result in (scores_nXPK, *gradients, row_gradients_UC, *vars(terms).values()):
        assert torch.isfinite(result).all()
    around = row_gradients_UC._base
    assert around is not None
    assert around.isnan().sum() == 8192


def test_kernels_import_without_the_sharding_stack() -> None:
    source = (
        "import sys, medscale.model.kernels.triton_ranks, medscale.loss.triton_negatives\n"
        "assert not {'torchrec', 'fbgemm_gpu', 'ray', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", source], check=True, timeout=120)
