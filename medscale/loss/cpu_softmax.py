"""Cross-entropy over candidates for several sub-models at once, on a CPU, as a node of autograd.

Products: one product of matrices per level, added to the damped sum so far; on the way back the derivatives by the
levels' own scores overwrite the scores, and two more products per level give the gradients. So every column is read
as often as one model alone would read it. `cpp/softmax.cpp` has what comes between the products.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from medscale.batches.queries import Targets
from medscale.model.kernels.library import arguments, function, run_parts
from medscale.model.prefix import PrefixScan
from medscale.model.rows import Rows

__all__ = ["Softmax", "product_log_probabilities", "score_log_probabilities"]


#: a product of matrices with fewer columns than this is faster as its transpose: with ten, seven to fifteen times
_NARROW = 48


@dataclass(frozen=True)
class Softmax:
    """What stays the same for the sub-models scored in a step."""

    scan: PrefixScan
    #: per scored sub-model: whether it teaches the one scored before it; the first never
    taught: tuple[bool, ...]
    #: and learns from it
    both: bool


def product_log_probabilities(
    softmax: Softmax, query_QC: Tensor, rows: Rows, bias_M: Tensor | None, targets: Targets
) -> tuple[Tensor, Tensor]:
    """Return (log p(target | query) [m, T], divergence from the one before [m]) of a product scorer.

    The candidates are all rows of the step, M = U; the divergence is a mean over queries, 0 where not taught.
    """
    results = _ProductSoftmax.apply(softmax, query_QC, rows.values_UC, rows, bias_M, targets)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor], results)


def score_log_probabilities(
    softmax: Softmax, scores_mQM: Tensor, bias_M: Tensor | None, targets: Targets
) -> tuple[Tensor, Tensor]:
    """Return the same, given the logits [m, Q, M]."""
    results = _ScoreSoftmax.apply(softmax, scores_mQM, bias_M, targets)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor], results)


class _ProductSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, softmax: Softmax, query_QC: Tensor, values_UC: Tensor, rows: Rows, bias_M: Tensor | None,
        targets: Targets,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        scan = softmax.scan
        weighted_QC = query_QC[:, : scan.num_columns] * scan.column_weights_C
        scores_mQM = query_QC.new_empty((len(scan.dims), len(query_QC), len(values_UC)))
        for m, (start, stop) in enumerate(_levels(scan)):
            level = (weighted_QC[:, start:stop], values_UC[:, start:stop].T)
            if m:
                torch.addmm(scores_mQM[m - 1], *level, beta=scan.carry_n[m], out=scores_mQM[m])
            else:
                torch.mm(*level, out=scores_mQM[m])
        ctx.rows, ctx.weighted_QC = rows, weighted_QC
        return _forward(ctx, softmax, scores_mQM, bias_M, targets)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        scan: PrefixScan = ctx.softmax.scan
        derivatives_mQM = _backward(ctx, scan.carry_n, *gradients)
        values_UC, gathered_UC = ctx.rows.values_UC.detach(), ctx.rows.gathered_UC
        query_gradient_QC = torch.empty_like(ctx.weighted_QC)
        for m, (start, stop) in enumerate(_levels(scan)):
            derivatives_QM, level = derivatives_mQM[m], slice(start, stop)
            if stop - start < _NARROW:
                query_gradient_QC[:, level] = torch.mm(values_UC[:, level].T, derivatives_QM.T).T
                gathered_UC[:, level] += torch.mm(ctx.weighted_QC[:, level].T, derivatives_QM).T
            else:
                torch.mm(derivatives_QM, values_UC[:, level], out=query_gradient_QC[:, level])
                gathered_UC[:, level].addmm_(derivatives_QM.T, ctx.weighted_QC[:, level])
        query_gradient_QC *= scan.column_weights_C
        beyond = values_UC.shape[1] - scan.num_columns
        return None, torch.nn.functional.pad(query_gradient_QC, (0, beyond)), None, None, None, None


class _ScoreSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, softmax: Softmax, scores_mQM: Tensor, bias_M: Tensor | None, targets: Targets
    ) -> tuple[Tensor, Tensor]:
        return _forward(ctx, softmax, scores_mQM.detach().clone(), bias_M, targets)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, _backward(ctx, (0.0,) * len(ctx.softmax.taught), *gradients), None, None


def _levels(scan: PrefixScan) -> list[tuple[int, int]]:
    """Return the columns [start, stop) that each scored sub-model adds to the one before."""
    ends = [dim * scan.scorer.unit_columns for dim in scan.dims]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _forward(
    ctx: Any, softmax: Softmax, scores_mQM: Tensor, bias_M: Tensor | None, targets: Targets
) -> tuple[Tensor, Tensor]:
    assert len(softmax.taught) <= 64, "as many as the kernel has room for"
    partition_mQ, divergence_mQ = torch.empty_like(scores_mQM[..., 0]), torch.empty_like(scores_mQM[..., 0])
    ctx.softmax, ctx.targets = softmax, targets
    ctx.bias_M = bias_M = None if bias_M is None else bias_M.to(scores_mQM.dtype)
    ctx.scores_mQM, ctx.partition_mQ = scores_mQM, partition_mQ
    _run("softmax_forward", ctx, divergence_mQ, None, None, None)
    log_mT = scores_mQM[:, targets.query_T, targets.candidate_T] - partition_mQ[:, targets.query_T]
    if bias_M is not None:
        log_mT += bias_M[targets.candidate_T]
    return log_mT, divergence_mQ.sum(1) / max(1, divergence_mQ.shape[1])


def _backward(ctx: Any, carry: tuple[float, ...], log_gradient_mT: Tensor, mutual_gradient_m: Tensor) -> Tensor:
    """Turn the scores, in place, into the loss's derivatives by each level's own scores."""
    targets: Targets = ctx.targets
    pull_mQ = torch.zeros_like(ctx.partition_mQ).index_add_(1, targets.query_T, log_gradient_mT)
    mutual_m = mutual_gradient_m / max(1, ctx.partition_mQ.shape[1])
    carry_m = mutual_m.new_tensor(carry)
    _run("softmax_backward", ctx, None, pull_mQ, mutual_m.contiguous(), carry_m)
    carried_T = torch.zeros_like(log_gradient_mT[0])
    for m in reversed(range(len(carry))):
        after = carry[m + 1] if m + 1 < len(carry) else 0.0
        carried_T = log_gradient_mT[m] + after * carried_T
        ctx.scores_mQM[m].index_put_((targets.query_T, targets.candidate_T), carried_T, accumulate=True)
    derivatives_mQM: Tensor = ctx.scores_mQM
    ctx.scores_mQM = None  # they are no scores any more: a second backward() must not take them for some
    return derivatives_mQM


def _run(
    name: str, ctx: Any, divergence_mQ: Tensor | None, pull_mQ: Tensor | None, mutual_m: Tensor | None,
    carry_m: Tensor | None,
) -> None:  # fmt: skip
    taught_m = torch.tensor(ctx.softmax.taught).long()
    # struct Softmax
    struct = arguments(
        *ctx.scores_mQM.shape, int(ctx.softmax.both), ctx.scores_mQM, ctx.bias_M, ctx.partition_mQ, taught_m,
        divergence_mQ, pull_mQ, mutual_m, carry_m,
    )  # fmt: skip
    run_parts(function(name, ctx.scores_mQM.dtype), ctx.scores_mQM.shape[1], struct)
