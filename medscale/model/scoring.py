"""Score functions (Table 1 of the paper, ComplEx and DistMult), each as a query compared with candidates.

Asking for the missing side of a triple folds the known entity and the relation into one **query** vector that
lives in the candidates' columns. What remains is a distance or a product, summed over units, so the score of
every prefix is a partial sum of the score of the whole:

    TransE    |q - t|,  q = h + r           (heads: |q - h|, q = t - r)
    RotatE    |q - t|,  q = h o r           (heads: q = t o conj(r)); modulus per unit
    PairRE    |q - t o rT|,  q = h o rH     (heads: |q - h o rH|, q = t o rT)
    SimplE    <q, t>,   q = ((tail part of h) r_inv, (head part of h) r) / 2, and mirrored for heads
    ComplEx   <q, t>,   q = h r             (heads: q = conj(r) t)
    DistMult  <q, t>,   q = h r

Columns are interleaved by unit, so the first `dim x unit_columns` columns of a row are the sub-model's row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from medscale.config import ModelSection
from medscale.graph.side import Side
from medscale.model.kernels.levels import Geometry

__all__ = ["Geometry", "Scorer", "scorer_of"]


@dataclass(frozen=True)
class Scorer:
    """A score function, told by its query and by how queries meet candidates."""

    name: str
    #: real columns per unit of an entity row
    unit_columns: int
    #: real columns per unit of a relation row
    relation_unit_columns: int
    #: how a query and a candidate give a score
    geometry: Geometry
    #: (known entity [..., C], relation [..., R], side asked for) -> query [..., C]
    query: Callable[[Tensor, Tensor, Side], Tensor]
    #: (relation [..., R], side asked for) -> factor [..., C] on the candidates' columns; None: no factor
    scale: Callable[[Tensor, Side], Tensor] | None = None

    @property
    def is_distance(self) -> bool:
        """Whether the score is minus a distance."""
        return self.geometry != "product"


def scorer_of(section: ModelSection) -> Scorer:
    """Return the scorer that a job's model section names."""
    return _SCORERS[f"{section.scorer}_l2" if section.norm == "l2" else section.scorer]


def _translate(known: Tensor, relation: Tensor, side: Side) -> Tensor:
    return known + relation if side == "tail" else known - relation


def _rotate(known: Tensor, phase: Tensor, side: Side) -> Tensor:
    turn = phase if side == "tail" else -phase
    return _real(_complex(known) * torch.complex(turn.cos(), turn.sin()))


def _pair(known: Tensor, relation: Tensor, side: Side) -> Tensor:
    head_factor, tail_factor = _parts(relation)
    return known * (head_factor if side == "tail" else tail_factor)


def _pair_scale(relation: Tensor, side: Side) -> Tensor:
    head_factor, tail_factor = _parts(relation)
    return tail_factor if side == "tail" else head_factor


def _multiply(known: Tensor, relation: Tensor, side: Side) -> Tensor:
    return known * relation


def _complex_multiply(known: Tensor, relation: Tensor, side: Side) -> Tensor:
    factor = _complex(relation)
    return _real(_complex(known) * (factor if side == "tail" else factor.conj()))


def _simple(known: Tensor, relation: Tensor, side: Side) -> Tensor:
    # s = (h_H r t_T + t_H r_inv h_T) / 2; the query lists the factors of (candidate's H, candidate's T).
    return _half_swapped(known * relation) if side == "tail" else _half_swapped(known) * relation


def _half_swapped(interleaved: Tensor) -> Tensor:
    """Return (b, a) / 2 for every unit (a, b): the conjugate of -i/2 (a + i b)."""
    return _real((_complex(interleaved) * -0.5j).conj())


def _parts(interleaved: Tensor) -> tuple[Tensor, Tensor]:
    """Split [..., 2 U] interleaved by unit into two [..., U]."""
    first, second = interleaved.unflatten(-1, (-1, 2)).unbind(-1)
    return first, second


# Complex numbers multiply in one pass over memory, several times faster than their parts do.


def _complex(interleaved: Tensor) -> Tensor:
    """Take [..., 2 U] rows of (re, im) units for complex numbers [..., U]: float32 or float64, units side by side."""
    return torch.view_as_complex(interleaved.unflatten(-1, (-1, 2)))


def _real(numbers: Tensor) -> Tensor:
    """Return complex numbers [..., U] as [..., 2 U] rows of (re, im) units."""
    return torch.view_as_real(numbers.resolve_conj()).flatten(-2)


_SCORERS: dict[str, Scorer] = {
    "transe": Scorer("transe", 1, 1, "l1", _translate),
    "transe_l2": Scorer("transe", 1, 1, "l2", _translate),
    "rotate": Scorer("rotate", 2, 1, "modulus", _rotate),
    "pairre": Scorer("pairre", 1, 2, "l1", _pair, _pair_scale),
    "simple": Scorer("simple", 2, 2, "product", _simple),
    "complex": Scorer("complex", 2, 2, "product", _complex_multiply),
    "distmult": Scorer("distmult", 1, 1, "product", _multiply),
}
