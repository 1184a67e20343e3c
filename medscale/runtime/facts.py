"""What a manifest says of a tier, in one shape for both formats, and refused where it makes no sense."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from medscale.errors import DamagedTierError
from medscale.manifest import MANIFEST, Manifest
from medscale.runtime.precision import PRECISIONS, Precision, stored_width
from medscale.runtime.scoring import SCORERS, ExportedScorer, exported_scorer, unit_weights

__all__ = ["LAYOUTS", "SHARDINGS", "Base", "Layout", "Sharding", "TierFacts"]

Layout = Literal["full", "delta", "rows"]
Sharding = Literal["range", "hash"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)

#: counts in facts are below this, so that int64 arithmetic on them cannot wrap
LARGEST = 1 << 48
#: an export of more shards than that is none of ours
MOST_SHARDS = 1 << 20


@dataclass(frozen=True)
class Base:
    """The tier that a delta goes on top of."""

    tier: str
    #: hashes of its cuts
    payload: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TierFacts:
    """The facts of a manifest, checked one by one and against each other. `FORMAT.md` explains them."""

    #: the manifest, for messages
    source: str
    #: as they stand in the manifest
    raw: Mapping[str, Any]
    #: version of the format
    format: int
    tier: str
    run: str
    step: int
    graph_sha256: str
    layout: Layout
    precision: Precision
    sharding: Sharding
    base: Base | None
    #: where cuts end, in units; the last is `dim`
    cuts: tuple[int, ...]
    #: one hash per cut; () in format 1
    payload: tuple[str, ...]
    first_entity: int
    num_entities: int
    num_relations: int
    shard_rows: int
    num_shards: int
    scorer_name: str
    scorer: ExportedScorer
    norm: str
    dims: tuple[int, ...]
    damping: tuple[float, ...]
    reciprocal: bool
    entity_types: tuple[str, ...]

    @classmethod
    def of(cls, directory: Path, manifest: Manifest) -> "TierFacts":
        """Return the facts of a tier's manifest.

        Raises:
            DamagedTierError: one is missing, of another type, or contradicts another; names manifest and fact.

        """
        source, raw = str(directory / MANIFEST), manifest.facts
        checks = _CHECKS | (_CHECKS_1 if manifest.format == 1 else _CHECKS_2)
        wrong = next((key for key, sound in checks.items() if key not in raw or not sound(raw[key])), None)
        if wrong is None and (raw["scorer"], raw["norm"]) not in SCORERS:
            wrong = "scorer"
        if wrong is None:
            facts = cls._built(source, manifest)
            wrong = next(_contradictions(facts), None)
            if wrong is None:
                return facts
        raise DamagedTierError(f"{source}: the fact {wrong!r} is missing or makes no sense; export the tier again")

    @classmethod
    def _built(cls, source: str, manifest: Manifest) -> "TierFacts":
        raw = manifest.facts
        later: dict[str, Any] = {
            "layout": "full", "precision": "float32", "sharding": "range", "cuts": [raw["dim"]], "payload": [],
            "first_entity": 0, "entity_types": [], "num_shards": -(-raw["num_entities"] // raw["shard_rows"]),
        }  # fmt: skip
        if manifest.format > 1:
            later = {key: raw[key] for key in later}
        later = {key: tuple(value) if isinstance(value, list) else value for key, value in later.items()}
        base = raw.get("base")
        same = ("tier", "run", "step", "graph_sha256", "num_entities", "num_relations", "shard_rows", "norm")
        plain: dict[str, Any] = {key: raw[key] for key in same}
        return cls(
            source=source,
            raw=MappingProxyType(dict(raw)),
            format=manifest.format,
            base=base and Base(base["tier"], tuple(base["payload"])),
            scorer_name=raw["scorer"],
            scorer=exported_scorer(raw["scorer"], raw["norm"]),
            dims=tuple(raw["dims"]),
            damping=tuple(raw["damping"]),
            reciprocal=raw["reciprocal"],
            **later,
            **plain,
        )

    @property
    def dim(self) -> int:
        """Units of a whole row."""
        return self.cuts[-1]

    @property
    def unit_columns(self) -> int:
        """Columns of an entity's unit."""
        return len(self.scorer.entity_unit)

    @property
    def relation_unit_columns(self) -> int:
        """Columns of a relation's unit."""
        return len(self.scorer.relation_unit)

    @property
    def num_relation_rows(self) -> int:
        """Relations, and with `reciprocal` their inverses."""
        return self.num_relations * (2 if self.reciprocal else 1)

    @property
    def stop_entity(self) -> int:
        """The id after that of the last row."""
        return self.first_entity + self.num_entities

    @property
    def own_units(self) -> tuple[int, ...]:
        """Units of each cut that the tier's own files hold."""
        units = np.diff([0, *self.cuts]).tolist()
        return tuple(units[-1:] if self.layout == "delta" else units)

    @property
    def own_columns(self) -> tuple[int, ...]:
        """Columns of an entity row of each cut that the tier's own files hold."""
        return tuple(units * self.unit_columns for units in self.own_units)

    @property
    def own_width(self) -> int:
        """Stored numbers of a row in the tier's own files."""
        return sum(stored_width(self.precision, columns) for columns in self.own_columns)

    @property
    def own_norms(self) -> int:
        """Columns of `norms` in the tier's own files; 0: none."""
        if self.format == 1 or self.scorer.geometry != "product":
            return 0
        return len(self.own_units) - (self.layout != "delta")

    @property
    def weights(self) -> NDArray[np.float64]:
        """float64[dim]: each unit's weight in the score."""
        return unit_weights(self.dims, self.damping)


