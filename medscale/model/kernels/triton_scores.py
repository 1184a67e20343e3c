"""Prefix scores and their gradients on GPUs: every column of a row is read once for all sub-models.

**Scores.** A program holds a tile of differences [columns, positives, candidates] in registers, columns outermost: a
thread owns whole pairs, so sums over columns and the running sum over groups of columns (the largest power of two
that divides every level's end) need no exchange between threads, and scores leave in rows of candidates. With damping,
a level's sum is divided by the product of kappas so far (it `rise`s) and running sums are multiplied by it (they
`fall`), which gives s = own + kappa x s without another kind of scan.

**Gradients** start with one factor per pair and level, d loss / d (level's own sum): the same scan backwards
over the sub-models' gradients. Queries then gather: a program owns some columns of a query and walks its candidates.
So do rows: candidates are sorted by row, and a program owns some columns of a row and walks the pairs that touch it.
Against atomic adds this reads the rows once more, but adds in one order, so that runs repeat bit for bit, and reads
and writes each row's gradient once instead of once per pair. Rows that repeat often, such as hubs, are cut into
segments of a fixed length, summed in order at the end.

**Traffic** of 1,024 positives x 64 fresh candidates x 640 float32 columns, all rows distinct, is 168 MB for each
pass over the rows: one for scores (and 17 MB written by 64 sub-models), one for queries' gradients, three for rows'
gradients (rows, and their gradients read and written). Queries, ids and factors stay in the L2 cache.
"""

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from medscale.model.kernels.levels import Levels

__all__ = ["add_rows", "chunk_gradients", "chunk_scores", "pair_gradients", "pair_scores", "root", "terms"]

#: kappas this small wipe out what lies below in float32; smaller ones would only overflow `rise`
_LEAST_KAPPA = 1e-8


def chunk_scores(
    levels: Levels, query_XPC: Tensor, rows_UC: Tensor, candidates_XK: Tensor, scale_XPC: Tensor | None
) -> Tensor:
    """Return scores [n, X, P, K] of each chunk's candidates, int64 positions in the rows."""
    (X, P, _), K = query_XPC.shape, candidates_XK.shape[1]
    scores_nXPK = query_XPC.new_empty((levels.num_scored, X, P, K))
    if scores_nXPK.numel():
        tables = _tables(levels, query_XPC.dtype, query_XPC.device)
        BP, BK, BC, num_warps = _score_blocks(levels, P, K)
        group = math.gcd(*levels.ends)
        _scores[(X * triton.cdiv(P, BP) * triton.cdiv(K, BK),)](
            query_XPC.contiguous(), _unit_stride(rows_UC), candidates_XK.contiguous(), _contiguous(scale_XPC),
            tables.rise_C, tables.fall_C, tables.output_C, scores_nXPK, P, K, X * P * K,
            GEOMETRY=levels.geometry, NUM_COLUMNS=levels.num_columns, GROUP=min(group & -group, BC),
            QUERY_STRIDE=query_XPC.shape[2], ROW_STRIDE=rows_UC.stride(0), BP=BP, BK=BK, BC=BC, num_warps=num_warps,
        )  # fmt: skip
    return scores_nXPK


