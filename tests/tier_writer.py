"""A plain writer of tiers, by the letter of medscale/runtime/FORMAT.md: the obviously right twin of the real one.

It holds everything in memory, goes value by value where that is plainest, and shares no code with the package. It
writes the numeric core alone: Parquet files and other extras are not part of what a reader of the format needs.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1"}
ENTITY_UNIT = {
    "transe": ["value"], "distmult": ["value"], "pairre": ["value"], "rotate": ["re", "im"], "complex": ["re", "im"],
    "simple": ["as head", "as tail"],
}  # fmt: skip
RELATION_UNIT = {
    "transe": ["value"], "distmult": ["value"], "pairre": ["head factor", "tail factor"], "rotate": ["cos", "sin"],
    "complex": ["re", "im"], "simple": ["forward", "inverse"],
}  # fmt: skip
PRODUCTS = ("distmult", "complex", "simple")


@dataclass
class Model:
    """What is exported: tables of the largest tier, names, and what the manifest says of the model."""

    #: float32[num_entities, columns]
    entities: np.ndarray
    #: float32[relation rows, relation columns], as tiers hold them (RotatE: cos and sin)
    relations: np.ndarray
    entity_names: Sequence[str]
    relation_names: Sequence[str]
    scorer: str
    norm: str = "l1"
    dims: tuple[int, ...] = (3, 5, 12)
    damping: tuple[float, ...] = (1.0, 1.0)
    reciprocal: bool = False
    #: names of types, and a place in them for each entity, or -1
    entity_types: Sequence[str] = ()
    types: Sequence[int] = ()
    run: str = "small"
    step: int = 40
    graph: str = "umls"
    graph_sha256: str = "0" * 64


@dataclass
class Format:
    """How it is exported."""

    layout: str = "full"
    precision: str = "float32"
    sharding: str = "range"
    shard_rows: int = 1_000_000
    #: of layout "rows": the id of the first row, and the payload of each tier that it goes on top of
    first_entity: int = 0
    base_payload: Mapping[str, list[str]] = field(default_factory=dict)


def write_tiers(directory: Path, model: Model, tiers: Mapping[str, int], how: Format) -> dict[str, list[str]]:
    """Write every tier into `directory`, and return the payload of each."""
    ordered = sorted(tiers.items(), key=lambda item: (item[1], item[0]))
    payloads: dict[str, list[str]] = {}
    for place, (name, dim) in enumerate(ordered):
        cuts = [units for _, units in ordered[: place + 1]]
        below = ordered[place - 1][0] if place else None
        base = None
        if how.layout == "rows":
            base = {"tier": name, "payload": how.base_payload[name]}
        elif how.layout == "delta" and below is not None:
            base = {"tier": below, "payload": payloads[below]}
        layout = "full" if how.layout == "delta" and below is None else how.layout
        (directory / name).mkdir(parents=True)
        payloads[name] = write_tier(directory / name, model, how, name, dim, dict(ordered), layout, cuts, base)
    return payloads


def write_tier(
    directory: Path, model: Model, how: Format, name: str, dim: int, tiers: dict[str, int], layout: str,
    cuts: list[int], base: dict[str, Any] | None,
) -> list[str]:  # fmt: skip
    number = len(model.entities)
    num_shards = -(-number // how.shard_rows)
    shards = rows_of_shards(model, how, num_shards)
    entity_unit, relation_unit = ENTITY_UNIT[model.scorer], RELATION_UNIT[model.scorer]
    u, v = len(entity_unit), len(relation_unit)
    spans = list(zip([0, *cuts[:-1]], cuts, strict=True))
    own = spans[-1:] if layout == "delta" else spans

    cut_hashes: dict[int, list[bytes]] = {place: [] for place in range(len(spans))}
    for k, rows in enumerate(shards):
        table = model.entities[rows]
        coded = [encode(table[:, a * u : b * u], how.precision) for a, b in spans]
        for place, (stored, scales) in enumerate(coded):
            digest = hashlib.sha256(stored.tobytes())
            if scales is not None:
                digest.update(scales.tobytes())
            cut_hashes[place].append(digest.digest())
        mine = coded[-1:] if layout == "delta" else coded
        tensors = {"vectors": np.concatenate([stored for stored, _ in mine], axis=1)}
        if how.precision in ("int8", "int4"):
            tensors["scales"] = np.stack([scales for _, scales in mine], axis=1)
        if model.scorer in PRODUCTS:
            bounded = [(c, (b - a) * u) for c, (a, b) in zip(mine, own, strict=True)]
            bounded = bounded if layout == "delta" else bounded[1:]
            norms = [norms_of(decode(*c, how.precision, columns)) for c, columns in bounded]
            if norms:
                tensors["norms"] = np.stack(norms, axis=1)
        if how.sharding == "hash":
            tensors["ids"] = np.array([how.first_entity + row for row in rows], "<i8")
        write_safetensors(directory / f"entities-{k:05d}-of-{num_shards:05d}.safetensors", tensors)
        if layout != "delta":
            names = name_tensors("entity", [model.entity_names[row] for row in rows])
            if model.entity_types:
                names["entity_type"] = np.array([model.types[row] for row in rows], "<i4")
            write_safetensors(directory / f"names-{k:05d}-of-{num_shards:05d}.safetensors", names)

    start = own[0][0] * v
    relations = {"vectors": np.ascontiguousarray(model.relations[:, start : dim * v])}
    if layout != "delta":
        relations |= name_tensors("relation", model.relation_names)
    write_safetensors(directory / "relations.safetensors", relations)
    if how.sharding == "hash" and layout != "delta":
        shard = np.zeros(number, "<i4")
        for k, rows in enumerate(shards):
            shard[rows] = k
        write_safetensors(directory / "index.safetensors", {"shard": shard})

    payload = [hashlib.sha256(b"".join(cut_hashes[place])).hexdigest() for place in range(len(spans))]
    levels = [d for d in model.dims if d <= dim]
    facts = {
        "run": model.run, "step": model.step, "graph": model.graph, "graph_sha256": model.graph_sha256,
        "scorer": model.scorer, "norm": model.norm, "damping": list(model.damping[: len(levels) - 1]), "dims": levels,
        "reciprocal": model.reciprocal, "tier": name, "dim": dim, "tiers": tiers, "layout": layout,
        "precision": how.precision, "sharding": how.sharding, "base": base, "cuts": cuts, "payload": payload,
        "first_entity": how.first_entity, "units": {"entity": entity_unit, "relation": relation_unit},
        "unit_columns": u, "relation_unit_columns": v, "columns": dim * u, "relation_columns": dim * v,
        "num_entities": number, "num_relations": len(model.relation_names), "shard_rows": how.shard_rows,
        "num_shards": num_shards, "entity_types": list(model.entity_types),
    }  # fmt: skip
    write_manifest(directory, facts)
    return payload


def rows_of_shards(model: Model, how: Format, num_shards: int) -> list[list[int]]:
    """Return the rows of each shard, counted from the first one exported."""
    shards: list[list[int]] = [[] for _ in range(num_shards)]
    for row, name in enumerate(model.entity_names):
        shards[fnv1a(name) % num_shards if how.sharding == "hash" else row // how.shard_rows].append(row)
    return shards


def fnv1a(name: str) -> int:
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def encode(cut: np.ndarray, precision: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the stored numbers of a cut, a row each, and the scale of each row."""
    if precision in ("float32", "float16"):
        return np.ascontiguousarray(cut).astype("<f4" if precision == "float32" else "<f2"), None
    largest = {"int8": 127, "int4": 7}[precision]
    rows, scales = [], []
    for row in cut:
        scale = np.float32(max((abs(x) for x in row), default=np.float32(0)) / np.float32(largest))
        values = [int(np.rint(x / scale)) if scale > 0 else 0 for x in row]
        values = [min(max(value, -largest), largest) for value in values]
        if precision == "int4":
            nibbles = [value + 8 for value in values] + [8] * (len(values) % 2)
            values = [low | high << 4 for low, high in zip(nibbles[0::2], nibbles[1::2], strict=True)]
        rows.append(values)
        scales.append(scale)
    width = (cut.shape[1] + 1) // 2 if precision == "int4" else cut.shape[1]
    stored = np.array(rows, "i1" if precision == "int8" else "u1").reshape(len(cut), width)
    return stored, np.array(scales, "<f4")


