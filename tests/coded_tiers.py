"""Tiers at every precision, cut and sharding, written file by file as FORMAT.md says, beside what they decode to."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from small_tables import UNIT_COLUMNS, MemoryTables, export

from medscale.runtime import Tier
from medscale.runtime.precision import PRECISIONS, Precision, decode, encode
from medscale.split import ModelFacts

__all__ = ["PRECISIONS", "coded_rows", "coded_tier"]


def coded_rows(
    rows_NC: np.ndarray, precision: Precision, cuts: Sequence[int], unit_columns: int
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Return rows as stored [N, width], their scales [N, cuts], and what they decode to [N, columns]."""
    widths = [int(w) * unit_columns for w in np.diff([0, *cuts])]
    ends = np.cumsum(widths)
    parts = [encode(np.ascontiguousarray(rows_NC[:, e - w : e]), precision) for w, e in zip(widths, ends, strict=True)]
    stored = np.concatenate([part for part, _ in parts], 1)
    scales = np.stack([s for _, s in parts if s is not None], 1) if parts[0][1] is not None else None
    return stored, scales, decode(stored, scales, precision, widths)


def coded_tier(
    directory: Path, facts: ModelFacts, tables: MemoryTables, dim: int, precision: Precision,
    cuts: Sequence[int], *, shard_rows: int = 1000, sharding: str = "range",
) -> tuple[Tier, Mapping[str, Any], Path]:  # fmt: skip
    """Return a float32 tier of what the rows decode to, the facts of the coded tier, and the directory of its files."""
    columns = dim * UNIT_COLUMNS[facts.scorer]
    stored, scales, decoded = coded_rows(tables.entities[:, :columns], precision, cuts, UNIT_COLUMNS[facts.scorer])
    below = tuple(d for d in facts.dims if d <= dim)
    cropped = dataclasses.replace(facts, dims=below, damping=facts.damping[: len(below) - 1])
    export(directory / "plain", cropped, MemoryTables(decoded, tables.relation_rows), {"tier": dim})
    tier = Tier.open(directory / "plain" / "tier")
    coded = directory / "coded"
    coded.mkdir()
    (coded / "relations.safetensors").write_bytes((directory / "plain" / "tier" / "relations.safetensors").read_bytes())
    count = -(-len(decoded) // shard_rows)
    # any function of the entity will do for what reads the files by their own `ids`
    shard_of = np.arange(len(decoded)) * 7 % count if sharding == "hash" else np.arange(len(decoded)) // shard_rows
    for index in range(count):
        ids = np.flatnonzero(shard_of == index)
        tensors = {"vectors": stored[ids]}
        if scales is not None:
            tensors["scales"] = scales[ids]
        if sharding == "hash":
            tensors["ids"] = ids
        safetensors.numpy.save_file(tensors, coded / f"entities-{index:05d}-of-{count:05d}.safetensors")
    changed = {"precision": precision, "cuts": list(cuts), "sharding": sharding, "shard_rows": shard_rows}
    return tier, {**tier.facts, **changed}, coded
