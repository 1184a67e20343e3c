"""The negatives' part of a step's binary loss, for all sub-models: what it takes, and its plain form.

Loss and gradient come together, because one pass over the scores gives both: the gradient's factors (dynamic loss
weight, weight of mutual learning) are known before the scores are. `cpu_negatives` and `triton_negatives` are
the fast twins.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medscale.loss.bce import Logits
from medscale.loss.med import negative_weights

__all__ = ["NegativeConstants", "NegativeTerms", "negative_terms"]


@dataclass(frozen=True)
class NegativeConstants:
    """What stays the same from step to step."""

    logits: Logits
    #: per sub-model: whose scores weigh its negatives (equation 4); -1: all weigh the same
    evidence: tuple[int, ...]
    #: per sub-model: whether it teaches, or learns from, the one below (equation 2)
    taught: tuple[bool, ...]
    #: evidence is the score s, not the logit z
    raw: bool
    #: weights sum to 1 over all negatives, not for each positive
    over_batch: bool
    #: the larger of two neighbours learns too, instead of being a detached teacher
    both: bool


@dataclass(frozen=True)
class NegativeTerms:
    """Losses and the gradient of their weighted sum."""

    #: [n]: sum over negatives of weight x softplus(z) (equation 5)
    hard_n: Tensor
    #: [n]: sum over negatives of Huber(z_(i-1) - z_i), 0 where nothing is taught (equation 2)
    mutual_n: Tensor
    #: scalar: derivative of the weighted sum by w2
    w2_slope: Tensor
    #: [n, X, P, K]: derivative of the weighted sum by the scores
    gradient_nXPK: Tensor


def negative_terms(
    constants: NegativeConstants, w2: float, scores_nXPK: Tensor, keep_XPK: Tensor, hard_weights_n: Tensor,
    mutual_weights_n: Tensor,
) -> NegativeTerms:  # fmt: skip
    """Return the losses of scored negatives, and d/ds of sum_i hard_weights_i hard_i + mutual_weights_i mutual_i.

    Negatives that `keep_XPK` marks False have no hard loss; mutual learning compares all. Weights are detached
    from the scores (they steer the loss), not from w2.
    """
    scores = scores_nXPK.detach().requires_grad_()
    w2_leaf = torch.tensor(w2, dtype=scores.dtype, device=scores.device, requires_grad=True)
    with torch.enable_grad():
        logits = constants.logits(scores)
        values = scores if constants.raw else logits
        over = "batch" if constants.over_batch else "positive"
        evidence = torch.stack([torch.zeros_like(values[0]) if i < 0 else values[i] for i in constants.evidence])
        weights = negative_weights(evidence, w2_leaf, keep_XPK, over=over)
        hard_n = (weights * F.softplus(logits)).flatten(1).sum(1)
        mutual = [hard_n.new_zeros(())]
        for i in range(1, len(logits)):
            teacher = logits[i] if constants.both else logits[i].detach()
            loss = F.huber_loss(logits[i - 1], teacher, reduction="sum", delta=1.0)
            mutual.append(loss if constants.taught[i] else torch.zeros_like(loss))
        mutual_n = torch.stack(mutual)
        total = (hard_weights_n * hard_n).sum() + (mutual_weights_n * mutual_n).sum()
    gradient, slope = torch.autograd.grad(total, [scores, w2_leaf])
    return NegativeTerms(hard_n.detach(), mutual_n.detach(), slope, gradient)
