"""N3 and L2, each column once, with a strength per level.

Added once per sub-model, a regularizer would press on the first columns n times; here level j's strength
applies to level j's columns alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["column_strengths", "row_penalties"]


def column_strengths(weights: Sequence[float], dims: Sequence[int], columns_per_unit: int) -> Tensor:
    """Return the strength [C] of each column from one weight, or one per level."""
    per_level = list(weights) * (len(dims) if len(weights) == 1 else 1)
    columns = [(b - a) * columns_per_unit for a, b in zip([0, *dims[:-1]], dims, strict=True)]
    strengths = torch.tensor(per_level, dtype=torch.get_default_dtype())
    return strengths.repeat_interleave(torch.tensor(columns))


def row_penalties(rows_UC: Tensor, strengths_C: Tensor, kind: str, *, complex_units: bool) -> Tensor:
    """Return the penalty [U] of each row.

    N3 is the sum of cubed moduli (Lacroix et al., 2018): of units where they are complex numbers, interleaved
    (re, im), else of columns. L2 is the sum of squares.
    """
    if kind == "l2":
        return rows_UC.square() @ strengths_C
    if complex_units:
        # modulus times square rather than a cubed norm: no pow, and no infinite gradient of a root at 0
        squares_UD: Tensor = rows_UC.square().unflatten(-1, (-1, 2)).sum(-1)
        return (squares_UD * (squares_UD + 1e-20).sqrt()) @ strengths_C[::2]
    return (rows_UC.abs() * rows_UC.square()) @ strengths_C
