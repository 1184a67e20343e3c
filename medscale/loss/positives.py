"""The positives' part of a step's binary loss, for all sub-models: plain, and with its gradient taken by hand.

The gradient by hand is for the same reason as with negatives: what it is multiplied by is known beforehand, and a
graph of autograd over forty small operations costs more than they do.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medscale.loss.med import positive_weights
from medscale.loss.negatives import BinaryConstants, label_trust, mutual_sums
from medscale.workers import ALONE, Workers

__all__ = ["PositiveTerms", "positive_losses", "positive_terms"]


@dataclass(frozen=True)
class PositiveTerms:
    """Losses and the gradient of their weighted sum."""

    #: [n]: sum over positives of weight x softplus(-z) (equation 1)
    hard_n: Tensor
    #: [n]: sum over positives of Huber(z_(i-1) - z_i), or the divergence; 0 where nothing is taught (equation 2)
    mutual_n: Tensor
    #: scalar: derivative of the weighted sum by w1
    w1_slope: Tensor
    #: [n, R]: derivative of the weighted sum by the scores
    gradient_nR: Tensor


def positive_losses(
    constants: BinaryConstants, w1: Tensor, scores_nR: Tensor, workers: Workers = ALONE
) -> tuple[Tensor, Tensor]:
    """Return (hard [n], mutual [n]) of scored positives: the plain form, for autograd."""
    logits_nR = constants.logits(scores_nR)
    evidence_nR = _evidence(constants, scores_nR, logits_nR)
    weights_nR = positive_weights(evidence_nR, w1, form=_form(constants), workers=workers)
    if constants.evaluated:
        weights_nR = weights_nR * label_trust(constants, logits_nR)
    return -(weights_nR * F.logsigmoid(logits_nR)).sum(1), mutual_sums(constants, logits_nR, logits_nR)


def positive_terms(
    constants: BinaryConstants, w1: Tensor, scores_nR: Tensor, hard_weights_n: Tensor, mutual_weights_n: Tensor,
    workers: Workers = ALONE,
) -> PositiveTerms:  # fmt: skip
    """Return the losses of scored positives, and d/ds of sum_i hard_weights_i hard_i + mutual_weights_i mutual_i.

    Plain twin: `positive_losses`, then autograd.
    """
    with torch.no_grad():
        logits_nR, temperatures_n1 = constants.logits(scores_nR), constants.logits.temperatures.unsqueeze(1)
        evidence_nR = _evidence(constants, scores_nR, logits_nR)
        weights_nR = positive_weights(evidence_nR, w1, form=_form(constants), workers=workers)
        assert not (constants.evaluated and constants.weights_learn)
        if constants.evaluated:
            weights_nR = weights_nR * label_trust(constants, logits_nR)
        losses_nR = F.softplus(-logits_nR)
        hard_n = (weights_nR * losses_nR).sum(1)
        w1_slope = hard_n.new_zeros(())
        if constants.weights_learn:
            slopes_nR = 1 / evidence_nR.clamp(max=-1e-6) if constants.raw else 1 - evidence_nR
            slopes_nR = slopes_nR - workers.sum((weights_nR * slopes_nR).sum(1, keepdim=True))
            w1_slope = (hard_weights_n.unsqueeze(1) * weights_nR * slopes_nR * losses_nR).sum()
        gradient_nR = weights_nR.mul_(torch.sigmoid(-logits_nR)).mul_(-hard_weights_n.unsqueeze(1))
        taught_n = torch.tensor(constants.taught, dtype=scores_nR.dtype, device=scores_nR.device)
        pulls_mR = _pulls(constants, logits_nR) * (mutual_weights_n * taught_n)[1:].unsqueeze(1)
        gradient_nR[:-1] += pulls_mR
        if constants.both:
            gradient_nR[1:] -= pulls_mR
        mutual_n = mutual_sums(constants, logits_nR, logits_nR)
        return PositiveTerms(hard_n, mutual_n, w1_slope, gradient_nR.mul_(temperatures_n1))


def _pulls(constants: BinaryConstants, logits_nR: Tensor) -> Tensor:
    """Return the derivative of neighbours' loss by the smaller one's logits [n - 1, R]."""
    smaller_mR, larger_mR = logits_nR[:-1], logits_nR[1:]
    if constants.divergence:
        pulls_mR = torch.sigmoid(smaller_mR) - torch.sigmoid(larger_mR)
    else:
        pulls_mR = (smaller_mR - larger_mR).clamp(-1, 1)
    return pulls_mR.mul_(torch.sigmoid(larger_mR)) if constants.evaluated else pulls_mR


def _form(constants: BinaryConstants) -> str:
    return "paper" if constants.raw else "bounded"


def _evidence(constants: BinaryConstants, scores_nR: Tensor, logits_nR: Tensor) -> Tensor:
    """Return what sub-models' weights depend on [n, R]: scores or probabilities of truth, own or the previous one's.

    Sub-models without evidence get the same for all positives, which weigh the same then.
    """
    values_nR = scores_nR.detach() if constants.raw else torch.sigmoid(logits_nR.detach())
    if constants.evidence == tuple(range(len(values_nR))):
        return values_nR
    chosen_nR = values_nR[[max(i, 0) for i in constants.evidence]]
    for i in (i for i, source in enumerate(constants.evidence) if source < 0):
        chosen_nR[i] = -1.0
    return chosen_nR
