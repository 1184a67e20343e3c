"""The negatives' loss and its gradient on GPUs, in one pass over the scores: twin of `negatives.negative_terms`.

A program takes one positive's negatives in a block of sub-models. It reads their neighbours' scores too, which lie
in the caches, so that sub-models need not wait for each other; what mutual learning passes from one to the next
is computed on both sides. Losses leave as one number per sub-model and positive, summed in one order by torch.

Scores of 64 sub-models, 1,024 positives and 64 negatives are 17 MB: read once, and their gradient written once.
A softmax over the batch reads them once more, for its denominators.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from medscale.loss.negatives import BinaryConstants, NegativeTerms
from medscale.workers import ALONE, Workers

__all__ = ["negative_terms"]


def negative_terms(
    constants: BinaryConstants, w2: float, scores_nXPK: Tensor, keep_XPK: Tensor, hard_weights_n: Tensor,
    mutual_weights_n: Tensor, workers: Workers = ALONE,
) -> NegativeTerms:  # fmt: skip
    """Return the losses of scored negatives, and the gradient of their weighted sum by the scores and by w2.

    The gradient is a new tensor: that of l2's scores needs the scores again.
    """
    n, X, P, K = scores_nXPK.shape
    gradient_nXPK = scores_nXPK.new_empty(scores_nXPK.shape)
    hard_nR, slope_nR, evidence_nR, weight_nR, mutual_nR = sums_5nR = scores_nXPK.new_zeros((5, n, X * P))
    device, dtype = scores_nXPK.device, scores_nXPK.dtype
    taught_n = _on_device(constants.taught, device)
    share = 1.0 if constants.over_batch else 1 / max(1, X * P)
    if gradient_nXPK.numel():
        BK = triton.next_power_of_2(K)
        BI = min(triton.next_power_of_2(n), max(1, 1024 // BK))
        grid = (X * P * triton.cdiv(n, BI),)
        inputs = (
            scores_nXPK.contiguous(), keep_XPK.contiguous(), constants.logits.margins.to(dtype),
            constants.logits.temperatures.to(dtype), _on_device(constants.evidence, device),
            scores_nXPK.new_full((1,), w2),
        )  # fmt: skip
        blocks = {"RAW": constants.raw, "BI": BI, "BK": BK, "num_warps": min(16, max(1, BI * BK // 256))}
        softmax_2n = None
        if constants.over_batch:
            softmax_2nR = torch.empty_like(sums_5nR[:2])
            _softmax_parts[grid](*inputs, softmax_2nR, n, X * P, K, **blocks)
            softmax_2n = _over_workers(softmax_2nR, workers)
        hard_n, mutual_n = (share * hard_weights_n).to(dtype), (mutual_weights_n * taught_n).to(dtype)
        _negative_terms[grid](
            *inputs, softmax_2n, hard_n, mutual_n, gradient_nXPK, sums_5nR, n, X * P, K, BOTH=constants.both, **blocks
        )
    elif constants.over_batch:
        _over_workers(sums_5nR[:2], workers)
    hard_n = hard_nR.sum(1)
    if constants.over_batch:
        # within positives, and between their means
        mean_nR = hard_nR / weight_nR.where(weight_nR > 0, 1.0)
        all_n = workers.sum(hard_n.clone()) if constants.weights_learn else hard_n
        slope_nR = slope_nR + evidence_nR * (mean_nR - all_n[:, None])
    return NegativeTerms(
        hard_n=share * hard_n,
        mutual_n=mutual_nR.sum(1).where(taught_n, 0.0),
        w2_slope=share * (hard_weights_n * slope_nR.sum(1)).sum(),
        gradient_nXPK=gradient_nXPK,
    )


def _over_workers(softmax_2nR: Tensor, workers: Workers) -> Tensor:
    """Return each sub-model's (top, sum of exponentials) [2, n] over all workers' positives."""
    tops_nR, sums_nR = softmax_2nR
    lowest_n1 = tops_nR.new_full((len(tops_nR), 1), -torch.inf)
    top_n = workers.largest(torch.cat([tops_nR, lowest_n1], 1).amax(1))
    return torch.stack([top_n, workers.sum((sums_nR * (tops_nR - top_n[:, None]).exp()).sum(1))])


@functools.lru_cache(maxsize=64)
def _on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


@triton.jit
def _load(scores_nRK, margins_n, temperatures_n, i_I1, is_model_I1, at_1K, is_negative_1K, step, RAW: tl.constexpr):
    """Load scores or logits [BI, BK] of some sub-models, which lie `step` apart."""
    value_IK = tl.load(scores_nRK + i_I1.to(tl.int64) * step + at_1K, mask=is_model_I1 & is_negative_1K, other=0.0)
    if not RAW:
        margin_I1 = tl.load(margins_n + i_I1, mask=is_model_I1, other=0.0)
        value_IK = tl.load(temperatures_n + i_I1, mask=is_model_I1, other=0.0) * (margin_I1 + value_IK)
    return value_IK


@triton.jit
def _softmax(exponent_IK, keep_IK):
    """Largest exponent and sum of exponentials [BI, 1] of what is kept; (-1e30, 0) of nothing."""
    top_I1 = tl.max(tl.where(keep_IK, exponent_IK, -1e30), 1, keep_dims=True)
    return top_I1, tl.sum(_power(exponent_IK, top_I1, keep_IK), 1, keep_dims=True)


@triton.jit
def _power(exponent_IK, top_I1, keep_IK):
    return tl.exp(tl.where(keep_IK, exponent_IK - top_I1, float("-inf")))


@triton.jit
def _softmax_parts(
    scores_nRK, keep_RK, margins_n, temperatures_n, evidence_n, w2_1, softmax_2nR, n, R, K,
    RAW: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write a positive's largest exponent and sum of exponentials for `BI` sub-models."""
    r = (tl.program_id(0) // tl.cdiv(n, BI)).to(tl.int64)
    i_I1 = tl.program_id(0) % tl.cdiv(n, BI) * BI + tl.arange(0, BI)[:, None]
    k_1K = tl.arange(0, BK)[None, :]
    at_1K = r * K + k_1K
    keep_1K = tl.load(keep_RK + at_1K, mask=k_1K < K, other=0) != 0
    source_I1 = tl.load(evidence_n + i_I1, mask=i_I1 < n, other=-1)
    evidence_IK = _load(scores_nRK, margins_n, temperatures_n, source_I1, source_I1 >= 0, at_1K, k_1K < K, R * K, RAW)
    top_I1, total_I1 = _softmax(tl.load(w2_1) * evidence_IK, keep_1K)
    tl.store(softmax_2nR + i_I1 * R + r, top_I1, mask=i_I1 < n)
    tl.store(softmax_2nR + (n + i_I1) * R + r, total_I1, mask=i_I1 < n)


@triton.jit
def _negative_terms(
    scores_nRK, keep_RK, margins_n, temperatures_n, evidence_n, w2_1, softmax_2n, hard_n, mutual_n, gradient_nRK,
    sums_5nR, n, R, K,
    BOTH: tl.constexpr, RAW: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write a positive's losses and gradient for `BI` sub-models.

    The sums over its negatives: weight x loss, weight x evidence x (loss - mean loss), weight x evidence, weight, and
    mutual loss.
    """
    r = (tl.program_id(0) // tl.cdiv(n, BI)).to(tl.int64)
    i_I1 = tl.program_id(0) % tl.cdiv(n, BI) * BI + tl.arange(0, BI)[:, None]
    k_1K = tl.arange(0, BK)[None, :]
    at_1K = r * K + k_1K
    in_1K = k_1K < K
    step = R * K
    logit_IK = _load(scores_nRK, margins_n, temperatures_n, i_I1, i_I1 < n, at_1K, in_1K, step, False)

    # softplus and its slope, without overflow
    power_IK = tl.exp(-tl.abs(logit_IK))
    loss_IK = tl.maximum(logit_IK, 0.0) + _log1p(power_IK)
    slope_IK = tl.where(logit_IK > 0, 1.0, power_IK) / (1 + power_IK)
    source_I1 = tl.load(evidence_n + i_I1, mask=i_I1 < n, other=-1)
    evidence_IK = _load(scores_nRK, margins_n, temperatures_n, source_I1, source_I1 >= 0, at_1K, in_1K, step, RAW)
    exponent_IK = tl.load(w2_1) * evidence_IK
    keep_1K = tl.load(keep_RK + at_1K, mask=in_1K, other=0) != 0
    if softmax_2n is None:
        top_I1, total_I1 = _softmax(exponent_IK, keep_1K)
    else:
        top_I1 = tl.load(softmax_2n + i_I1, mask=i_I1 < n, other=0.0)
        total_I1 = tl.load(softmax_2n + n + i_I1, mask=i_I1 < n, other=1.0)
    weight_IK = _power(exponent_IK, top_I1, keep_1K) / tl.where(total_I1 == 0, 1.0, total_I1)
    hard_I1 = tl.sum(weight_IK * loss_IK, 1, keep_dims=True)
    weight_I1 = tl.sum(weight_IK, 1, keep_dims=True)
    mean_I1 = hard_I1 / tl.where(weight_I1 == 0, 1.0, weight_I1)
    weighed_IK = weight_IK * evidence_IK

    # neighbours: each sub-model learns from the one above, and, both ways, from the one below
    has_below_I1, has_above_I1 = (i_I1 > 0) & (i_I1 < n), i_I1 < n - 1
    below_IK = _load(scores_nRK, margins_n, temperatures_n, i_I1 - 1, has_below_I1, at_1K, in_1K, step, False)
    above_IK = _load(scores_nRK, margins_n, temperatures_n, i_I1 + 1, has_above_I1, at_1K, in_1K, step, False)
    gap_IK = tl.abs(below_IK - logit_IK)
    mutual_IK = tl.where(in_1K, tl.where(gap_IK <= 1, 0.5 * gap_IK * gap_IK, gap_IK - 0.5), 0.0)
    gradient_IK = tl.load(hard_n + i_I1, mask=i_I1 < n, other=0.0) * weight_IK * slope_IK
    gradient_IK += _pull(tl.load(mutual_n + i_I1 + 1, mask=has_above_I1, other=0.0), logit_IK - above_IK)
    if BOTH:
        gradient_IK -= _pull(tl.load(mutual_n + i_I1, mask=i_I1 < n, other=0.0), below_IK - logit_IK)
    gradient_IK *= tl.load(temperatures_n + i_I1, mask=i_I1 < n, other=0.0)
    tl.store(gradient_nRK + i_I1.to(tl.int64) * step + at_1K, gradient_IK, mask=(i_I1 < n) & in_1K)

    sum_I1 = sums_5nR + i_I1 * R + r
    tl.store(sum_I1, hard_I1, mask=i_I1 < n)
    tl.store(sum_I1 + n * R, tl.sum(weighed_IK * (loss_IK - mean_I1), 1, keep_dims=True), mask=i_I1 < n)
    tl.store(sum_I1 + 2 * n * R, tl.sum(weighed_IK, 1, keep_dims=True), mask=i_I1 < n)
    tl.store(sum_I1 + 3 * n * R, weight_I1, mask=i_I1 < n)
    tl.store(sum_I1 + 4 * n * R, tl.sum(mutual_IK, 1, keep_dims=True), mask=i_I1 < n)


@triton.jit
def _pull(weight, difference):
    """Weighted slope of the Huber loss (delta 1); 0 between neighbours that do not learn from each other."""
    slope = tl.where(difference > 1, 1.0, tl.where(difference < -1, -1.0, difference))
    return tl.where(weight == 0, 0.0, weight * slope)


@triton.jit
def _log1p(x):
    """log(1 + x), exact where 1 + x rounds: the quotient undoes the rounding."""
    rounded = 1 + x
    return tl.where(rounded == 1, x, tl.log(rounded) * x / (rounded - 1))
