"""Ranks of all sub-models in one scan over the entities, on a CPU; `cpp/ranks.cpp` has the arithmetic."""

import numpy as np
import torch
from torch import Tensor

from medscale.model.kernels.levels import Levels
from medscale.model.kernels.library import LANES, arguments, function, geometry_number, run_parts

__all__ = ["rank_counts"]


def rank_counts(
    levels: Levels, query_QC: Tensor, scale_QC: Tensor | None, target_QC: Tensor, entities_NC: Tensor, first: int,
    excluded_query_E: Tensor, excluded_entity_E: Tensor, halves_nQ: Tensor,
) -> None:  # fmt: skip
    """Add, to int64 `halves_nQ`, 2 x (how many entities score better than the target) + (how many the same).

    `entities_NC` are the rows of entities first .. first + N - 1. Excluded pairs (query, entity), int64, sorted by
    entity, do not count; the targets themselves are among them.
    """
    num_queries, num_sub_models, num_columns = len(query_QC), levels.num_scored, levels.num_columns
    assert levels.outputs == tuple(range(num_sub_models)), "every level is a sub-model's here"
    dtype = query_QC.dtype
    target_Qn = query_QC.new_empty((num_queries, num_sub_models))
    halves_Qn = torch.zeros((num_queries, num_sub_models), dtype=torch.int64)
    local_E = excluded_entity_E - first
    begins = np.searchsorted(local_E.numpy(), np.arange(0, len(entities_NC) + LANES, LANES))
    begins[-1] = np.searchsorted(local_E.numpy(), len(entities_NC))
    constants = [torch.tensor(levels.ends), torch.tensor(levels.kappas, dtype=dtype)]
    queries = [query_QC.contiguous(), None if scale_QC is None else scale_QC.contiguous()]
    excluded = [torch.from_numpy(begins.astype(np.int64)), excluded_query_E.contiguous(), local_E.contiguous()]
    for rows_NC, name in ((target_QC, "target_sums"), (entities_NC, "rank_queries")):
        tiles_TCN = _tiles(rows_NC, num_columns)
        # struct Ranks
        struct = arguments(
            geometry_number(levels, scaled=scale_QC is not None), num_sub_models, len(tiles_TCN), query_QC.shape[1],
            *constants, *queries, tiles_TCN, len(rows_NC), *excluded, target_Qn, halves_Qn,
        )  # fmt: skip
        run_parts(function(name, dtype), len(tiles_TCN) if name == "target_sums" else num_queries, struct)
    halves_nQ += halves_Qn.T


def _tiles(rows_NC: Tensor, num_columns: int) -> Tensor:
    """Return rows as tiles [T, C, LANES]; lanes left over hold 0."""
    rows_NC = rows_NC.contiguous()
    tiles_TCN = rows_NC.new_empty((-(-len(rows_NC) // LANES), num_columns, LANES))
    make = function("make_tiles", rows_NC.dtype)
    run_parts(
        make, len(tiles_TCN), rows_NC.data_ptr(), len(rows_NC), rows_NC.shape[1], num_columns, tiles_TCN.data_ptr()
    )
    return tiles_TCN
