"""Which worker holds which table."""

from medscale.config import RuntimeSection
from medscale.model.embedding import Placement
from medscale.model.layout import Layout

__all__ = ["placement_of"]


def placement_of(layout: Layout, section: RuntimeSection) -> Placement:
    """Return where each block of the entity table lies: whole on a worker, or spread by rows.

    Wide blocks go first, each to the worker that holds the fewest columns so far. With `placement: auto`, rows are
    spread where a worker's whole blocks would not fit in `memory_gib`.
    """
    columns = [0] * section.workers
    placement: Placement = {}
    for block in sorted(layout.blocks, key=lambda block: (-block.width, block.start)):
        rank = columns.index(min(columns))
        placement[block.name] = rank
        columns[rank] += block.width
    most_bytes = 4 * layout.num_entities * max(columns)
    too_large = section.memory_gib is not None and most_bytes > section.memory_gib * 2**30
    if section.workers > 1 and (section.placement == "row_wise" or (section.placement == "auto" and too_large)):
        return dict.fromkeys(placement, None)
    return {block.name: placement[block.name] for block in layout.blocks}
