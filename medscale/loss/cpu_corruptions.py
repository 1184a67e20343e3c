"""Scores, losses and gradients of a step's negatives in one go, on a CPU: nothing of size [P, K, C], nor [n, P, K].

Threads share out chunks of positives. A chunk's candidates gather their gradient in tiles of the chunk's own;
after some chunks, threads share out the columns and add the tiles to the rows, in order. So no two threads meet on
a row, and the result does not depend on how many there are. `cpp/corruptions.cpp` has the arithmetic.
"""

import torch
from torch import Tensor

from medscale.loss.negatives import BinaryConstants, CorruptionTerms
from medscale.model.kernels.levels import Levels
from medscale.model.kernels.library import LANES, arguments, function, geometry_number, run_parts
from medscale.workers import ALONE, Workers

__all__ = ["corruption_terms"]

#: numbers in the tiles of gradients that wait to be added: they stay in the L3 cache
_WAITING = 1 << 21
#: threads add to whole cache lines
_LINE = 16


def corruption_terms(
    levels: Levels, constants: BinaryConstants, w2: float, query_XPC: Tensor, rows_UC: Tensor,
    candidates_XK: Tensor, keep_XPK: Tensor, scale_XPC: Tensor | None, hard_weights_n: Tensor,
    mutual_weights_n: Tensor, row_gradients_UC: Tensor, workers: Workers = ALONE, *, losses: bool = True,
) -> CorruptionTerms:  # fmt: skip
    """Return the losses of all candidates as negatives, and the gradients of their weighted sum.

    The candidates' own gradients are added to `row_gradients_UC`. Weights over the batch are over that of all workers;
    those for each positive know of its own negatives alone. Plain twin: `PrefixScan.scores`, then
    `negatives.negative_losses`, then autograd.
    """
    num_chunks, num_queries, _ = query_XPC.shape
    num_candidates, num_sub_models, num_columns = candidates_XK.shape[1], levels.num_scored, levels.num_columns
    assert levels.outputs == tuple(range(num_sub_models)), "every level is a sub-model's here"
    assert not (constants.evaluated and constants.weights_learn)
    dtype = query_XPC.dtype
    assert rows_UC.dtype == row_gradients_UC.dtype == dtype, (rows_UC.dtype, row_gradients_UC.dtype, dtype)
    assert (candidates_XK.dtype, keep_XPK.dtype) == (torch.int64, torch.bool), (candidates_XK.dtype, keep_XPK.dtype)
    assert scale_XPC is None or scale_XPC.shape == query_XPC.shape, scale_XPC.shape
    tiles = -(-num_candidates // LANES)
    together = max(1, min(num_chunks, _WAITING // max(1, tiles * LANES * num_columns)))
    # Sums over candidates of loss, of weight x evidence, of loss x evidence, and of mutual loss: per query, but in the
    # plain case, where only losses are wanted, per chunk. They are added up at the end, in the same order whoever took
    # them.
    c = constants
    plain = not (c.over_batch or c.both or c.weights_learn or c.divergence or c.evaluated)
    sums_4XPn = query_XPC.new_zeros((4, num_chunks, 1 if plain else num_queries, num_sub_models))
    largest_n, total_n = torch.zeros(num_sub_models, dtype=dtype), torch.ones(num_sub_models, dtype=dtype)
    query_gradient_XPC = query_XPC.new_zeros(query_XPC.shape)
    scale_gradient_XPC = None if scale_XPC is None else query_XPC.new_zeros(query_XPC.shape)
    hard_weights_n = hard_weights_n.detach().to(dtype)
    # struct Corruptions; the list keeps the tensors alive
    fields: list[Tensor | float | None] = [
        geometry_number(levels, scaled=scale_XPC is not None), num_sub_models, num_chunks, num_queries, num_candidates,
        query_XPC.shape[2], rows_UC.shape[1], int(plain), int(losses), int(constants.raw), int(constants.over_batch),
        int(constants.both), int(constants.weights_learn), int(constants.divergence), int(constants.evaluated),
        num_sub_models - constants.num_kept,
        float(w2), torch.tensor(levels.ends), torch.tensor(levels.kappas, dtype=dtype),
        torch.tensor(levels.returns, dtype=dtype),
        constants.logits.temperatures.to(dtype), constants.logits.margins.to(dtype),
        torch.tensor(constants.evidence), torch.tensor(constants.taught).long(), hard_weights_n,
        mutual_weights_n.detach().to(dtype), query_XPC.detach().contiguous(), rows_UC.detach(),
        candidates_XK.contiguous(),
        keep_XPK.contiguous(), None if scale_XPC is None else scale_XPC.detach().contiguous(), largest_n, total_n,
        sums_4XPn, query_gradient_XPC, scale_gradient_XPC, query_XPC.new_empty((together, tiles, num_columns, LANES)),
        row_gradients_UC,
    ]  # fmt: skip
    struct = arguments(*fields)
    corrupt, add_chunks = function("corrupt", dtype), function("add_chunks", dtype)
    starts = range(0, num_chunks, together) if num_candidates and num_queries else range(0)
    if constants.over_batch:
        for start in starts:
            run_parts(corrupt, min(together, num_chunks - start), struct, start, True)
        tops_XPn, parts_XPn = sums_4XPn[0].clone(), sums_4XPn[1].clone()
        tops_XPn[parts_XPn == 0] = -torch.inf  # queries that keep no candidate
        lowest_1n = tops_XPn.new_full((1, num_sub_models), -torch.inf)
        tops_n = workers.largest(torch.cat([tops_XPn.flatten(0, 1), lowest_1n]).amax(0))
        largest_n.copy_(tops_n.nan_to_num(neginf=0.0))
        total_n.copy_(workers.sum((parts_XPn * (tops_XPn - largest_n).exp()).sum((0, 1))))
        sums_4XPn.zero_()
    for start in starts:
        count = min(together, num_chunks - start)
        run_parts(corrupt, count, struct, start, False)
        run_parts(add_chunks, num_columns, struct, start, count, multiple=_LINE)
    hard_n, evidence_n, product_n, mutual_n = sums_4XPn.sum((1, 2))
    if constants.over_batch:
        slopes_n = product_n - evidence_n * (workers.sum(hard_n.clone()) if constants.weights_learn else hard_n)
    else:
        slopes_n = product_n - (sums_4XPn[1] * sums_4XPn[0]).sum((0, 1)) * (num_chunks * num_queries)
    return CorruptionTerms(hard_n, mutual_n, (slopes_n * hard_weights_n).sum(), query_gradient_XPC, scale_gradient_XPC)
