"""Logits z_i = a_i (gamma_i + s_i) of scores, for binary cross-entropy (equations 1 and 5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medscale.config import LossSection

__all__ = ["Logits", "logits_of"]


@dataclass(frozen=True)
class Logits:
    """The constants that turn scores into logits, one pair per sub-model."""

    #: [n]
    margins: Tensor
    #: [n]
    temperatures: Tensor

    def of(self, chosen: Sequence[int]) -> "Logits":
        """Return the constants of some sub-models."""
        return Logits(self.margins[list(chosen)], self.temperatures[list(chosen)])

    def __call__(self, scores: Tensor) -> Tensor:
        """Return logits [n, ...] of scores [n, ...]."""
        shape = (-1,) + (1,) * (scores.dim() - 1)
        return self.temperatures.view(shape) * (self.margins.view(shape) + scores)


def logits_of(section: LossSection, dims: tuple[int, ...], *, is_distance: bool, device: torch.device) -> Logits:
    """Return each sub-model's margin and temperature.

    A distance grows with the number of units, so one margin for all prefixes leaves the small ones no room;
    gamma_i = gamma sqrt(d_i / d_n) with a_i = sqrt(d_n / d_i) does. Models that share no columns, such as a student and
    its teacher, are themselves, with columns of the same size, with d_i / d_n and d_n / d_i. Products cross 0 and need
    neither.
    """
    sizes = torch.tensor(dims, dtype=torch.get_default_dtype(), device=device)
    ratio, ones = sizes / sizes[-1], torch.ones_like(sizes)
    growths = {"sqrt": ratio.sqrt(), "linear": ratio, "equal": ones, "one": ones}
    if not is_distance:
        return Logits(torch.zeros_like(sizes), ones)
    return Logits(
        margins=section.margin * growths[section.margin_scaling],
        temperatures=1 / growths[section.temperature],
    )
