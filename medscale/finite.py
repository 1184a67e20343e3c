"""No update by a number that is not finite: a step is refused, on every worker, by the first that finds one."""

from collections.abc import Mapping

import torch
from torch import Tensor

from medscale.errors import NonFiniteError
from medscale.model.layout import Layout
from medscale.objective import Terms
from medscale.workers import Workers

__all__ = ["require_finite_gradients", "require_finite_terms"]


def require_finite_terms(step: int, share: Terms, terms: Terms, layout: Layout, workers: Workers) -> None:
    """Refuse a loss that is not finite. `share` are this worker's terms, `terms` those of all; steps count from 1.

    Raises:
        NonFiniteError: on every worker; names the terms, their sub-models, and the workers.

    """
    if not torch.isfinite(terms.total):
        ranks = workers.where(flag=not bool(torch.isfinite(share.total)))
        raise NonFiniteError(
            f"step {step}{_on(ranks, workers)}: not finite: {_broken_terms(terms, layout)}. "
            "Nothing was updated; lower optimizer.lr or check med.form, and run again to go on from the last "
            "checkpoint"
        )


def require_finite_gradients(
    step: int, gradients: Mapping[str, Tensor], terms: Terms, layout: Layout, workers: Workers
) -> None:
    """Refuse gradients [..., columns] that are not finite on some worker, of finite `terms`; steps count from 1.

    Raises:
        NonFiniteError: on every worker; names the first broken table and sub-model, and the workers.

    """
    broken = {name: _first_broken_column(gradient) for name, gradient in gradients.items()}
    where = next((_place(layout, name, column) for name, column in broken.items() if column is not None), None)
    ranks = workers.where(flag=where is not None)
    if ranks:
        though = ", though the loss is" if terms.whole else ""
        raise NonFiniteError(
            f"step {step}{_on(ranks, workers)}: the gradient of the {where or 'entities'} is not finite{though}. "
            "Nothing was updated; lower optimizer.lr or check med.form, and run again to go on from the last checkpoint"
        )


def _on(ranks: list[int], workers: Workers) -> str:
    if workers.size == 1:
        return ""
    return f", worker{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of {workers.size}"


def _broken_terms(terms: Terms, layout: Layout) -> str:
    """Return which terms of a loss are not finite, in words."""
    broken = [
        f"hard loss of {_named(layout, d)}"
        for d, v in zip(terms.dims, terms.hard, strict=True)
        if not torch.isfinite(v)
    ]
    broken += [
        f"mutual loss of {_named(layout, d)} and the one below"
        for d, v in zip(terms.mutual_dims, terms.mutual, strict=True)
        if not torch.isfinite(v)
    ]
    rest = {"regularizer": terms.regularizer, "barrier": terms.barrier}
    broken += [name for name, v in rest.items() if not torch.isfinite(v)]
    return "; ".join(broken) or "the sum of the terms"


def _first_broken_column(gradient: Tensor) -> int | None:
    """Return the first column of a gradient that holds a number that is not finite; None: all are."""
    # A sum is finite only if all its terms are, and is taken several times faster than they are looked at.
    if torch.isfinite(gradient.sum()) or torch.isfinite(gradient).all():
        return None
    return int((~torch.isfinite(gradient.reshape(-1, gradient.shape[-1]))).any(0).nonzero()[0])


def _place(layout: Layout, name: str, column: int) -> str:
    """Return a table's column in words: the sub-model whose level it belongs to."""
    units = {"entities": layout.scorer.unit_columns, "relations": layout.scorer.relation_unit_columns}
    if name not in units:
        return name
    dim = next(d for d in layout.dims if column < d * units[name])
    return f"{name}, first in the columns of {_named(layout, dim)},"


def _named(layout: Layout, dim: int) -> str:
    """Return a sub-model in words, with its tiers."""
    return f"sub-model {dim}" + "".join(f" (tier {name})" for name, d in layout.tiers.items() if d == dim)