def decode(stored: np.ndarray, scales: np.ndarray | None, precision: str, columns: int) -> np.ndarray:
    """Return the float32 numbers of a cut."""
    if scales is None:
        return stored.astype("<f4")
    found = np.zeros((len(stored), columns), "<f4")
    for i, j in np.ndindex(found.shape):
        byte = int(stored[i, j] if precision == "int8" else stored[i, j // 2])
        value = byte if precision == "int8" else (byte >> 4 if j % 2 else byte & 15) - 8
        found[i, j] = np.float32(value) * scales[i]
    return found


def norms_of(rows: np.ndarray) -> np.ndarray:
    """Return the Euclidean norm of each row, rounded up to float32."""
    found = []
    for row in rows:
        norm = math.sqrt(math.fsum(float(x) ** 2 for x in row))
        rounded = np.float32(norm)
        found.append(rounded if float(rounded) >= norm else np.nextafter(rounded, np.float32(np.inf)))
    return np.array(found, "<f4")


def name_tensors(what: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    coded = [name.encode() for name in names]
    return {
        f"{what}_order": np.array(sorted(range(len(coded)), key=lambda row: coded[row]), "<i8"),
        f"{what}_offsets": np.cumsum([0, *map(len, coded)], dtype="<i8"),
        f"{what}_bytes": np.frombuffer(b"".join(coded), "u1"),
    }


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    header, data = {}, b""
    for name, array in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        dtype = next(key for key, value in DTYPES.items() if np.dtype(value) == array.dtype)
        body = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(body)]}
        data += body
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_manifest(directory: Path, facts: Mapping[str, Any], format_version: int = 2) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(directory.iterdir())
        if path.name != "manifest.json" and not path.name.startswith(".verified")
    }
    content: dict[str, Any] = {"kind": "tier", "format": format_version, "facts": dict(facts), "files": files}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["seal"] = hashlib.sha256(text.encode()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
