"""How many entities score better than the true answer, and how many the same, in every sub-model, on GPUs.

A program compares a block of queries with a block of entities, level by level, and counts at the end of each scored
level; nothing of size queries x entities leaves it. Counts are integers, so that the order in which programs add
theirs changes nothing. Entities are read from memory once for all queries that are ranked together: arithmetic
bounds the scan, 2.6 instructions per difference.

Two things keep ties ties. The target's score comes out of the same compiled program as the entities', which is run
first with the targets as entities and keeps the diagonal. And distances are compared as they are summed up, l2's
before the root, which could only round different sums to one score.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from medscale.model.kernels.levels import Levels
from medscale.model.kernels.triton_scores import terms

__all__ = ["rank_counts"]

#: queries and entities compared by a program, and columns at a time: a thread owns a query
_BQ, _BN, _BC = 128, 32, 4


def rank_counts(
    levels: Levels, query_QC: Tensor, scale_QC: Tensor | None, target_QC: Tensor, entities_NC: Tensor, first: int,
    excluded_query_E: Tensor, excluded_entity_E: Tensor, halves_nQ: Tensor,
) -> None:  # fmt: skip
    """Add, to int64 `halves_nQ`, 2 x (how many entities score better than the target) + (how many the same).

    `entities_NC` are the rows of entities first .. first + N - 1, `target_QC` those of the true answers. Excluded
    pairs (query, entity), int64, do not count; those of other entities are ignored.
    """
    num_queries, num_entities = len(query_QC), len(entities_NC)
    if not num_queries or not num_entities:
        return
    device, blocks_Q, blocks_N = query_QC.device, triton.cdiv(num_queries, _BQ), triton.cdiv(num_entities, _BN)
    local_E = excluded_entity_E - first
    tile_E = local_E // _BN * blocks_Q + excluded_query_E // _BQ
    is_here_E = (local_E >= 0) & (local_E < num_entities)
    tile_E, order_E = tile_E.where(is_here_E, blocks_Q * blocks_N).sort(stable=True)
    tiles = torch.arange(blocks_Q * blocks_N + 1, device=device)
    excluded = (excluded_query_E[order_E], local_E[order_E], torch.searchsorted(tile_E, tiles))
    nothing = (tile_E, tile_E, tiles.new_zeros(blocks_Q * _BQ // _BN + 1))

    targets_nQ = query_QC.new_empty((levels.num_scored, num_queries))
    last_L, output_L = (torch.tensor(values, device=device) for values in (levels.ends, levels.outputs))
    kappa_L = torch.tensor(levels.kappas, dtype=query_QC.dtype, device=device)
    scale_QC = None if scale_QC is None else scale_QC.contiguous()
    query_QC = query_QC.contiguous()
    assert target_QC.shape[1] == entities_NC.shape[1], (target_QC.shape, entities_NC.shape)
    # Twice the same program: what differs between the launches is named in `do_not_specialize`.
    for entities, exclusions, count, rows_per_block, blocks in (
        (target_QC.contiguous(), nothing, num_queries, _BQ, _BQ // _BN),
        (entities_NC.contiguous(), excluded, num_entities, 0, blocks_N),
    ):
        _counts[(blocks_Q * blocks,)](
            query_QC, scale_QC, entities, last_L, kappa_L, output_L, *exclusions, targets_nQ, halves_nQ,
            num_queries, count, rows_per_block, blocks_Q,
            GEOMETRY=levels.geometry, NUM_LEVELS=len(levels.ends), QUERY_STRIDE=query_QC.shape[1],
            ENTITY_STRIDE=entities_NC.shape[1], BQ=_BQ, BN=_BN, BC=_BC,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "entities_NC", "excluded_query_E", "excluded_entity_E", "first_excluded_T", "num_entities", "rows_per_block"
    ]
)  # fmt: skip
def _counts(
    query_QC, scale_QC, entities_NC, last_L, kappa_L, output_L, excluded_query_E, excluded_entity_E, first_excluded_T,
    targets_nQ, halves_nQ, num_queries, num_entities, rows_per_block, blocks_Q,
    GEOMETRY: tl.constexpr, NUM_LEVELS: tl.constexpr, QUERY_STRIDE: tl.constexpr, ENTITY_STRIDE: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compare [BN, BQ] entities and queries at every scored level.

    With `rows_per_block`, entities are the targets, those of a block of queries with that block: keep the diagonal.
    """
    tile = tl.program_id(0)
    q_Q = tile % blocks_Q * BQ + tl.arange(0, BQ)
    n_N = tile % blocks_Q * rows_per_block + tile // blocks_Q * BN + tl.arange(0, BN)
    is_query_Q, is_entity_N = q_Q < num_queries, n_N < num_entities
    # What does not count is infinitely far from the start, and neither better than a finite target nor equal.
    excluded_NQ = tl.broadcast_to((n_N >= num_entities)[:, None], (BN, BQ))
    for e in range(tl.load(first_excluded_T + tile), tl.load(first_excluded_T + tile + 1)):
        is_query_e = q_Q == tl.load(excluded_query_E + e)
        is_entity_e = n_N == tl.load(excluded_entity_E + e)
        excluded_NQ = excluded_NQ | (is_entity_e[:, None] & is_query_e[None, :])
    sum_NQ = tl.where(excluded_NQ, float("inf"), tl.zeros((BN, BQ), targets_nQ.dtype.element_ty))

    query_at_cQ = q_Q.to(tl.int64)[None, :] * QUERY_STRIDE
    entity_at_cN = n_N.to(tl.int64)[None, :] * ENTITY_STRIDE
    begin = 0
    for level in range(NUM_LEVELS):
        end = tl.load(last_L + level).to(tl.int32)
        sum_NQ *= tl.load(kappa_L + level)
        for first in range(begin, end, BC):
            c_c = first + tl.arange(0, BC)
            mask_cQ = (c_c < end)[:, None] & is_query_Q[None, :]
            mask_cN = (c_c < end)[:, None] & is_entity_N[None, :]
            query_cQ = tl.load(query_QC + query_at_cQ + c_c[:, None], mask=mask_cQ, other=0.0)
            entity_cNQ = tl.load(entities_NC + entity_at_cN + c_c[:, None], mask=mask_cN, other=0.0)[:, :, None]
            if scale_QC is not None:
                scale_cQ = tl.load(scale_QC + query_at_cQ + c_c[:, None], mask=mask_cQ, other=0.0)
                entity_cNQ = entity_cNQ * scale_cQ[:, None, :]
            own_NQ = tl.sum(terms(query_cQ[:, None, :], entity_cNQ, GEOMETRY), 0)
            if GEOMETRY == "product":
                sum_NQ -= own_NQ
            else:
                sum_NQ += own_NQ
        begin = end
        output = tl.load(output_L + level)
        if output >= 0:
            at_Q = output * num_queries + q_Q
            if rows_per_block > 0:
                at_NQ = n_N[:, None] * 0 + at_Q[None, :]
                tl.store(targets_nQ + at_NQ, sum_NQ, mask=(n_N[:, None] == q_Q[None, :]) & is_query_Q[None, :])
            else:
                target_NQ = tl.load(targets_nQ + at_Q, mask=is_query_Q, other=0.0)[None, :]
                halves_NQ = tl.where(sum_NQ < target_NQ, 2, 0) + tl.where(sum_NQ == target_NQ, 1, 0)
                halves_Q = tl.sum(halves_NQ, 0).to(tl.int64)
                tl.atomic_add(halves_nQ + at_Q, halves_Q, mask=(halves_Q > 0) & is_query_Q, sem="relaxed")
