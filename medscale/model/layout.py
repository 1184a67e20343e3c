"""Columns: where units, levels and blocks lie in a row of the entity table and of the relation table.

A **level** j is the units between sub-model boundaries d_(j-1) and d_j. A **block** is a slice of columns held
as one TorchRec table: cut at tier boundaries, and between them as the job says, rounded up to 4 columns because the
fused kernels want that. Blocks are the job's: they do not depend on how many workers there are.
Blocks are a storage matter; a crop is always the first `dim x unit_columns` columns.
"""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medscale.config import ModelSection
from medscale.model.scoring import Scorer, scorer_of

__all__ = ["Block", "Layout", "layout_of"]

#: table widths of FBGEMM's fused kernels are multiples of this
WIDTH_MULTIPLE = 4


@dataclass(frozen=True)
class Block:
    """Columns [start, start + width) of the entity table; the last block may end in unused columns."""

    name: str
    start: int
    width: int


@dataclass(frozen=True)
class Layout:
    """Sizes of a model's tables."""

    scorer: Scorer
    #: units of each sub-model, increasing
    dims: tuple[int, ...]
    tiers: Mapping[str, int]
    num_entities: int
    #: relations of the graph; the table has twice as many rows with `reciprocal`
    num_relations: int
    reciprocal: bool
    #: kappa of each level above the first: s_i = B_i + kappa_i s_(i-1)
    damping: tuple[float, ...]
    #: units of a block at most, roughly; None: blocks are cut at tiers alone
    block_units: int | None = None

    @property
    def num_columns(self) -> int:
        """Columns of an entity row."""
        return self.dims[-1] * self.scorer.unit_columns

    @property
    def num_relation_columns(self) -> int:
        """Columns of a relation row."""
        return self.dims[-1] * self.scorer.relation_unit_columns

    @property
    def num_relation_rows(self) -> int:
        """Rows of the relation table."""
        return self.num_relations * (2 if self.reciprocal else 1)

    def relation_rows_of(self, num_first: int) -> list[int]:
        """Return which rows belong to the first so many relations, in the order of a table of them alone."""
        rows = list(range(num_first))
        return rows + [self.num_relations + row for row in rows] if self.reciprocal else rows

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The physical slices, in order; together they cover every column once."""
        tiers = sorted({0, *self.tiers.values(), self.dims[-1]})
        ends = sorted({self._rounded(end) for a, b in itertools.pairwise(tiers) for end in self._cuts(a, b)})
        starts = [0, *ends[:-1]]
        return tuple(Block(f"columns_{a}", a, b - a) for a, b in zip(starts, ends, strict=True))

    def of_columns(self, values: Sequence[float], unit_columns: int) -> list[float]:
        """Spread one value, or one per dim of the tiers, over columns that have so many per unit; the last goes on."""
        if len(values) == 1:
            return [*values] * (self.dims[-1] * unit_columns)
        tiers = sorted(set(self.tiers.values()))
        return [
            values[min(bisect.bisect_right(tiers, column // unit_columns), len(tiers) - 1)]
            for column in range(self.dims[-1] * unit_columns)
        ]

    def num_parameters(self, dim: int) -> int:
        """Return the numbers that a crop to `dim` units holds."""
        entities = self.num_entities * self.scorer.unit_columns
        return dim * (entities + self.num_relation_rows * self.scorer.relation_unit_columns)

    def _cuts(self, start: int, stop: int) -> list[int]:
        """Return where the blocks between two tiers end, in units: as many of one width as `block_units` asks for."""
        parts = 1 if self.block_units is None else -(-(stop - start) // self.block_units)
        return [start + (stop - start) * (i + 1) // parts for i in range(parts)]

    def _rounded(self, dim: int) -> int:
        return -(-dim * self.scorer.unit_columns // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def layout_of(section: ModelSection, num_entities: int, num_relations: int) -> Layout:
    """Return the layout of a job's model on a graph of this size."""
    return Layout(
        scorer=scorer_of(section),
        dims=section.dims,
        tiers=dict(section.tiers),
        num_entities=num_entities,
        num_relations=num_relations,
        reciprocal=section.reciprocal,
        damping=section.damping * (len(section.dims) - 1) if len(section.damping) == 1 else section.damping,
        block_units=section.block_units,
    )
