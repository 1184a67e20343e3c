"""The rows of a step, and where their gradient gathers.

Autograd would make a gradient of all rows for every use of a few of them, and add those up; here each use adds its
rows' gradients to one, on a CPU in order, so that runs repeat bit for bit.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["Rows", "add_rows"]


def add_rows(values_RC: Tensor, positions_R: Tensor, rows_UC: Tensor) -> None:
    """Add each value to the row at its position; positions may repeat."""
    rows_UC.index_add_(0, positions_R, values_RC)


class Rows:
    """Looked-up rows [U, C] of a step, detached from their tables, and the loss's gradient by them."""

    def __init__(self, values_UC: Tensor, add_rows: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        """Take rows, and what adds values [R, C] at positions [R] to rows [U, C]."""
        # Looked-up rows may end in columns that only their blocks have.
        self.values_UC = values_UC.detach().contiguous().requires_grad_()
        self.gathered_UC = torch.zeros_like(values_UC)
        self.add_rows = add_rows

    def take(self, positions: Tensor) -> Tensor:
        """Return rows [..., C] at int64 positions [...]."""
        return cast(Tensor, _Take.apply(self.values_UC, self, positions))  # type: ignore[no-untyped-call]

    def gradient(self) -> Tensor:
        """Return the gradient [U, C] of what backward() was called on."""
        if self.values_UC.grad is not None:
            self.gathered_UC += self.values_UC.grad
            self.values_UC.grad = None
        return self.gathered_UC


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_UC: Tensor, rows: Rows, positions: Tensor) -> Tensor:
        ctx.rows, ctx.positions = rows, positions
        taken: Tensor = values_UC.index_select(0, positions.flatten())
        return taken.view(*positions.shape, values_UC.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        rows, (gradient,) = ctx.rows, gradients
        rows.add_rows(gradient.flatten(0, -2), ctx.positions.flatten(), rows.gathered_UC)
        return None, None, None
