"""Losses of scored positives and the loss's derivatives by their scores, on a CPU, as MED is by default.

Forty small operations of torch cost more than their arithmetic. Positives are summed up in blocks of a fixed size, so
that the result does not depend on how many threads there are. `cpp/positives.cpp` has the arithmetic.
"""

import torch
from torch import Tensor

from medscale.loss.negatives import BinaryConstants
from medscale.loss.positives import PositiveTerms
from medscale.model.kernels.library import arguments, function, run_parts
from medscale.workers import ALONE, Workers

__all__ = ["applies", "positive_terms"]

#: positives summed up by one thread
_BLOCK = 64
#: weights are e^(-w1 p) as they are, which neither overflow nor vanish up to here
_SHARPEST = 20.0


def applies(constants: BinaryConstants, w1: float) -> bool:
    """Tell, on all workers alike, whether this is MED by default: own evidence, fixed weights, Huber, even labels."""
    own = constants.evidence == tuple(range(len(constants.evidence)))
    special = constants.raw or constants.weights_learn or constants.divergence or constants.evaluated
    return own and not special and 0 <= w1 <= _SHARPEST


def positive_terms(
    constants: BinaryConstants, w1: float, scores_nR: Tensor, hard_weights_n: Tensor, mutual_weights_n: Tensor,
    workers: Workers = ALONE,
) -> PositiveTerms:  # fmt: skip
    """Return the losses of scored positives, and d/ds of sum_i hard_weights_i hard_i + mutual_weights_i mutual_i.

    Twin where it applies: `positives.positive_terms`.
    """
    n, num_positives = scores_nR.shape
    dtype, blocks = scores_nR.dtype, -(-num_positives // _BLOCK)
    scores_Rn = scores_nR.detach().T.contiguous()
    a_n = constants.logits.temperatures.to(dtype)
    taught_n = torch.tensor(constants.taught, dtype=dtype)
    taught_n[0] = 0  # there is none below
    below_n = a_n * taught_n * mutual_weights_n.detach()
    above_n = torch.zeros_like(below_n)
    above_n[:-1] = (a_n[:-1] * taught_n[1:]) * mutual_weights_n.detach()[1:]
    pull_n, totals_Bn, hard_Bn, mutual_Bn = torch.zeros_like(a_n), *scores_Rn.new_empty((3, blocks, n)).unbind()
    weights_Rn, gradient_Rn = torch.empty_like(scores_Rn), torch.empty_like(scores_Rn)
    # struct Positives; the list keeps the tensors alive
    fields: list[Tensor | float | None] = [
        n, num_positives, _BLOCK, float(w1), a_n, a_n * constants.logits.margins.to(dtype), pull_n,
        -below_n if constants.both else torch.zeros_like(a_n), above_n, scores_Rn, weights_Rn, totals_Bn, gradient_Rn,
        hard_Bn, mutual_Bn,
    ]  # fmt: skip
    struct = arguments(*fields)
    run_parts(function("weigh_positives", dtype), blocks, struct)
    # 0 where no worker has a positive
    total_n = workers.sum(totals_Bn.sum(0)).clamp(min=torch.finfo(dtype).tiny)
    pull_n.copy_(-a_n * hard_weights_n.detach() / total_n)
    run_parts(function("differentiate_positives", dtype), blocks, struct)
    mutual_n = mutual_Bn.sum(0).masked_fill(taught_n == 0, 0)
    return PositiveTerms(hard_Bn.sum(0) / total_n, mutual_n, a_n.new_zeros(()), gradient_Rn.T)