def _contradictions(facts: TierFacts) -> Iterator[str]:
    """Yield the names of facts that others deny."""
    raw, unit, relation_unit = facts.raw, facts.unit_columns, facts.relation_unit_columns
    expected = {
        "dim": facts.dim, "unit_columns": unit, "relation_unit_columns": relation_unit, "columns": facts.dim * unit,
        "relation_columns": facts.dim * relation_unit,
        "units": {"entity": list(facts.scorer.entity_unit), "relation": list(facts.scorer.relation_unit)},
        "num_shards": -(-facts.num_entities // facts.shard_rows),
    }  # fmt: skip
    yield from (key for key, value in expected.items() if raw.get(key, value) != value)
    if facts.num_shards > MOST_SHARDS or facts.stop_entity >= LARGEST:
        yield "num_entities"
    if raw["tiers"].get(facts.tier) != facts.dim:
        yield "tiers"
    if facts.dims[-1] != facts.dim:
        yield "dims"
    if len(facts.damping) != len(facts.dims) - 1:
        yield "damping"
    if not set(facts.cuts) <= set(facts.dims):
        yield "cuts"
    if facts.format > 1:
        yield from _contradictions_of_layout(facts)


def _contradictions_of_layout(facts: TierFacts) -> Iterator[str]:
    if len(facts.payload) != len(facts.cuts):
        yield "payload"
    if (facts.base is None) != (facts.layout == "full"):
        yield "base"
    if (facts.first_entity > 0) != (facts.layout == "rows"):
        yield "first_entity"
    if facts.layout == "delta" and (facts.base is None or facts.base.payload != facts.payload[:-1]):
        yield "base"


def _count(value: Any) -> bool:
    return type(value) is int and 0 < value < LARGEST


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _rising(value: Any) -> bool:
    if not isinstance(value, list) or not value or not all(map(_count, value)):
        return False
    return all(a < b for a, b in itertools.pairwise(value))


def _kappas(value: Any) -> bool:
    return isinstance(value, list) and all(type(kappa) in (int, float) and 0 < kappa <= 1 for kappa in value)


def _sizes(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_count, value.values()))


def _units(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"entity", "relation"}


def _hashes(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_hash, value))


def _hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _base(value: Any) -> bool:
    if value is None:
        return True
    whole = isinstance(value, dict) and set(value) == {"tier", "payload"}
    return whole and _text(value["tier"]) and _hashes(value["payload"])


def _distinct(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value)) and len(set(value)) == len(value)


def _one_of(allowed: tuple[str, ...]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in allowed


#: what each fact must be by itself
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "run": _text, "step": _whole, "graph": _text, "graph_sha256": _text, "tier": _text, "dim": _count, "tiers": _sizes,
    "num_entities": _count, "num_relations": _count, "shard_rows": _count, "scorer": _text, "norm": _text,
    "dims": _rising, "damping": _kappas, "reciprocal": lambda value: type(value) is bool, "units": _units,
    "unit_columns": _count, "relation_unit_columns": _count, "columns": _count, "relation_columns": _count,
}  # fmt: skip
_CHECKS_1: dict[str, Callable[[Any], bool]] = {"dtype": _one_of(("float32",))}
_CHECKS_2: dict[str, Callable[[Any], bool]] = {
    "layout": _one_of(LAYOUTS), "precision": _one_of(PRECISIONS), "sharding": _one_of(SHARDINGS), "base": _base,
    "cuts": _rising, "payload": _hashes, "first_entity": _whole, "num_shards": _count, "entity_types": _distinct,
}  # fmt: skip
