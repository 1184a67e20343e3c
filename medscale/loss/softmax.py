"""Cross-entropy over candidates, grouped by query: one row of scores serves all answers of a query."""

from typing import Any, cast

import torch
from torch import Tensor

from medscale.batches.queries import Targets

__all__ = ["log_probabilities", "target_log_probabilities"]


def log_probabilities(scores_QM: Tensor, bias_M: Tensor | None) -> Tensor:
    """Return log p(candidate | query) [Q, M].

    `bias_M` corrects for sampling: log of how many entities a sampled candidate stands for, so that the
    partition function is estimated without bias. A bias shifts no entity's own score in evaluation.
    """
    return torch.log_softmax(scores_QM if bias_M is None else scores_QM + bias_M, -1)


def target_log_probabilities(scores_QM: Tensor, bias_M: Tensor | None, targets: Targets) -> Tensor:
    """Return log p(target | query) [T].

    Other answers of the same query stay in the partition function, as they would for single triples.
    """
    bias = scores_QM.new_zeros(()) if bias_M is None else bias_M
    logs_T = _TargetLogProbabilities.apply(scores_QM, bias, targets.query_T, targets.candidate_T)  # type: ignore[no-untyped-call]
    return cast(Tensor, logs_T)


class _TargetLogProbabilities(torch.autograd.Function):
    """log softmax at the targets; keeps one [Q, M] tensor and turns it into the gradient in place.

    Half the passes over memory of `log_softmax` and an index, which is the twin that tests compare it with.
    """

    @staticmethod
    def forward(ctx: Any, scores_QM: Tensor, bias_M: Tensor, query_T: Tensor, candidate_T: Tensor) -> Tensor:
        exponential_QM = scores_QM + bias_M
        target_T = exponential_QM[query_T, candidate_T]
        largest_Q = exponential_QM.amax(1)
        exponential_QM.sub_(largest_Q.unsqueeze(1)).exp_()
        sum_Q = exponential_QM.sum(1)
        ctx.save_for_backward(exponential_QM, sum_Q, query_T, candidate_T)
        return target_T - (largest_Q + sum_Q.log())[query_T]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient_T,) = gradients
        exponential_QM, sum_Q, query_T, candidate_T = ctx.saved_tensors
        gradient_Q = torch.zeros_like(sum_Q).index_add_(0, query_T, gradient_T)
        gradient_QM = exponential_QM.mul_(-(gradient_Q / sum_Q).unsqueeze(1))
        gradient_QM.index_put_((query_T, candidate_T), gradient_T, accumulate=True)
        return gradient_QM, None, None, None