def chunk_gradients(
    levels: Levels, gradient_nXPK: Tensor, scores_nXPK: Tensor, query_XPC: Tensor, rows_UC: Tensor,
    candidates_XK: Tensor, scale_XPC: Tensor | None, row_gradients_UC: Tensor,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return gradients (query [X, P, C], scale [X, P, C]); add the candidates' into `row_gradients_UC`.

    `gradient_nXPK` is d loss / d scores; `scores_nXPK` is read only for l2. Repeated rows add up in one order.
    """
    query_gradient_XPC = torch.zeros_like(query_XPC, memory_format=torch.contiguous_format)
    scale_gradient_XPC = None if scale_XPC is None else torch.zeros_like(query_gradient_XPC)
    if gradient_nXPK.numel():
        factors_ML = _level_factors(levels, gradient_nXPK, scores_nXPK)
        pairs = (query_XPC.contiguous(), _unit_stride(rows_UC), candidates_XK.contiguous(), _contiguous(scale_XPC))
        _query_side(levels, factors_ML, *pairs, query_gradient_XPC, scale_gradient_XPC)
        _row_side(levels, factors_ML, *pairs, row_gradients_UC)
    return query_gradient_XPC, scale_gradient_XPC


def pair_scores(levels: Levels, query_RC: Tensor, target_RC: Tensor, scale_RC: Tensor | None) -> Tensor:
    """Return scores [n, R] of one candidate for each query: chunks of one positive with one candidate."""
    return chunk_scores(levels, *_as_chunks(query_RC, target_RC, scale_RC))[:, :, 0, 0]


def pair_gradients(
    levels: Levels, gradient_nR: Tensor, scores_nR: Tensor, query_RC: Tensor, target_RC: Tensor,
    scale_RC: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return gradients (query [R, C], target [R, C], scale [R, C])."""
    target_gradient_RC = torch.zeros_like(target_RC, memory_format=torch.contiguous_format)
    query_R1C, scale_R1C = chunk_gradients(
        levels, gradient_nR[:, :, None, None], scores_nR[:, :, None, None],
        *_as_chunks(query_RC, target_RC, scale_RC), target_gradient_RC,
    )  # fmt: skip
    return query_R1C[:, 0], target_gradient_RC, None if scale_R1C is None else scale_R1C[:, 0]


def add_rows(values_RC: Tensor, positions_R: Tensor, rows_UC: Tensor) -> None:
    """Add each value to the row at its position, in order; positions may repeat."""
    # Unlike `index_add_`, which adds by atomics, this sorts positions first.
    rows_UC.index_put_((positions_R,), values_RC, accumulate=True)


def _as_chunks(
    query_RC: Tensor, target_RC: Tensor, scale_RC: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    candidates_R1 = torch.arange(len(target_RC), device=target_RC.device).unsqueeze(1)
    return query_RC.unsqueeze(1), target_RC, candidates_R1, None if scale_RC is None else scale_RC.unsqueeze(1)


# -- constants of a model -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tables:
    """Levels by column, on the device; `rise_C` and `fall_C` only where levels are damped."""

    #: int32[C]: position among the scored sub-models at the column that completes one, else -1
    output_C: Tensor
    #: int32[C]: level of a column
    level_C: Tensor
    #: int32[L]: last column of a level
    last_L: Tensor
    #: [C]: 1 / product of kappas up to the column's level
    rise_C: Tensor | None
    #: [C]: 1 / rise
    fall_C: Tensor | None


@functools.lru_cache(maxsize=64)
def _tables(levels: Levels, dtype: torch.dtype, device: torch.device) -> _Tables:
    widths = [end - begin for begin, end in zip((0, *levels.ends), levels.ends, strict=False)]
    product, products = 1.0, []
    for level, width in enumerate(widths):
        product *= max(levels.kappas[level], _LEAST_KAPPA) if level else 1.0
        products += [product] * width
    # Centred, so that neither table leaves float32's range.
    centre = math.sqrt(product)
    fall_C = torch.tensor([p / centre for p in products], dtype=dtype, device=device) if product < 1 else None
    output_at = {end - 1: output for end, output in zip(levels.ends, levels.outputs, strict=True)}
    indices = functools.partial(torch.tensor, dtype=torch.int32, device=device)
    return _Tables(
        output_C=indices([output_at.get(column, -1) for column in range(levels.num_columns)]),
        level_C=indices([level for level, width in enumerate(widths) for _ in range(width)]),
        last_L=indices([end - 1 for end in levels.ends]),
        rise_C=None if fall_C is None else 1 / fall_C,
        fall_C=fall_C,
    )


def _score_blocks(levels: Levels, num_positives: int, num_candidates: int) -> tuple[int, int, int, int]:
    """Return (positives, candidates, columns, warps) of a tile of scores.

    Shared candidates meet up to 8 queries at once, so that arithmetic bounds the tile, not loads. Fresh ones are read
    once: small programs of one warp, with few registers, so that many are resident and their loads overlap.
    """
    shared = num_positives > 1
    BP = min(8, triton.next_power_of_2(num_positives))
    BK = min(64 if shared else 32, triton.next_power_of_2(num_candidates))
    num_warps = min(4, max(1, BP * BK // 32))
    per_thread = 64 if shared else 32
    BC = _column_block(levels, min(256, per_thread * 32 * num_warps // (BP * BK)))
    return BP, BK, BC, num_warps


def _column_block(levels: Levels, most: int) -> int:
    return min(most, max(2, int(triton.next_power_of_2(levels.num_columns))))


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _unit_stride(rows_UC: Tensor) -> Tensor:
    """Return rows whose columns lie together; those of a wider table do, and are not copied."""
    return rows_UC if rows_UC.stride(1) == 1 else rows_UC.contiguous()


# -- scores ---------------------------------------------------------------------------------------------------


@triton.jit
def root(x):
    """Square root, rounded as torch rounds it."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def terms(query, candidate, GEOMETRY: tl.constexpr):
    """What columns, in dim 0 of three, add to the running sum; of moduli, one term for two columns."""
    difference = query - candidate
    if GEOMETRY == "l1":
        each = tl.abs(difference)
    elif GEOMETRY == "l2":
        each = difference * difference
    elif GEOMETRY == "modulus":
        squares = difference * difference
        shape: tl.constexpr = (squares.shape[0] // 2, 2, squares.shape[1], squares.shape[2])
        each = root(tl.sum(tl.reshape(squares, shape), 1))
    else:
        each = query * candidate
    return each


@triton.jit
def _scores(
    query_XPC, rows_UC, candidates_XK, scale_XPC, rise_C, fall_C, output_C, scores_nXPK, P, K, num_pairs,
    GEOMETRY: tl.constexpr, NUM_COLUMNS: tl.constexpr, GROUP: tl.constexpr, QUERY_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Score a tile of one chunk's positives and candidates: [BP, BK], `BC` columns at a time."""
    blocks_P, blocks_K = tl.cdiv(P, BP), tl.cdiv(K, BK)
    block = tl.program_id(0)
    x = (block // (blocks_P * blocks_K)).to(tl.int64)
    p_P = block // blocks_K % blocks_P * BP + tl.arange(0, BP)
    k_K = block % blocks_K * BK + tl.arange(0, BK)
    row_K = tl.load(candidates_XK + x * K + k_K, mask=k_K < K, other=0)
    query_P = x * P + p_P

    BG: tl.constexpr = BC // GROUP
    carry_PK = tl.zeros((BP, BK), scores_nXPK.dtype.element_ty)
    for first in range(0, NUM_COLUMNS, BC):
        c_c = first + tl.arange(0, BC)
        mask_cP = (c_c < NUM_COLUMNS)[:, None] & (p_P < P)[None, :]
        mask_cK = (c_c < NUM_COLUMNS)[:, None] & (k_K < K)[None, :]
        query_cP = tl.load(query_XPC + query_P[None, :] * QUERY_STRIDE + c_c[:, None], mask=mask_cP, other=0.0)
        candidate_cPK = tl.load(rows_UC + row_K[None, :] * ROW_STRIDE + c_c[:, None], mask=mask_cK, other=0.0)[:, None]
        if scale_XPC is not None:
            scale_cP = tl.load(scale_XPC + query_P[None, :] * QUERY_STRIDE + c_c[:, None], mask=mask_cP, other=0.0)
            candidate_cPK = candidate_cPK * scale_cP[:, :, None]
        term_cPK = terms(query_cP[:, :, None], candidate_cPK, GEOMETRY)
        sum_GPK = tl.sum(tl.reshape(term_cPK, (BG, term_cPK.shape[0] // BG, BP, BK)), 1)

        last_G = first + tl.arange(0, BG) * GROUP + GROUP - 1
        if rise_C is not None:
            sum_GPK *= tl.load(rise_C + last_G, mask=last_G < NUM_COLUMNS, other=0.0)[:, None, None]
        running_GPK = tl.cumsum(sum_GPK, 0) + carry_PK[None]
        carry_PK += tl.sum(sum_GPK, 0)
        if fall_C is not None:
            running_GPK *= tl.load(fall_C + last_G, mask=last_G < NUM_COLUMNS, other=0.0)[:, None, None]
        if GEOMETRY == "l2":
            running_GPK = root(running_GPK)
        if GEOMETRY != "product":
            running_GPK = -running_GPK
        output_G = tl.load(output_C + last_G, mask=last_G < NUM_COLUMNS, other=-1).to(tl.int64)
        pair_PK = query_P[:, None] * K + k_K[None, :]
        mask_PK = (p_P < P)[:, None] & (k_K < K)[None, :]
        tl.store(
            scores_nXPK + output_G[:, None, None] * num_pairs + pair_PK[None],
            running_GPK,
            mask=(output_G >= 0)[:, None, None] & mask_PK[None],
        )


# -- gradients ------------------------------------------------------------------------------------------------


def _level_factors(levels: Levels, gradient_nXPK: Tensor, scores_nXPK: Tensor) -> Tensor:
    """Return d loss / d (each level's own sum) [M, L] of M = X P K pairs; of l2, without the factor 2."""
    tables = _tables(levels, gradient_nXPK.dtype, gradient_nXPK.device)
    num_levels, num_pairs = len(levels.ends), gradient_nXPK[0].numel()
    factors_ML = gradient_nXPK.new_empty((num_pairs, num_levels))
    BL = triton.next_power_of_2(num_levels)
    BM = min(256, max(16, 4096 // BL))
    _factors[(triton.cdiv(num_pairs, BM),)](
        gradient_nXPK.contiguous(), scores_nXPK.contiguous(), tables.last_L, tables.rise_C, tables.fall_C,
        tables.output_C, factors_ML, num_pairs,
        GEOMETRY=levels.geometry, NUM_LEVELS=num_levels, BL=BL, BM=BM,
    )  # fmt: skip
    return factors_ML


def _query_side(
    levels: Levels, factors_ML: Tensor, query_XPC: Tensor, rows_UC: Tensor, candidates_XK: Tensor,
    scale_XPC: Tensor | None, query_gradient_XPC: Tensor, scale_gradient_XPC: Tensor | None,
) -> None:  # fmt: skip
    """Write the gradients of queries and scales."""
    (X, P, C), K = query_XPC.shape, candidates_XK.shape[1]
    tables = _tables(levels, query_XPC.dtype, query_XPC.device)
    BC = _column_block(levels, 128)
    _query_gradients[(X * P * triton.cdiv(levels.num_columns, BC),)](
        query_XPC, rows_UC, candidates_XK, scale_XPC, factors_ML, tables.level_C, query_gradient_XPC,
        scale_gradient_XPC, P, K,
        GEOMETRY=levels.geometry, NUM_COLUMNS=levels.num_columns, NUM_LEVELS=len(levels.ends), QUERY_STRIDE=C,
        ROW_STRIDE=rows_UC.stride(0), BC=BC, num_warps=1,
    )  # fmt: skip


def _row_side(
    levels: Levels, factors_ML: Tensor, query_XPC: Tensor, rows_UC: Tensor, candidates_XK: Tensor,
    scale_XPC: Tensor | None, row_gradients_UC: Tensor,
) -> None:  # fmt: skip
    """Add the gradients of candidates into those of rows, in the order of J = X K candidates sorted by row."""
    assert row_gradients_UC.stride(1) == 1, row_gradients_UC.stride()
    (X, P, C), K = query_XPC.shape, candidates_XK.shape[1]
    tables = _tables(levels, query_XPC.dtype, query_XPC.device)
    row_J, order_J = candidates_XK.flatten().int().sort(stable=True)
    order_J = order_J.int()
    begin_J = torch.searchsorted(row_J, row_J, out_int32=True)
    end_J = torch.searchsorted(row_J, row_J, right=True, out_int32=True)
    # A program walks at most this many candidates, however often their row repeats.
    segment = max(1, 32 // triton.next_power_of_2(P))
    BC = _column_block(levels, 256)
    tiles = triton.cdiv(levels.num_columns, BC)
    partials_SC = query_XPC.new_empty((2 * triton.cdiv(X * K, segment), levels.num_columns))
    shared = {
        "ROW_STRIDE": row_gradients_UC.stride(0), "NUM_COLUMNS": levels.num_columns, "SEGMENT": segment, "BC": BC,
        "num_warps": 1,
    }  # fmt: skip
    _row_gradients[(X * K * tiles,)](
        query_XPC, rows_UC, row_J, order_J, begin_J, end_J, scale_XPC, factors_ML, tables.level_C, row_gradients_UC,
        partials_SC, P, K,
        GEOMETRY=levels.geometry, NUM_LEVELS=len(levels.ends), QUERY_STRIDE=C, CANDIDATE_STRIDE=rows_UC.stride(0),
        **shared,
    )  # fmt: skip
    _add_segments[(triton.cdiv(X * K, segment) * tiles,)](
        row_J, begin_J, end_J, partials_SC, row_gradients_UC, X * K, **shared
    )


@triton.jit
def _factors(
    gradient_nM, scores_nM, last_L, rise_C, fall_C, output_C, factors_ML, num_pairs,
    GEOMETRY: tl.constexpr, NUM_LEVELS: tl.constexpr, BL: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Scan the sub-models' gradients backwards: [BL, BM] for all levels of `BM` pairs."""
    m_M = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    level_L = tl.arange(0, BL)
    column_L = tl.load(last_L + level_L, mask=level_L < NUM_LEVELS, other=0)
    output_L = tl.load(output_C + column_L, mask=level_L < NUM_LEVELS, other=-1).to(tl.int64)
    at_LM = output_L[:, None] * num_pairs + m_M[None, :]
    mask_LM = (output_L >= 0)[:, None] & (m_M < num_pairs)[None, :]
    factor_LM = tl.load(gradient_nM + at_LM, mask=mask_LM, other=0.0)
    if GEOMETRY == "l2":
        # d -sqrt(S) = dS / (2 score); where a score is 0, so are the differences that this factor meets
        score_LM = tl.load(scores_nM + at_LM, mask=mask_LM, other=1.0)
        factor_LM /= tl.where(score_LM == 0, 1.0, score_LM)
    elif GEOMETRY != "product":
        factor_LM = -factor_LM
    if fall_C is not None:
        factor_LM *= tl.load(fall_C + column_L)[:, None]
    factor_LM = tl.cumsum(factor_LM, 0, reverse=True)
    if rise_C is not None:
        factor_LM *= tl.load(rise_C + column_L)[:, None]
    mask_LM = (level_L < NUM_LEVELS)[:, None] & (m_M < num_pairs)[None, :]
    tl.store(factors_ML + m_M[None, :] * NUM_LEVELS + level_L[:, None], factor_LM, mask=mask_LM)


@triton.jit
def _slopes(query_c, candidate_c, GEOMETRY: tl.constexpr):
    """Derivatives of a level's own sum by the columns of query and candidate."""
    difference_c = query_c - candidate_c
    if GEOMETRY == "product":
        by_query_c = candidate_c
        by_candidate_c = query_c
    else:
        if GEOMETRY == "l1":
            by_query_c = tl.where(difference_c > 0, 1.0, tl.where(difference_c < 0, -1.0, 0.0))
        elif GEOMETRY == "l2":
            by_query_c = difference_c
        else:
            unit_u2 = tl.reshape(difference_c, (difference_c.shape[0] // 2, 2))
            modulus_u1 = root(tl.sum(unit_u2 * unit_u2, 1, keep_dims=True))
            by_query_c = tl.reshape(unit_u2 / tl.where(modulus_u1 == 0, 1.0, modulus_u1), difference_c.shape)
        by_candidate_c = -by_query_c
    return by_query_c, by_candidate_c


@triton.jit
def _query_gradients(
    query_XPC, rows_UC, candidates_XK, scale_XPC, factors_ML, level_C, query_gradient_XPC, scale_gradient_XPC, P, K,
    GEOMETRY: tl.constexpr, NUM_COLUMNS: tl.constexpr, NUM_LEVELS: tl.constexpr, QUERY_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Walk the candidates of one query, for `BC` of its columns; a chunk's queries run together and share rows."""
    tiles: tl.constexpr = (NUM_COLUMNS + BC - 1) // BC
    block = tl.program_id(0)
    x = (block // (P * tiles)).to(tl.int64)
    query = x * P + block % P
    c_c = block // P % tiles * BC + tl.arange(0, BC)
    mask_c = c_c < NUM_COLUMNS
    level_c = tl.load(level_C + c_c, mask=mask_c, other=0)
    at_c = query * QUERY_STRIDE + c_c
    query_c = tl.load(query_XPC + at_c, mask=mask_c, other=0.0)
    scale_c = tl.full((BC,), 1.0, query_c.dtype)
    if scale_XPC is not None:
        scale_c = tl.load(scale_XPC + at_c, mask=mask_c, other=0.0)
    query_gradient_c = tl.zeros((BC,), query_c.dtype)
    scale_gradient_c = tl.zeros((BC,), query_c.dtype)
    # Unrolled, so that many loads are under way at once.
    for k in tl.range(0, K, loop_unroll_factor=8):
        row = tl.load(candidates_XK + x * K + k)
        row_c = tl.load(rows_UC + row * ROW_STRIDE + c_c, mask=mask_c, other=0.0)
        factor_c = tl.load(factors_ML + (query * K + k) * NUM_LEVELS + level_c, mask=mask_c, other=0.0)
        by_query_c, by_candidate_c = _slopes(query_c, row_c * scale_c, GEOMETRY)
        query_gradient_c += factor_c * by_query_c
        scale_gradient_c += factor_c * by_candidate_c * row_c
    tl.store(query_gradient_XPC + at_c, query_gradient_c, mask=mask_c)
    if scale_XPC is not None:
        tl.store(scale_gradient_XPC + at_c, scale_gradient_c, mask=mask_c)


@triton.jit
def _row_gradients(
    query_XPC, rows_UC, row_J, order_J, begin_J, end_J, scale_XPC, factors_ML, level_C, row_gradients_UC, partials_SC,
    P, K,
    GEOMETRY: tl.constexpr, NUM_LEVELS: tl.constexpr, QUERY_STRIDE: tl.constexpr, CANDIDATE_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr, NUM_COLUMNS: tl.constexpr, SEGMENT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Walk the segment of a row's candidates that begins at sorted position j, for `BC` of the row's columns."""
    tiles: tl.constexpr = (NUM_COLUMNS + BC - 1) // BC
    j = tl.program_id(0) // tiles
    begin = tl.load(begin_J + j)
    if (j - begin) % SEGMENT == 0:
        end = tl.load(end_J + j)
        row = tl.load(row_J + j).to(tl.int64)
        c_c = tl.program_id(0) % tiles * BC + tl.arange(0, BC)
        mask_c = c_c < NUM_COLUMNS
        level_c = tl.load(level_C + c_c, mask=mask_c, other=0)
        row_c = tl.load(rows_UC + row * CANDIDATE_STRIDE + c_c, mask=mask_c, other=0.0)
        gradient_c = tl.zeros((BC,), row_c.dtype)
        for i in range(j, tl.minimum(j + SEGMENT, end)):
            candidate = tl.load(order_J + i)
            query = (candidate // K).to(tl.int64) * P
            for p in tl.range(0, P, loop_unroll_factor=4):
                at_c = (query + p) * QUERY_STRIDE + c_c
                query_c = tl.load(query_XPC + at_c, mask=mask_c, other=0.0)
                pair = (query + p) * K + candidate % K
                factor_c = tl.load(factors_ML + pair * NUM_LEVELS + level_c, mask=mask_c, other=0.0)
                scale_c = tl.full((BC,), 1.0, query_c.dtype)
                if scale_XPC is not None:
                    scale_c = tl.load(scale_XPC + at_c, mask=mask_c, other=0.0)
                _, by_candidate_c = _slopes(query_c, row_c * scale_c, GEOMETRY)
                gradient_c += factor_c * by_candidate_c * scale_c
        if end - begin <= SEGMENT:
            at_c = row_gradients_UC + row * ROW_STRIDE + c_c
            tl.store(at_c, tl.load(at_c, mask=mask_c) + gradient_c, mask=mask_c)
        else:
            tl.store(partials_SC + _slot(j, begin, SEGMENT) * NUM_COLUMNS + c_c, gradient_c, mask=mask_c)


@triton.jit
def _add_segments(
    row_J, begin_J, end_J, partials_SC, row_gradients_UC, num_candidates,
    ROW_STRIDE: tl.constexpr, NUM_COLUMNS: tl.constexpr, SEGMENT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Add up the segments of the row, at most one, that is cut into several and begins among `SEGMENT` positions."""
    tiles: tl.constexpr = (NUM_COLUMNS + BC - 1) // BC
    j_S = tl.program_id(0) // tiles * SEGMENT + tl.arange(0, SEGMENT)
    begin_S = tl.load(begin_J + j_S, mask=j_S < num_candidates, other=-1)
    length_S = tl.load(end_J + j_S, mask=j_S < num_candidates, other=0) - begin_S
    begin = tl.max(tl.where((begin_S == j_S) & (length_S > SEGMENT), j_S, -1), 0)
    if begin >= 0:
        c_c = tl.program_id(0) % tiles * BC + tl.arange(0, BC)
        mask_c = c_c < NUM_COLUMNS
        at_c = row_gradients_UC + tl.load(row_J + begin).to(tl.int64) * ROW_STRIDE + c_c
        gradient_c = tl.load(at_c, mask=mask_c)
        for j in range(begin, tl.load(end_J + begin), SEGMENT):
            gradient_c += tl.load(partials_SC + _slot(j, begin, SEGMENT) * NUM_COLUMNS + c_c, mask=mask_c)
        tl.store(at_c, gradient_c, mask=mask_c)


@triton.jit
def _slot(j, begin, SEGMENT: tl.constexpr):
    """Where the sum of the segment at j goes.

    Of rows cut into several, any `SEGMENT` positions hold the start of at most one first segment and one later one.
    """
    return tl.cast(j, tl.int64) // SEGMENT * 2 + tl.where(j == begin, 1, 0)
