"""Which worker holds which part of the entity table."""

from dataclasses import dataclass

from medscale.config import RuntimeSection
from medscale.model.embedding import Placement
from medscale.model.layout import Layout

__all__ = ["FLOAT", "Share", "placement_of", "shares_of"]

#: bytes of a number
FLOAT = 4
#: share of the rows that a GPU caches where the job does not say
CACHE_FRACTION = 0.2


@dataclass(frozen=True)
class Share:
    """What one worker holds of the entity table: some rows of some blocks."""

    rows: int
    #: columns and number of its blocks
    columns: int
    blocks: int

    @property
    def table_bytes(self) -> int:
        """Bytes of its weights."""
        return FLOAT * self.rows * self.columns


def placement_of(layout: Layout, section: RuntimeSection) -> Placement:
    """Return where each block of the entity table lies: whole on a worker, or spread by rows.

    Wide blocks go first, each to the worker that holds the fewest columns so far. With `placement: auto`, rows are
    spread where a worker's whole blocks, or what its GPU caches of them, would not fit in `memory_gib`.
    """
    columns = [0] * section.workers
    ranks: dict[str, int] = {}
    for block in sorted(layout.blocks, key=lambda block: (-block.width, block.start)):
        rank = columns.index(min(columns))
        ranks[block.name] = rank
        columns[rank] += block.width
    fraction = section.cache_fraction or CACHE_FRACTION
    resident = FLOAT * layout.num_entities * max(columns) * (1.0 if section.table_memory == "device" else fraction)
    too_large = section.memory_gib is not None and resident > section.memory_gib * 2**30
    by_rows = section.placement == "row_wise" or (section.placement == "auto" and too_large)
    return Placement(
        {block.name: None if by_rows and section.workers > 1 else ranks[block.name] for block in layout.blocks},
        section.table_memory,
        fraction,
    )


def shares_of(layout: Layout, placement: Placement, workers: int) -> list[Share]:
    """Return what each worker holds, by rank."""
    blocks = layout.blocks
    if placement.is_row_wise:
        rows = -(-layout.num_entities // workers)
        left = [max(0, min(rows, layout.num_entities - rank * rows)) for rank in range(workers)]
        return [Share(held, sum(block.width for block in blocks), len(blocks)) for held in left]
    held = [[block.width for block in blocks if placement.ranks[block.name] == rank] for rank in range(workers)]
    return [Share(layout.num_entities, sum(widths), len(widths)) for widths in held]
