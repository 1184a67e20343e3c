"""The files of a tier: their names, which ones an entity needs, and their tensors, checked against the facts."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medscale.errors import DamagedTierError, ExportError, MedscaleError, UnknownNameError
from medscale.manifest import Manifest, read_manifest
from medscale.runtime.facts import TierFacts
from medscale.runtime.names import NameTable
from medscale.runtime.precision import stored_dtype
from medscale.runtime.scoring import Array
from medscale.runtime.shards import map_tensors
from medscale.storage import safe_join

__all__ = [
    "INDEX",
    "RELATIONS",
    "TIER_FORMATS",
    "TIER_KIND",
    "TierFiles",
    "needed_files",
    "shard_name",
    "shard_names_name",
    "shard_of_name",
]

TIER_KIND = "tier"
#: versions of the format that are read
TIER_FORMATS = (1, 2)

RELATIONS = "relations.safetensors"
INDEX = "index.safetensors"
#: all names of a tier of format 1
NAMES_1 = "names.safetensors"

#: dtype and shape by name; -1 is any length
_Expected = dict[str, tuple[str, tuple[int, ...]]]

_FNV_OFFSET, _FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3


def shard_name(index: int, count: int) -> str:
    """Return the name of the file that holds the rows of a shard."""
    return f"entities-{index:05d}-of-{count:05d}.safetensors"


def shard_names_name(index: int, count: int) -> str:
    """Return the name of the file that holds the names of a shard's rows."""
    return f"names-{index:05d}-of-{count:05d}.safetensors"


def shard_of_name(name: str, num_shards: int) -> int:
    """Return the shard of an entity where shards go by the hash of names: FNV-1a with 64 bits of the UTF-8 bytes."""
    value = _FNV_OFFSET
    for byte in name.encode("utf-8", "surrogatepass"):
        value = (value ^ byte) * _FNV_PRIME & 0xFFFFFFFFFFFFFFFF
    return value % num_shards


class TierFiles:
    """The tensors of a tier's files, each checked to be what the facts promise."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self.facts = TierFacts.of(directory, manifest)

    @classmethod
    def of(cls, directory: Path) -> "TierFiles":
        """Return the files of a directory's manifest; what they hold is not read.

        Raises:
            ExportError: there is no manifest, or it is damaged, or makes no sense.

        """
        return cls(directory, read_manifest(directory, TIER_KIND, TIER_FORMATS, DamagedTierError))

    def is_here(self, name: str) -> bool:
        """Tell whether a file is there: of a tier that was fetched in part, some are not."""
        return (self.directory / name).is_file()

    def tensors(self, name: str, expected: _Expected) -> dict[str, Array]:
        """Map a file's tensors, which must be those of `expected`.

        Raises:
            ExportError: the file is not listed, unsound, or holds other tensors.

        """
        if name not in self.manifest.files:
            raise DamagedTierError(f"{self.directory} is incomplete: its manifest does not list {name}")
        path = safe_join(self.directory, name)
        tensors = map_tensors(path)
        for key, (dtype, shape) in expected.items():
            found = tensors.get(key)
            fits = found is not None and found.dtype == np.dtype(dtype) and _fits(found.shape, shape)
            if not fits:
                what = "no such tensor" if found is None else f"{found.dtype} {list(found.shape)}"
                raise DamagedTierError(f"{path}: {key!r} should be {np.dtype(dtype)} {list(shape)}, found {what}")
        extra = sorted(tensors.keys() - expected.keys())
        if extra:
            raise DamagedTierError(f"{path} holds a tensor {extra[0]!r}, which a tier of its facts has not")
        return tensors

    def shard(self, index: int) -> dict[str, Array]:
        """Map the rows of a shard: vectors, and scales, norms and ids where there are any."""
        facts, rows = self.facts, -1
        if facts.sharding == "range":
            rows = min(facts.shard_rows, facts.num_entities - index * facts.shard_rows)
        expected: _Expected = {"vectors": (str(stored_dtype(facts.precision)), (rows, facts.own_width))}
        if facts.precision in ("int8", "int4"):
            expected["scales"] = ("<f4", (rows, len(facts.own_units)))
        if facts.own_norms:
            expected["norms"] = ("<f4", (rows, facts.own_norms))
        if facts.sharding == "hash":
            expected["ids"] = ("<i8", (rows,))
        name = shard_name(index, facts.num_shards)
        tensors = self.tensors(name, expected)
        if len({len(tensor) for tensor in tensors.values()}) > 1:
            raise DamagedTierError(f"{self.directory / name}: its tensors differ in number of rows")
        if "ids" in tensors:
            self._check_ids(name, tensors["ids"])
        return tensors

    def _check_ids(self, name: str, ids: Array) -> None:
        facts = self.facts
        inside = not len(ids) or (ids[0] >= facts.first_entity and ids[-1] < facts.stop_entity)
        if not inside or not (np.diff(ids) > 0).all():
            raise DamagedTierError(f"{self.directory / name}: its ids do not rise, or are none of the tier's")

    def shard_names(self, index: int, rows: int) -> tuple[NameTable, Array | None]:
        """Return the names of a shard's rows, and their types: int32 [rows], or None where there are none."""
        facts, name = self.facts, shard_names_name(index, self.facts.num_shards)
        types: _Expected = {"entity_type": ("<i4", (rows,))} if facts.entity_types else {}
        tensors = self.tensors(name, _name_tensors("entity", rows) | types)
        kinds = tensors.get("entity_type")
        if kinds is not None and len(kinds) and (kinds.min() < -1 or kinds.max() >= len(facts.entity_types)):
            raise DamagedTierError(
                f"{self.directory / name}: a type is none of the {len(facts.entity_types)} of the tier"
            )
        return self._table("entity", name, tensors), kinds

    def all_names(self) -> tuple[NameTable, NameTable]:
        """Return the names of entities and of relations of a tier of format 1."""
        facts = self.facts
        expected = _name_tensors("entity", facts.num_entities) | _name_tensors("relation", facts.num_relations)
        tensors = self.tensors(NAMES_1, expected)
        return self._table("entity", NAMES_1, tensors), self._table("relation", NAMES_1, tensors)

    def relations(self) -> tuple[Array, NameTable | None]:
        """Return relation rows, float32 [rows, own columns], and names where the file holds them."""
        facts = self.facts
        shape = (facts.num_relation_rows, sum(facts.own_units) * facts.relation_unit_columns)
        expected: _Expected = {"vectors": ("<f4", shape)}
        if facts.format == 1 or facts.layout == "delta":
            return self.tensors(RELATIONS, expected)["vectors"], None
        tensors = self.tensors(RELATIONS, expected | _name_tensors("relation", facts.num_relations))
        return tensors["vectors"], self._table("relation", RELATIONS, tensors)

    def index(self) -> Array:
        """Return the shard of each entity, int32 [num_entities], of a tier whose shards go by hashes."""
        shards = self.tensors(INDEX, {"shard": ("<i4", (self.facts.num_entities,))})["shard"]
        if shards.min() < 0 or shards.max() >= self.facts.num_shards:
            raise DamagedTierError(
                f"{self.directory / INDEX}: a shard is none of the {self.facts.num_shards} of the tier"
            )
        return shards

    def _table(self, what: str, name: str, tensors: Mapping[str, Array]) -> NameTable:
        data, offsets, order = (tensors[f"{what}_{key}"] for key in ("bytes", "offsets", "order"))
        return NameTable(what, str(self.directory / name), data, offsets, order)

    def optional(self) -> frozenset[str]:
        """Return the files that may be missing where a tier was fetched in part: all but the relations."""
        return frozenset(self.manifest.files) - {RELATIONS}


