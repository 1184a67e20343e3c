"""The negatives' part of a step's binary loss, for all sub-models: what it takes, and its plain form.

Loss and gradient come together, because one pass over the scores gives both: the gradient's factors (dynamic loss
weight, weight of mutual learning) are known before the scores are. `cpu_corruptions` and `triton_negatives` are
the fast twins.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medscale.loss.bce import Logits
from medscale.loss.med import binary_divergence, mutual_huber, negative_weights
from medscale.workers import ALONE, Workers

__all__ = [
    "BinaryConstants",
    "CorruptionTerms",
    "NegativeTerms",
    "label_trust",
    "mutual_sums",
    "negative_losses",
    "negative_terms",
]  # fmt: skip


@dataclass(frozen=True)
class BinaryConstants:
    """What stays the same from step to step, of positives and negatives."""

    logits: Logits
    #: per sub-model: whose scores weigh its triples (equations 3 and 4); -1: all weigh the same
    evidence: tuple[int, ...]
    #: per sub-model: whether it teaches, or learns from, the one below (equation 2)
    taught: tuple[bool, ...]
    #: the letter of the paper: evidence is the score s, not the logit z (negatives) or its sigmoid (positives)
    raw: bool
    #: weights sum to 1 over all negatives, not for each positive
    over_batch: bool
    #: the larger of two neighbours learns too, instead of being a detached teacher
    both: bool
    #: whether derivatives by w1 and w2 are wanted
    weights_learn: bool = False
    #: neighbours compare probabilities of truth by their KL divergence, instead of logits by Huber's loss
    divergence: bool = False
    #: where the larger of two neighbours is right, the smaller one learns more from it and less from the label
    evaluated: bool = False
    #: levels at the end whose columns stay as they are: kernels may leave out their gradients
    num_kept: int = 0


@dataclass(frozen=True)
class NegativeTerms:
    """Losses and the gradient of their weighted sum."""

    #: [n]: sum over negatives of weight x softplus(z) (equation 5)
    hard_n: Tensor
    #: [n]: sum over negatives of Huber(z_(i-1) - z_i), or the divergence; 0 where nothing is taught (equation 2)
    mutual_n: Tensor
    #: scalar: derivative of the weighted sum by w2
    w2_slope: Tensor
    #: [n, X, P, K]: derivative of the weighted sum by the scores
    gradient_nXPK: Tensor


@dataclass(frozen=True)
class CorruptionTerms:
    """Losses of chunks of queries against their negatives, and the gradients of their weighted sum."""

    #: [n], [n], scalar: as in `NegativeTerms`
    hard_n: Tensor
    mutual_n: Tensor
    w2_slope: Tensor
    #: [X, P, C]
    query_gradient_XPC: Tensor
    #: [X, P, C], where the scorer scales its candidates
    scale_gradient_XPC: Tensor | None


def negative_losses(
    constants: BinaryConstants, w2: Tensor, scores_nXPK: Tensor, keep_XPK: Tensor, workers: Workers = ALONE
) -> tuple[Tensor, Tensor]:
    """Return (hard [n], mutual [n]) of scored negatives: the plain form, for autograd.

    Negatives that `keep_XPK` marks False have no hard loss; mutual learning compares all. Weights are detached
    from the scores (they steer the loss), not from w2.
    """
    logits = constants.logits(scores_nXPK)
    values = scores_nXPK if constants.raw else logits
    evidence = torch.stack([torch.zeros_like(values[0]) if i < 0 else values[i] for i in constants.evidence])
    over = "batch" if constants.over_batch else "positive"
    weights = negative_weights(evidence, w2, keep_XPK, over=over, workers=workers)
    losses = weights * F.softplus(logits)
    if constants.evaluated:
        losses = losses * label_trust(constants, -logits.flatten(1)).view_as(losses)
    return losses.flatten(1).sum(1), mutual_sums(constants, logits.flatten(1), -logits.flatten(1))


def mutual_sums(constants: BinaryConstants, logits_nT: Tensor, right_nT: Tensor) -> Tensor:
    """Return, per sub-model [n], the sum over T triples of the loss between it and the one below, where taught.

    `right_nT`: the logits of being right about a triple, +z of positives and -z of negatives.
    """
    smaller_pT, larger_pT = logits_nT[:-1], logits_nT[1:]
    if constants.divergence:
        losses_pT = binary_divergence(smaller_pT, larger_pT, both=constants.both)
    else:
        losses_pT = mutual_huber(smaller_pT, larger_pT if constants.both else larger_pT.detach())
    if constants.evaluated:
        losses_pT = losses_pT * torch.sigmoid(right_nT[1:].detach())
    taught_p = torch.tensor(constants.taught[1:], device=losses_pT.device)
    return torch.cat([losses_pT.new_zeros(1), losses_pT.sum(1) * taught_p])


def label_trust(constants: BinaryConstants, right_nT: Tensor) -> Tensor:
    """Return how much each sub-model's own loss counts, [n, T]: what its teacher is not right about.

    The soft label evaluation of DualDE (Zhu et al., 2022): a triple's soft label weighs as much as the teacher's
    probability of being right, its hard label the rest. A sub-model that nobody teaches has its labels alone.
    """
    doubts_pT = torch.sigmoid(-right_nT[1:].detach())
    taught_p1 = torch.tensor(constants.taught[1:], dtype=torch.bool, device=right_nT.device).unsqueeze(1)
    return torch.cat([torch.where(taught_p1, doubts_pT, 1.0), torch.ones_like(right_nT[:1])])


def negative_terms(
    constants: BinaryConstants, w2: float, scores_nXPK: Tensor, keep_XPK: Tensor, hard_weights_n: Tensor,
    mutual_weights_n: Tensor,
) -> NegativeTerms:  # fmt: skip
    """Return the losses of scored negatives, and d/ds of sum_i hard_weights_i hard_i + mutual_weights_i mutual_i."""
    scores = scores_nXPK.detach().requires_grad_()
    w2_leaf = torch.tensor(w2, dtype=scores.dtype, device=scores.device, requires_grad=True)
    with torch.enable_grad():
        hard_n, mutual_n = negative_losses(constants, w2_leaf, scores, keep_XPK)
        total = (hard_weights_n * hard_n).sum() + (mutual_weights_n * mutual_n).sum()
    gradient, slope = torch.autograd.grad(total, [scores, w2_leaf])
    return NegativeTerms(hard_n.detach(), mutual_n.detach(), slope, gradient)
