"""Cross-entropy over candidates, grouped by query: one row of scores serves all answers of a query."""

import torch
from torch import Tensor

__all__ = ["log_probabilities"]


def log_probabilities(scores_QM: Tensor, bias_M: Tensor | None) -> Tensor:
    """Return log p(candidate | query) [Q, M].

    `bias_M` corrects for sampling: log of how many entities a sampled candidate stands for, so that the
    partition function is estimated without bias. A bias shifts no entity's own score in evaluation.
    """
    return torch.log_softmax(scores_QM if bias_M is None else scores_QM + bias_M, -1)
