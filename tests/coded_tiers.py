"""Tiers at every precision, cut and sharding, as the export writes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from small_tables import MemoryTables, export

from medscale.runtime import Tier
from medscale.runtime.precision import PRECISIONS, Precision, decode, encode
from medscale.split import ModelFacts

__all__ = ["PRECISIONS", "coded_rows", "coded_tier"]


def coded_rows(rows_NC: np.ndarray, precision: Precision, cuts: Sequence[int], unit_columns: int) -> np.ndarray:
    """Return what rows decode to, [N, columns]."""
    widths = [int(w) * unit_columns for w in np.diff([0, *cuts])]
    ends = np.cumsum(widths)
    parts = [encode(np.ascontiguousarray(rows_NC[:, e - w : e]), precision) for w, e in zip(widths, ends, strict=True)]
    scales = np.stack([s for _, s in parts if s is not None], 1) if parts[0][1] is not None else None
    return decode(np.concatenate([part for part, _ in parts], 1), scales, precision, widths)


def coded_tier(
    directory: Path, facts: ModelFacts, tables: MemoryTables, precision: Precision, cuts: Sequence[int], **section: Any
) -> tuple[Tier, Path]:
    """Export tiers that end at the cuts; return the largest, and where it lies."""
    tiers = {f"to{cut}": cut for cut in cuts}
    export(directory / "export", facts, tables, tiers, precision=precision, formats=(), **section)
    place = (directory / "export" / f"to{cuts[-1]}").resolve()
    return Tier.open(place), place
