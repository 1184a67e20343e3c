"""Bytes over the network: what each of W workers sends to the others in a step.

Worker w looks up U_w distinct rows of C columns, cut into T blocks; it holds T_w blocks with C_w columns. Numbers
are float32 (4 bytes), ids and their bag lengths int64 (8 bytes each). What a worker sends:

    table_wise  ids         16 U_w (T - T_w)             every block asks for its own copy of them
                rows        4 C_w (sum of all U - U_w)   all-to-all, forward
                gradients   4 U_w (C - C_w)              all-to-all, backward
    row_wise    ids         8 T (W-1) max U + 8 T U_w (W-1)/W
                rows        4 C (W-1) max U              reduce-scatter of W partial sums
                gradients   4 C (W-1) max U              all-gather
    both        ids         24 (W-1)                     how many are coming
                relations   2 (W-1)/W 4 R                ring all-reduce of the gradient of R numbers

Row-wise look-ups are padded to the largest U. Not counted: a few all-reduces of less than 100 numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from medscale.model.embedding import Placement
from medscale.model.layout import Layout
from medscale.sharding import FLOAT, shares_of

__all__ = ["INT", "Traffic", "bytes_per_step"]

#: bytes of an id
INT = 8


@dataclass(frozen=True)
class Traffic:
    """Bytes that a worker sends in a step, by what they are."""

    ids: int
    rows: int
    gradients: int
    relations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.ids + self.rows + self.gradients + self.relations


def bytes_per_step(layout: Layout, placement: Placement, rows_W: Sequence[int]) -> list[Traffic]:
    """Return what each worker sends in a step, by rank; `rows_W` says how many rows each looks up.

    Row-wise, ids go to whoever holds them, so their number is an expectation, exact where they are spread evenly.
    """
    workers, longest = len(rows_W), max(rows_W)
    if workers == 1:
        return [Traffic(0, 0, 0, 0)]
    shares = shares_of(layout, placement, workers)
    blocks, columns = len(layout.blocks), sum(block.width for block in layout.blocks)
    others, counts = workers - 1, 3 * INT * (workers - 1)
    relations = 2 * FLOAT * layout.num_relation_rows * layout.num_relation_columns * others // workers
    if placement.is_row_wise:
        padded = FLOAT * columns * others * longest
        return [
            Traffic(counts + INT * blocks * (others * longest + rows * others // workers), padded, padded, relations)
            for rows in rows_W
        ]
    return [
        Traffic(
            ids=counts + 2 * INT * rows * (blocks - share.blocks),
            rows=FLOAT * share.columns * (sum(rows_W) - rows),
            gradients=FLOAT * rows * (columns - share.columns),
            relations=relations,
        )
        for rows, share in zip(rows_W, shares, strict=True)
    ]
