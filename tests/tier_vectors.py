"""Test vectors of the format of tiers: small exports, and what any reader must find in them (`expected.json`).

`python tests/tier_vectors.py` writes tests/vectors/format2-* and expected.json anew, with the plain writer and plain
loops; format1 was written by the medscale of that time. In expected.json every record has `tier`, the directory to
open; `upgrade`, directories to put on top, one after the other; `vectors` by entity name; `scores` of triples; `top_k`
of tails and `top_k_heads` of heads, scores as float64 sums rounded to float32, best first, equal ones by id.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from tier_writer import ENTITY_UNIT, PRODUCTS, RELATION_UNIT, Format, Model, decode, encode, write_tiers

VECTORS = Path(__file__).with_name("vectors")
NAMES = ["", "a", "ab", "b", "é", "日本語", "\U0001f600", "a b", "user/1", "0", "~"]
LATER = ["new/1", "zz", "A"]
RELATIONS = ["likes", "knows"]
TIERS = {"phone": 2, "pc": 3, "server": 6}

#: by name: scorer, norm, how it is written, and whether rows join later
CASES: dict[str, tuple[str, str, Format, bool]] = {
    "transe-l1-full-float32-range": ("transe", "l1", Format("full", "float32", "range", 4), False),
    "transe-l2-delta-float32-hash": ("transe", "l2", Format("delta", "float32", "hash", 4), False),
    "rotate-full-float16-hash": ("rotate", "l1", Format("full", "float16", "hash", 3), False),
    "rotate-delta-int8-range": ("rotate", "l1", Format("delta", "int8", "range", 5), False),
    "pairre-full-int4-hash": ("pairre", "l1", Format("full", "int4", "hash", 4), False),
    "complex-delta-int8-hash": ("complex", "l1", Format("delta", "int8", "hash", 4), True),
    "complex-delta-float16-range": ("complex", "l1", Format("delta", "float16", "range", 4), False),
    "simple-delta-int4-range": ("simple", "l1", Format("delta", "int4", "range", 4), True),
    "distmult-full-int8-range": ("distmult", "l1", Format("full", "int8", "range", 100), True),
}


def model_of(case: str) -> tuple[Model, Model]:
    """Return the model of a case, and the one that has rows more."""
    scorer, norm, _, _ = CASES[case]
    draw = np.random.default_rng(list(CASES).index(case))
    u, v = len(ENTITY_UNIT[scorer]), len(RELATION_UNIT[scorer])
    entities = draw.normal(size=(len(NAMES) + len(LATER), 6 * u)).astype("<f4")
    relations = draw.normal(size=(2 * len(RELATIONS), 6 * v)).astype("<f4")
    entities[3, 0], entities[4, : 2 * u] = -0.0, 0
    typed = {"entity_types": ["thing", "日本"], "types": [i % 3 - 1 for i in range(len(entities))]}
    facts: dict[str, Any] = {
        "scorer": scorer, "norm": norm, "dims": (2, 3, 6), "damping": (0.5, 0.25), "reciprocal": True, "run": "vectors",
        "graph": "vectors", **(typed if scorer in PRODUCTS else {}),
    }  # fmt: skip
    number = len(NAMES)
    before = Model(entities[:number], relations, NAMES, RELATIONS, **facts)
    return before, Model(entities, relations, [*NAMES, *LATER], RELATIONS, **facts)


def write_case(directory: Path, case: str) -> None:
    """Write the tiers of a case, and under `rows` those of the rows that joined."""
    how, more = CASES[case][2:]
    before, after = model_of(case)
    payloads = write_tiers(directory, before, TIERS, how)
    if more:
        number = len(before.entities)
        joined = Model(**{**vars(after), "entities": after.entities[number:], "entity_names": LATER, "step": 60})
        if joined.types:
            joined.types = joined.types[number:]
        rows = Format("rows", how.precision, how.sharding, 2, number, payloads)
        write_tiers(directory / "rows", joined, TIERS, rows)


def expected_of(case: str) -> list[dict[str, Any]]:
    """Return what is to be found in each tier of a case."""
    how, more = CASES[case][2:]
    before, after = model_of(case)
    records = []
    for name, dim in TIERS.items():
        records.append(record_of(before, how.precision, dim) | {"tier": f"format2-{case}/{name}", "upgrade": []})
    if more:
        found = record_of(after, how.precision, dim)
        records.append(found | {"tier": f"format2-{case}/server", "upgrade": [f"format2-{case}/rows/server"]})
    if how.layout == "delta":
        found = record_of(before, how.precision, dim)
        steps = [f"format2-{case}/{name}" for name in ("pc", "server")]
        records.append(found | {"tier": f"format2-{case}/phone", "upgrade": steps})
    return records


def expected_of_format_1() -> list[dict[str, Any]]:
    """Return what is to be found in the tiers of format 1, read with the format's own library."""
    records = []
    for name, dims in (("phone", (3,)), ("server", (3, 5, 12))):
        directory = VECTORS / "format1" / name
        shards = [safetensors.numpy.load_file(path)["vectors"] for path in sorted(directory.glob("entities-*.safet*"))]
        relations = safetensors.numpy.load_file(directory / "relations.safetensors")["vectors"]
        model = Model(
            np.concatenate(shards), relations, NAMES, RELATIONS, "complex", dims=dims,
            damping=(0.5, 0.25)[: len(dims) - 1], reciprocal=True,
        )  # fmt: skip
        records.append(record_of(model, "float32", dims[-1]) | {"tier": f"format1/{name}", "upgrade": []})
    return records


