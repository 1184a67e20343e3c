"""Scores, losses and gradients of a step's negatives on a GPU: one kernel after the other, as memory there is fast."""

from torch import Tensor

from medscale.loss.negatives import BinaryConstants, CorruptionTerms
from medscale.loss.triton_negatives import negative_terms
from medscale.model.kernels.levels import Levels
from medscale.model.kernels.triton_scores import chunk_gradients, chunk_scores
from medscale.workers import ALONE, Workers

__all__ = ["corruption_terms"]


def corruption_terms(
    levels: Levels, constants: BinaryConstants, w2: float, query_XPC: Tensor, rows_UC: Tensor,
    candidates_XK: Tensor, keep_XPK: Tensor, scale_XPC: Tensor | None, hard_weights_n: Tensor,
    mutual_weights_n: Tensor, row_gradients_UC: Tensor, workers: Workers = ALONE, *, losses: bool = True,
) -> CorruptionTerms:  # fmt: skip
    """Return the losses of all candidates as negatives, and the gradients of their weighted sum.

    The candidates' own gradients are added to `row_gradients_UC`. Here `losses` are taken in any case.
    """
    del losses
    scores_nXPK = chunk_scores(levels, query_XPC, rows_UC, candidates_XK, scale_XPC)
    terms = negative_terms(constants, w2, scores_nXPK, keep_XPK, hard_weights_n, mutual_weights_n, workers)
    gradients = chunk_gradients(
        levels, terms.gradient_nXPK, scores_nXPK, query_XPC, rows_UC, candidates_XK, scale_XPC, row_gradients_UC
    )
    return CorruptionTerms(terms.hard_n, terms.mutual_n, terms.w2_slope, *gradients)
