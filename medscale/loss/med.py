"""MED: mutual learning (equation 2), evolutionary improvement (3-5), dynamic loss weight (6), balance of sizes.

All functions take scores or logits sub-model first, smallest sub-model first. The paper leaves several things
open, and its letter is fragile; what is done instead, and why, stands with each function.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from medscale.workers import ALONE, Workers

__all__ = [
    "ScalingParameters",
    "binary_divergence",
    "dynamic_weights",
    "mutual_divergence",
    "mutual_huber",
    "negative_weights",
    "positive_weights",
    "size_balance",
]

_FAR = -1e30


class ScalingParameters(torch.nn.Module):
    """w1, w2, w3 of equations 3, 4 and 6: constants, or trained under a log-barrier.

    Plain minimisation drives all three the wrong way (w3 -> -inf; w1 and w2 below 0, towards the easiest
    triples), so `barrier() = -strength * (log w1 + log w2 + log w3)` joins the loss and keeps them positive.
    """

    #: trained values never fall below this
    FLOOR = 1e-3

    def __init__(self, w1: float, w2: float, w3: float, *, learnable: bool, barrier: float) -> None:
        super().__init__()
        self.values = torch.nn.Parameter(torch.tensor([w1, w2, w3]), requires_grad=learnable)
        self.strength = barrier

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return w1, w2, w3."""
        w1, w2, w3 = self.values.unbind()
        return w1, w2, w3

    def barrier(self) -> Tensor:
        """Return what keeps trained values positive; 0 for constants."""
        return -self.strength * self.values.log().sum() if self.values.requires_grad else self.values.new_zeros(())

    def clamp(self) -> None:
        """Undo a step across the barrier."""
        with torch.no_grad():
            self.values.clamp_(min=self.FLOOR)


def positive_weights(evidence_nB: Tensor, w1: Tensor, *, form: str, workers: Workers = ALONE) -> Tensor:
    """Weights [n, B] of positives, summing to 1 over the batch of all workers for each sub-model (equation 3).

    `evidence_nB` is what the weight of sub-model i's positives depends on. Form `paper`: raw scores s of a
    distance, always below 0, weight exp(w1 / s). Form `bounded`: probabilities of truth p in [0, 1], weight
    exp(w1 (1 - p)); it keeps the stated monotonicity for every scorer, where 1 / s blows up as s crosses 0.
    The evidence is detached: weights steer the loss, no gradient flows through them into the scores.
    """
    evidence_nB = evidence_nB.detach()
    exponent = w1 / evidence_nB.clamp(max=-1e-6) if form == "paper" else w1 * (1 - evidence_nB)
    return _softmax(exponent, workers)


def negative_weights(
    evidence_nXPK: Tensor, w2: Tensor, keep_XPK: Tensor | None, *, over: str, workers: Workers = ALONE
) -> Tensor:
    """Weights [n, X, P, K] of negatives, softmax of w2 x evidence (equation 4), summing to 1 per sub-model.

    Over "positive": within each positive's K negatives, every positive counting the same (as self-adversarial
    sampling does). Over "batch": one softmax over all negatives of all workers, the letter of the paper.
    Candidates that `keep_XPK` marks False weigh 0.
    """
    exponent_nXPK = w2 * evidence_nXPK.detach()
    if keep_XPK is not None:
        exponent_nXPK = exponent_nXPK.masked_fill(~keep_XPK, _FAR)
    if over == "batch":
        weights = _softmax(exponent_nXPK.flatten(1), workers).view_as(exponent_nXPK)
    else:
        weights = torch.softmax(exponent_nXPK, -1) / max(1, exponent_nXPK.shape[1] * exponent_nXPK.shape[2])
    return weights if keep_XPK is None else weights * keep_XPK


def mutual_huber(smaller_pT: Tensor, larger_pT: Tensor) -> Tensor:
    """Mutual learning between p pairs of neighbours on T triples [p, T]: Huber (delta 1) (equation 2).

    The paper takes the sum; `Objective` makes it a mean over all triples of a step, which stays comparable with the
    other terms, whose weights sum to 1. Gradient flows into whatever is not detached: both ways, or, with a detached
    `larger_pT`, the larger teaches the smaller.
    """
    return F.huber_loss(smaller_pT, larger_pT, reduction="none", delta=1.0)


def binary_divergence(smaller_pT: Tensor, larger_pT: Tensor, *, both: bool) -> Tensor:
    """KL divergence of the larger one's probability of truth from the smaller one's, of T triples [p, T].

    What Hinton et al. (2015) compare, for a model whose output is true or false; takes logits. Both ways adds that of
    the smaller from the larger, each with the other side as a detached teacher.
    """
    loss_pT = _binary_divergence(larger_pT.detach(), smaller_pT)
    return loss_pT + _binary_divergence(smaller_pT.detach(), larger_pT) if both else loss_pT


def mutual_divergence(log_small_QM: Tensor, log_large_QM: Tensor, *, both: bool) -> Tensor:
    """Mutual learning for softmax losses: KL(large || small), mean over queries; a scalar.

    Both ways adds KL(small || large), each with the other side as a detached teacher.
    """
    loss = _divergence(log_large_QM.detach(), log_small_QM)
    return loss + _divergence(log_small_QM.detach(), log_large_QM) if both else loss


def dynamic_weights(dims: Tensor, w3: Tensor) -> Tensor:
    """Return exp(w3 d_i / d_n), the weight [n] of each sub-model's own loss (equation 6)."""
    return torch.exp(w3 * dims / dims[-1])


def size_balance(dims: Tensor, exponent: float) -> Tensor:
    """Return (d_1 / d_i)^exponent, the weight [n] of all losses of each sub-model; not in the paper.

    With 64 sizes in even steps, 63 of 64 losses pull the smallest sub-model's columns where larger ones want them. By
    exponent 2 all others together weigh less on them than its own. An optimizer that divides by the size of the
    gradient, row by row of a table, makes up for this between tables, not within one.
    """
    return (dims[0] / dims) ** exponent


def _softmax(exponent_nB: Tensor, workers: Workers) -> Tensor:
    """Softmax over the batches of all workers, differentiable."""
    if workers.size == 1:
        return torch.softmax(exponent_nB, -1)
    lowest_n1 = exponent_nB.new_full((len(exponent_nB), 1), -torch.inf)
    top_n = workers.largest(torch.cat([exponent_nB.detach(), lowest_n1], 1).amax(1))
    parts_nB = (exponent_nB - top_n.unsqueeze(1)).exp()
    return parts_nB / cast(Tensor, _SumOver.apply(parts_nB.sum(1), workers)).unsqueeze(1)  # type: ignore[no-untyped-call]


class _SumOver(torch.autograd.Function):
    """The sum over workers. Each one's number counts in every other one's loss, so its gradient is a sum as well."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, workers: Workers) -> Tensor:
        ctx.workers = workers
        return workers.sum(numbers.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.workers.sum(gradients[0].clone()), None


def _binary_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    return F.softplus(student) - F.softplus(teacher) + torch.sigmoid(teacher) * (teacher - student)


def _divergence(teacher_QM: Tensor, student_QM: Tensor) -> Tensor:
    return F.kl_div(student_QM, teacher_QM, reduction="sum", log_target=True) / max(1, len(student_QM))
