"""What a kernel knows of a model: its geometry, and where levels end."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Geometry", "Levels"]

Geometry = Literal["l1", "l2", "modulus", "product"]


@dataclass(frozen=True)
class Levels:
    """The running sum over columns, level by level: s = (level's own sum) + kappa x s.

    A score is minus the sum of |q - t| (l1), minus the root of the sum of (q - t)^2 (l2), minus the sum of moduli
    of complex units, interleaved (re, im) (modulus), or the sum of q t (product), over the columns so far, where
    t is a candidate's column times the scorer's factor, if it has one.
    """

    geometry: Geometry
    #: columns at which levels end, increasing
    ends: tuple[int, ...]
    #: factor on the sum so far when a level begins; the first is never used
    kappas: tuple[float, ...]
    #: position among the scored sub-models of the one that a level completes; -1: none is scored there
    outputs: tuple[int, ...]
    #: how much of a sub-model's derivatives goes on to the level below; see `med.reach`
    reach: float = 1.0

    def __post_init__(self) -> None:
        assert len(self.ends) == len(self.kappas) == len(self.outputs), self
        assert self.outputs[-1] >= 0, self

    @property
    def returns(self) -> tuple[float, ...]:
        """On the way back: factor on the derivatives of the level that begins, for those of the level below."""
        return tuple(self.reach * kappa for kappa in self.kappas)

    @property
    def num_columns(self) -> int:
        """Columns that count."""
        return self.ends[-1]

    @property
    def num_scored(self) -> int:
        """Sub-models scored: n."""
        return self.outputs[-1] + 1

    @property
    def columns_per_unit(self) -> int:
        """Columns that belong together."""
        return 2 if self.geometry == "modulus" else 1
