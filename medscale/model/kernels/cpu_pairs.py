"""Scores of one candidate for each query, and their gradients, on a CPU: a step's positives. And sums of rows."""

import torch
from torch import Tensor

from medscale.model.kernels.levels import Levels
from medscale.model.kernels.library import arguments, function, geometry_number, run_parts

__all__ = ["add_rows", "pair_gradients", "pair_scores"]

#: threads add to whole cache lines
_LINE = 16


def pair_scores(levels: Levels, query_RC: Tensor, target_RC: Tensor, scale_RC: Tensor | None = None) -> Tensor:
    """Return scores [n, R] of one candidate for each query."""
    scores_Rn = query_RC.new_empty((len(query_RC), levels.num_scored))
    _run("score_pairs", levels, levels.kappas, query_RC, target_RC, scale_RC, scores_Rn, None, None, None, None)
    return scores_Rn.T


def pair_gradients(
    levels: Levels, gradient_nR: Tensor, scores_nR: Tensor, query_RC: Tensor, target_RC: Tensor,
    scale_RC: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return the gradients of queries, of targets and of scales, given the loss's derivatives by the scores."""
    gradients = [query_RC.new_zeros(query_RC.shape) for _ in range(2 if scale_RC is None else 3)]
    scale_gradient_RC = None if scale_RC is None else gradients[2]
    _run(
        "differentiate_pairs", levels, levels.returns, query_RC, target_RC, scale_RC,
        scores_nR.detach().T.contiguous(), gradient_nR.T.contiguous(), *gradients[:2], scale_gradient_RC,
    )  # fmt: skip
    return gradients[0], gradients[1], scale_gradient_RC


def add_rows(values_RC: Tensor, positions_R: Tensor, rows_UC: Tensor) -> None:
    """Add each value to the row at its position, in order; positions may repeat."""
    values_RC, positions_R = values_RC.contiguous(), positions_R.contiguous()
    run_parts(
        function("add_rows", rows_UC.dtype), values_RC.shape[1], values_RC.data_ptr(), positions_R.data_ptr(),
        len(values_RC), values_RC.shape[1], rows_UC.data_ptr(), rows_UC.shape[1], multiple=_LINE,
    )  # fmt: skip


def _run(
    name: str, levels: Levels, carried: tuple[float, ...], query_RC: Tensor, target_RC: Tensor,
    scale_RC: Tensor | None, *rest: Tensor | None,
) -> None:  # fmt: skip
    assert levels.outputs == tuple(range(levels.num_scored)), "every level is a sub-model's here"
    dtype = query_RC.dtype
    # struct Pairs; the list keeps the tensors alive
    fields = [
        geometry_number(levels, scaled=scale_RC is not None), levels.num_scored, query_RC.shape[1],
        torch.tensor(levels.ends), torch.tensor(carried, dtype=dtype), query_RC.detach().contiguous(),
        target_RC.detach().contiguous(), None if scale_RC is None else scale_RC.detach().contiguous(), *rest,
    ]  # fmt: skip
    run_parts(function(name, dtype), len(query_RC), arguments(*fields))
