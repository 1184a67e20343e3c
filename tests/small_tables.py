"""Small trained-like tables in memory, and the scores that they must give, one plain loop per scorer."""

import cmath
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from medscale.config import ExportSection
from medscale.split import CHUNK_BYTES, EntityTypes, Extra, ModelFacts, WrittenTier, write_export

#: every scorer with its norm
SCORERS = [
    ("transe", "l1"),
    ("transe", "l2"),
    ("rotate", "l1"),
    ("pairre", "l1"),
    ("simple", "l1"),
    ("complex", "l1"),
    ("distmult", "l1"),
]
UNIT_COLUMNS = {"transe": 1, "distmult": 1, "pairre": 1, "rotate": 2, "complex": 2, "simple": 2}
RELATION_UNIT_COLUMNS = {"transe": 1, "distmult": 1, "rotate": 1, "pairre": 2, "complex": 2, "simple": 2}


@dataclass
class MemoryTables:
    """A `TableSource` over arrays; remembers the largest read."""

    entities: np.ndarray
    relation_rows: np.ndarray
    largest_read: int = 0

    def entity_columns(self, start: int, stop: int, num_columns: int) -> np.ndarray:
        rows = self.entities[start:stop, :num_columns]
        self.largest_read = max(self.largest_read, rows.nbytes)
        return rows

    def entity_rows(self, entities: np.ndarray, num_columns: int) -> np.ndarray:
        rows = self.entities[entities, :num_columns]
        self.largest_read = max(self.largest_read, rows.nbytes)
        return rows

    def relations(self, num_columns: int) -> np.ndarray:
        return self.relation_rows[:, :num_columns]


def small_tables(facts: ModelFacts, num_entities: int, num_relations: int, seed: int = 0) -> MemoryTables:
    """Return random tables as a model of these facts would have trained them."""
    draw = np.random.default_rng(seed)
    dim, rows = facts.dims[-1], num_relations * (2 if facts.reciprocal else 1)
    entities = draw.normal(size=(num_entities, dim * UNIT_COLUMNS[facts.scorer]))
    relations = draw.normal(size=(rows, dim * RELATION_UNIT_COLUMNS[facts.scorer]))
    return MemoryTables(entities.astype(np.float32), relations.astype(np.float32))


def model_facts(scorer: str = "transe", norm: str = "l1", **changes: object) -> ModelFacts:
    """Return the facts of a model with three sub-models."""
    defaults: dict[str, object] = {
        "run": "small", "step": 40, "graph": "umls", "graph_sha256": "0" * 64, "scorer": scorer, "norm": norm,
        "damping": (1.0, 1.0), "dims": (3, 5, 12), "reciprocal": False,
    }  # fmt: skip
    return ModelFacts(**(defaults | changes))  # type: ignore[arg-type]


def export(
    directory: Path,
    facts: ModelFacts,
    tables: MemoryTables,
    tiers: dict[str, int],
    *,
    chunk_bytes: int = CHUNK_BYTES,
    threads: int | None = None,
    base: Path | None = None,
    extras: Sequence[Extra] = (),
    types: EntityTypes | None = None,
    **section: Any,
) -> tuple[WrittenTier, ...]:
    """Export tables whose entities are named e0, e1, ... and whose relations are named r0, r1, ..."""
    num_relations = len(tables.relation_rows) // (2 if facts.reciprocal else 1)
    return write_export(
        tables,
        pa.array([f"e{i}" for i in range(len(tables.entities))]),
        pa.array([f"r{i}" for i in range(num_relations)]),
        facts,
        tiers,
        directory,
        ExportSection(**section),
        chunk_bytes=chunk_bytes,
        threads=threads,
        base=base,
        extras=extras,
        entity_types=types,
    )


def plain_score(
    facts: ModelFacts, dim: int, head: np.ndarray, relation: np.ndarray, tail: np.ndarray
) -> tuple[float, float]:
    """Return one triple's score at `dim` units, unit by unit in float64, and the size of what it sums up."""
    u, v = UNIT_COLUMNS[facts.scorer], RELATION_UNIT_COLUMNS[facts.scorer]
    total, size, start = 0.0, 0.0, 0
    for kappa, stop in zip((1.0, *facts.damping), facts.dims, strict=True):
        if stop > dim:
            break
        level = 0.0
        for unit in range(start, stop):
            h, t = ([float(x) for x in row[unit * u : (unit + 1) * u]] for row in (head, tail))
            r = [float(x) for x in relation[unit * v : (unit + 1) * v]]
            level += _unit_score(facts.scorer, facts.norm, h, r, t)
            size += sum(abs(x) for x in (*h, *r, *t)) * max(1.0, *(abs(x) for x in (*h, *r, *t))) ** 2
        total = level + kappa * total
        start = stop
    return (-math.sqrt(-total) if facts.norm == "l2" else total), size


def _unit_score(scorer: str, norm: str, h: list[float], r: list[float], t: list[float]) -> float:
    if scorer == "transe":
        return -abs(h[0] + r[0] - t[0]) if norm == "l1" else -((h[0] + r[0] - t[0]) ** 2)
    if scorer == "rotate":
        return -abs(complex(*h) * cmath.exp(1j * r[0]) - complex(*t))
    if scorer == "pairre":
        return -abs(h[0] * r[0] - t[0] * r[1])
    if scorer == "simple":
        return (h[0] * r[0] * t[1] + t[0] * r[1] * h[1]) / 2
    if scorer == "complex":
        return (complex(*h) * complex(*r) * complex(*t).conjugate()).real
    return h[0] * r[0] * t[0]
