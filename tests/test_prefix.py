"""One-pass prefix scores against the plain twin that crops and scores each sub-model, and true crops."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medscale.config import ModelSection
from medscale.model import prefix, reference
from medscale.model.prefix import prefix_scan
from medscale.model.scoring import Scorer, scorer_of

SCORERS = [
    ("transe", "l1"),
    ("transe", "l2"),
    *((s, "l1") for s in ("rotate", "pairre", "simple", "complex", "distmult")),
]
DIMS = [(1,), (3, 7), (10, 20, 30), (5, 10, 25, 50), (2, 3, 5, 8, 13)]


def scorer_named(name: str, norm: str) -> Scorer:
    return scorer_of(ModelSection(scorer=name, norm=norm, dims=(1,), tiers={"t": 1}))  # type: ignore[arg-type]


def random_rows(
    scorer: Scorer, units: int, num_chunks: int, num_positives: int, num_candidates: int, seed: int
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    columns, relation_columns = units * scorer.unit_columns, units * scorer.relation_unit_columns
    shapes = [
        (num_chunks, num_positives, columns),
        (num_chunks, num_positives, relation_columns),
        (num_chunks, num_candidates, columns),
    ]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def kappas(dims: tuple[int, ...], damping: float) -> list[float]:
    """Return a kappa per level above the first: all 1, or each another one."""
    return [1.0 if damping == 1 else damping + 0.1 * level for level in range(len(dims) - 1)]


def one_pass(
    scorer: Scorer, dims: tuple[int, ...], damping: float, side: str, rows: list[Tensor], reach: float = 1.0
) -> Tensor:
    known_XPC, relation_XPC, candidates_XKC = rows
    scan = prefix_scan(scorer, dims, kappas(dims, damping), reach=reach, dtype=known_XPC.dtype)
    scale_XPC = scorer.scale(relation_XPC, side) if scorer.scale else None
    return scan.scores(scorer.query(known_XPC, relation_XPC, side), candidates_XKC, scale_XPC)


def one_by_one(
    name: str, norm: str, scorer: Scorer, dims: tuple[int, ...], damping: float, side: str, rows: list[Tensor],
    reach: float = 1.0,
) -> Tensor:  # fmt: skip
    """Score every (positive, candidate) pair with every sub-model on its own."""
    known_XPC, relation_XPC, candidates_XKC = rows
    num_chunks, num_positives, _ = known_XPC.shape
    num_candidates = candidates_XKC.shape[1]
    known = known_XPC.unsqueeze(2).expand(-1, -1, num_candidates, -1).flatten(0, 2)
    relation = relation_XPC.unsqueeze(2).expand(-1, -1, num_candidates, -1).flatten(0, 2)
    candidate = candidates_XKC.unsqueeze(1).expand(-1, num_positives, -1, -1).flatten(0, 2)
    head, tail = (known, candidate) if side == "tail" else (candidate, known)
    columns = (scorer.unit_columns, scorer.relation_unit_columns)
    scores = reference.sub_model_scores(name, norm, dims, kappas(dims, damping), columns, head, relation, tail, reach)
    return scores.unflatten(1, (num_chunks, num_positives, num_candidates))


@pytest.mark.parametrize(("name", "norm"), SCORERS)
@pytest.mark.parametrize("side", ["head", "tail"])
@pytest.mark.parametrize(("damping", "reach"), [(1.0, 1.0), (0.5, 1.0), (0.0, 1.0), (1.0, 0.8), (1.0, 0.0), (0.5, 0.8)])
def test_one_pass_equals_cropped_scorers_and_their_gradients(
    name: str, norm: str, side: str, damping: float, reach: float
) -> None:
    scorer = scorer_named(name, norm)
    for number, dims in enumerate(DIMS):
        rows = [r.requires_grad_() for r in random_rows(scorer, dims[-1], 2, 3, 4, number)]
        weights = torch.randn(len(dims), 2, 3, 4, dtype=torch.float64)
        fast, plain = (
            one_pass(scorer, dims, damping, side, rows, reach),
            one_by_one(name, norm, scorer, dims, damping, side, rows, reach),
        )
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)
        gradients = [torch.autograd.grad((s * weights).sum(), rows) for s in (fast, plain)]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SCORERS), st.sets(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from(["head", "tail"]),
    st.integers(0, 2**31),
)  # fmt: skip
def test_a_crop_scored_plainly_is_the_sub_model(named: tuple[str, str], dims: set[int], side: str, seed: int) -> None:
    """Columns of a crop are the table's first ones, and the plain scorer on them is sub-model d of training."""
    scorer, sizes = scorer_named(*named), tuple(sorted(dims))
    rows = random_rows(scorer, sizes[-1], 1, 2, 3, seed)
    trained64 = one_pass(scorer, sizes, 1.0, side, rows)
    trained32 = one_pass(scorer, sizes, 1.0, side, [r.float() for r in rows])
    for i, dim in enumerate(sizes):
        width = [dim * c for c in (scorer.unit_columns, scorer.relation_unit_columns, scorer.unit_columns)]
        crop = [r[..., :w] for r, w in zip(rows, width, strict=True)]
        plain = one_by_one(*named, scorer, (dim,), 1.0, side, crop)[0]
        torch.testing.assert_close(trained64[i], plain, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(trained32[i], plain.float(), rtol=1e-5, atol=1e-5 * plain.abs().max().item())


@pytest.mark.parametrize(("name", "norm"), SCORERS)
@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_skipping_sub_models_changes_no_score_of_the_others(name: str, norm: str, damping: float) -> None:
    scorer, dims = scorer_named(name, norm), (3, 5, 9, 12)
    known, relation, candidates = random_rows(scorer, 12, 1, 3, 4, 7)
    query = scorer.query(known, relation, "tail")
    scale = scorer.scale(relation, "tail") if scorer.scale else None
    whole = prefix_scan(scorer, dims, kappas(dims, damping), dtype=torch.float64).scores(query, candidates, scale)
    for size in (1, 2, 3):
        for selected in itertools.combinations(range(4), size):
            some = prefix_scan(scorer, dims, kappas(dims, damping), selected, dtype=torch.float64).scores(
                query, candidates, scale
            )
            torch.testing.assert_close(some, whole[list(selected)], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["transe", "rotate", "pairre"])
def test_slices_of_any_size_give_the_same_scores_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = scorer_named(name, "l1")
    rows = [r.requires_grad_() for r in random_rows(scorer, 6, 7, 2, 3, 1)]
    whole = one_pass(scorer, (2, 6), 1.0, "tail", rows)
    weights = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * weights).sum(), rows)
    for numbers in (1, 100, 10_000):
        monkeypatch.setattr(prefix, "SLICE_NUMBERS", numbers)
        sliced = one_pass(scorer, (2, 6), 1.0, "tail", rows)
        assert torch.equal(sliced, whole)
        for one, other in zip(torch.autograd.grad((sliced * weights).sum(), rows), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_distance_gradients_at_zero_distance_are_finite() -> None:
    for name, norm in (("transe", "l1"), ("transe", "l2"), ("rotate", "l1"), ("pairre", "l1")):
        scorer = scorer_named(name, norm)
        zero = torch.zeros(1, 1, 4 * scorer.unit_columns, requires_grad=True)
        relation = torch.zeros(1, 1, 4 * scorer.relation_unit_columns)
        rows = [zero, relation, torch.zeros(1, 2, 4 * scorer.unit_columns)]
        one_pass(scorer, (2, 4), 1.0, "tail", rows).sum().backward()
        assert torch.isfinite(zero.grad).all()


def test_one_candidate_and_empty_chunks_score_and_an_infinity_is_never_hidden() -> None:
    scorer = scorer_named("transe", "l1")
    known, relation, candidates = random_rows(scorer, 4, 1, 1, 1, 0)
    assert one_pass(scorer, (2, 4), 1.0, "tail", [known, relation, candidates]).shape == (2, 1, 1, 1)
    empty = [known[:, :0], relation[:, :0], candidates]
    assert one_pass(scorer, (2, 4), 1.0, "tail", empty).shape == (2, 1, 0, 1)
    candidates[..., 3] = torch.inf
    scores = one_pass(scorer, (2, 4), 1.0, "tail", [known, relation, candidates])
    assert not torch.isfinite(scores[1]).any()
