"""Score functions on exported columns, in numpy: a query vector for the known side, compared with rows.

Units are interleaved; weights w_u = product of the kappas of the levels above the unit's own carry the damping, so that
s_i = B_i + kappa s_(i-1) is one weighted sum over units (kappa = 1: all weights 1):

    transe    l1: -sum w |h + r - t|     l2: -sqrt(sum w (h + r - t)^2)
    rotate    -sum w |h e^(i theta) - t|     complex modulus; entity (re, im), relation (cos theta, sin theta)
    pairre    -sum w |h rH - t rT|           relation (rH, rT)
    distmult   sum w h r t
    complex    sum w Re(h r conj(t))         (re, im)
    simple     sum w (hH r tT + tH r_inv hT) / 2     entity (head part, tail part), relation (r, r_inv)

All functions follow the dtype of what they are given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["SCORERS", "Array", "ExportedScorer", "Side", "compare", "exported_scorer", "unit_weights"]

Array = NDArray[Any]
#: the slot of a triple that is asked for
Side = Literal["head", "tail"]


@dataclass(frozen=True)
class ExportedScorer:
    """A score function on the columns that a tier holds."""

    #: what the columns of an entity's unit are
    entity_unit: tuple[str, ...]
    #: what the columns of a relation's unit are
    relation_unit: tuple[str, ...]
    #: how a query and a row give a score
    geometry: Literal["l1", "l2", "modulus", "product"]
    #: (known entity [..., C], relation [..., R], side asked for) -> query [..., C]
    query: Callable[[Array, Array, Side], Array]
    #: (relation [..., R], side asked for) -> factor [..., C] on the rows compared; None: no factor
    factor: Callable[[Array, Side], Array] | None = None


def exported_scorer(scorer: str, norm: str) -> ExportedScorer:
    """Return the score function of a manifest's `scorer` and `norm`.

    Raises:
        KeyError: there is none of that name.

    """
    return SCORERS[scorer, norm]


def unit_weights(dims: Sequence[int], damping: Sequence[float]) -> NDArray[np.float64]:
    """Return float64[dims[-1]]: each unit's weight in the score of the largest of `dims`.

    `damping` holds the kappa of each level above the first.
    """
    above_first_last = np.cumprod([1.0, *reversed(damping)])
    return np.repeat(above_first_last[::-1], np.diff([0, *dims]))


def compare(geometry: str, query: Array, rows: Array, weights: Array) -> Array:
    """Return scores [...] of rows [..., C] against queries [..., C]; shapes broadcast.

    `weights` is per unit for "modulus", per column for the others. A score does not depend on the rows beside it: BLAS,
    which sums in another order where rows are few, has no part in it.
    """
    scores: Array
    match geometry:
        case "product":
            scores = (query * weights * rows).sum(-1)
        case "l1":
            scores = -(np.abs(query - rows) * weights).sum(-1)
        case "l2":
            scores = -np.sqrt((np.square(query - rows) * weights).sum(-1))
        case _:
            real, imaginary = _parts(query - rows)
            scores = -(np.hypot(real, imaginary) * weights).sum(-1)
    return scores


def _translate(known: Array, relation: Array, side: Side) -> Array:
    return known + relation if side == "tail" else known - relation


def _complex_multiply(known: Array, relation: Array, side: Side) -> Array:
    a, b = _parts(known)
    c, d = _parts(relation)
    if side == "head":
        d = -d
    return _interleave(a * c - b * d, a * d + b * c)


def _pair(known: Array, relation: Array, side: Side) -> Array:
    head_factor, tail_factor = _parts(relation)
    return known * (head_factor if side == "tail" else tail_factor)


def _pair_factor(relation: Array, side: Side) -> Array:
    head_factor, tail_factor = _parts(relation)
    return tail_factor if side == "tail" else head_factor


def _multiply(known: Array, relation: Array, side: Side) -> Array:
    return known * relation


def _simple(known: Array, relation: Array, side: Side) -> Array:
    as_head, as_tail = _parts(known)
    forward, inverse = _parts(relation)
    if side == "head":
        forward, inverse = inverse, forward
    return _interleave(as_tail * inverse, as_head * forward) / 2


def _parts(interleaved: Array) -> tuple[Array, Array]:
    return interleaved[..., 0::2], interleaved[..., 1::2]


def _interleave(first: Array, second: Array) -> Array:
    stacked = np.stack([first, second], -1)
    return stacked.reshape(*stacked.shape[:-2], -1)


#: by (scorer, norm); only TransE leaves the norm open
SCORERS: dict[tuple[str, str], ExportedScorer] = {
    ("transe", "l1"): ExportedScorer(("value",), ("value",), "l1", _translate),
    ("transe", "l2"): ExportedScorer(("value",), ("value",), "l2", _translate),
    ("rotate", "l1"): ExportedScorer(("re", "im"), ("cos", "sin"), "modulus", _complex_multiply),
    ("pairre", "l1"): ExportedScorer(("value",), ("head factor", "tail factor"), "l1", _pair, _pair_factor),
    ("simple", "l1"): ExportedScorer(("as head", "as tail"), ("forward", "inverse"), "product", _simple),
    ("complex", "l1"): ExportedScorer(("re", "im"), ("re", "im"), "product", _complex_multiply),
    ("distmult", "l1"): ExportedScorer(("value",), ("value",), "product", _multiply),
}