def _name_tensors(what: str, number: int) -> _Expected:
    offsets = -1 if number < 0 else number + 1
    return {f"{what}_order": ("<i8", (number,)), f"{what}_offsets": ("<i8", (offsets,)), f"{what}_bytes": ("u1", (-1,))}


def _fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(found) == len(wanted) and all(w in (-1, f) for f, w in zip(found, wanted, strict=True))


def needed_files(path: Path | str, entities: Iterable[str | int]) -> list[str]:
    """Return which files of a tier hold some entities, beside `manifest.json` and `relations.safetensors`.

    Only the manifest has to be here, at `path`, and `index.safetensors` where entities are given by id and shards go by
    hashes (of a delta: its base's, in the directory beside it). Names tell their shard only where shards go by hashes.

    Raises:
        ExportError: an id is out of range, or the manifest alone cannot tell.

    """
    files = TierFiles.of(Path(path).resolve())
    facts, names = files.facts, []
    for shard in sorted({_shard_of(files, entity) for entity in entities}):
        names.append(shard_name(shard, facts.num_shards))
        if facts.format > 1 and facts.layout != "delta":
            names.append(shard_names_name(shard, facts.num_shards))
    return names if facts.format > 1 else [*names, NAMES_1]


def _shard_of(files: TierFiles, entity: Any) -> int:
    facts = files.facts
    if isinstance(entity, str):
        if facts.sharding == "range":
            raise ExportError(
                f"{files.directory}: shards go by ranges of ids, so the manifest cannot tell where {entity!r} is; ask "
                "by id, or fetch all names-*"
            )
        return shard_of_name(entity, facts.num_shards)
    row = int(entity) - facts.first_entity
    if not 0 <= row < facts.num_entities:
        raise UnknownNameError(
            f"unknown entity id {entity}: {files.directory} has ids {facts.first_entity} to {facts.stop_entity - 1}"
        )
    if facts.sharding == "range":
        return row // facts.shard_rows
    if facts.layout == "delta":
        assert facts.base is not None
        try:
            return _shard_of(TierFiles.of(safe_join(files.directory.parent, facts.base.tier)), entity)
        except MedscaleError as cause:
            raise ExportError(f"{files.directory}: the shard of an id stands in its base's {INDEX}: {cause}") from None
    return int(files.index()[row])