def record_of(model: Model, precision: str, dim: int) -> dict[str, Any]:
    u, names, cuts = len(ENTITY_UNIT[model.scorer]), model.entity_names, [d for d in TIERS.values() if d <= dim]
    cuts = cuts if dim in cuts else [dim]
    parts = [model.entities[:, a * u : b * u] for a, b in zip([0, *cuts[:-1]], cuts, strict=True)]
    rows = np.concatenate([decode(*encode(part, precision), precision, part.shape[1]) for part in parts], axis=1)
    number = len(model.relation_names)

    def score(h: int, relation: int, t: int) -> float:
        return float(np.float32(plain_score(model, dim, rows[h], model.relations[relation], rows[t])))

    def best(scores: list[float], k: int) -> dict[str, Any]:
        order = sorted(range(len(rows)), key=lambda i: (-scores[i], i))[:k]
        return {"k": k, "names": [names[i] for i in order], "scores": [scores[i] for i in order]}

    triples = [(0, 0, 1), (4, 1, 5), (len(rows) - 1, 0, 3)]
    both = [
        float(np.float32((plain_score(model, dim, rows[h], model.relations[r], rows[t])
                          + plain_score(model, dim, rows[t], model.relations[number + r], rows[h])) / 2))
        for h, r, t in triples
    ]  # fmt: skip
    asked = range(len(rows))
    return {
        "vectors": {names[i]: [float(x) for x in rows[i]] for i in (0, 3, 4, len(rows) - 1)},
        "scores": [
            [names[h], model.relation_names[r], names[t], s] for (h, r, t), s in zip(triples, both, strict=True)
        ],
        "top_k": {"head": names[5], "relation": "knows", **best([score(5, 1, t) for t in asked], 4)},
        "top_k_heads": {
            "tail": names[2], "relation": "likes", **best([score(2, number, h) for h in asked], 20),
        },
    }  # fmt: skip


def plain_score(model: Model, dim: int, head: np.ndarray, relation: np.ndarray, tail: np.ndarray) -> float:
    """Return a triple's score at `dim` units, unit by unit in float64."""
    u, v = len(ENTITY_UNIT[model.scorer]), len(RELATION_UNIT[model.scorer])
    total, start = 0.0, 0
    for kappa, stop in zip((1.0, *model.damping), model.dims, strict=True):
        if stop <= dim:
            terms = []
            for unit in range(start, stop):
                h, t = ([float(x) for x in row[unit * u : (unit + 1) * u]] for row in (head, tail))
                r = [float(x) for x in relation[unit * v : (unit + 1) * v]]
                terms.append(unit_score(model.scorer, model.norm, h, r, t))
            total, start = math.fsum(terms) + kappa * total, stop
    return -math.sqrt(-total) if model.norm == "l2" else total


def unit_score(scorer: str, norm: str, h: list[float], r: list[float], t: list[float]) -> float:
    match scorer:
        case "transe":
            return -abs(h[0] + r[0] - t[0]) if norm == "l1" else -((h[0] + r[0] - t[0]) ** 2)
        case "rotate":
            return -abs(complex(*h) * complex(*r) - complex(*t))
        case "pairre":
            return -abs(h[0] * r[0] - t[0] * r[1])
        case "simple":
            return (h[0] * r[0] * t[1] + t[0] * r[1] * h[1]) / 2
        case "complex":
            return (complex(*h) * complex(*r) * complex(*t).conjugate()).real
    return h[0] * r[0] * t[0]


def main() -> None:
    records = expected_of_format_1()
    for case in CASES:
        shutil.rmtree(VECTORS / f"format2-{case}", ignore_errors=True)
        write_case(VECTORS / f"format2-{case}", case)
        records += expected_of(case)
    text = json.dumps(records, ensure_ascii=False, indent=1)
    (VECTORS / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
