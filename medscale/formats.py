"""What every format of an exported tier weighs and costs: bytes, opening, a top-10 query, and whether it is right.

safetensors  the tier itself, by `medscale.runtime.Tier`: opened with its files verified, every entity scanned
parquet      by DuckDB, in SQL: products order by array_inner_product, which is the score; distances by
             array_distance, which is Euclidean and so only near the score of L1 and complex moduli
onnx         `model.onnx` by onnxruntime; its tables are the tier's own files, not counted again
index        `medscale.search_index`: a shortlist, ranked again by the score
"""

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from medscale.logs import log
from medscale.manifest import MANIFEST, parse_json
from medscale.onnx_model import SCORE_FILE, TOP_K_FILE
from medscale.runtime.query import Query
from medscale.runtime.tier import Tier
from medscale.search_index import INDEX_FILE, SearchIndex
from medscale.seed import generator

__all__ = ["K", "format_records", "formats_table"]

#: answers of a query
K = 10
#: queries timed; the median counts
QUERIES = 20

#: (head, relation) -> ids of the best tails
Answer = Callable[[int, int], Sequence[int] | NDArray[np.int64]]


def format_records(export: Path, triples: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Return a record per tier of an export and format that it holds, smallest tier first; none if there is no export.

    Tiers of layout "delta" or "rows" are left out.

    {"tier", "units", "format", "bytes" (of the files of that format), "open_s", "top10_ms" (median of some queries for
    tails, heads and relations drawn from int64 [T, 3] triples), "recall@10" (of the exact answers)}.

    Raises:
        ExportError: a tier is damaged.

    """
    directories = [path for path in sorted(export.glob("*")) if (path / MANIFEST).is_file() and _is_whole(path)]
    chosen = generator(0, "format queries").choice(len(triples), min(QUERIES, len(triples)), replace=False)
    asked = [(int(h), int(r)) for h, r, _ in triples[np.sort(chosen)]]
    records = [record for directory in directories for record in _tier_records(directory, asked)]
    return sorted(records, key=lambda record: (record["units"], record["tier"]))


def _is_whole(directory: Path) -> bool:
    """Whether a tier answers queries without others below it."""
    try:
        layout = parse_json((directory / MANIFEST).read_text(encoding="utf-8"))["facts"].get("layout", "full")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return True  # opening it will say what is wrong
    if layout != "full":
        log(f"{directory.name} is of layout {layout}, which answers no queries alone: its formats are not measured")
    return bool(layout == "full")


def _tier_records(directory: Path, asked: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    tier = Tier.open(directory)
    exact = [set(_by_tier(tier, *pair)) for pair in asked]
    for name, (patterns, opener, needs) in FORMATS.items():
        files = [file for pattern in patterns for file in directory.glob(pattern)]
        if not files:
            continue
        if any(importlib.util.find_spec(module) is None for module in needs):
            log(f"{name} is not measured: {', '.join(needs)} is not installed here")
            continue
        start = time.perf_counter()
        answer = opener(directory, tier)
        opened = time.perf_counter() - start
        milliseconds, recalls = [], []
        for pair, truth in zip(asked, exact, strict=True):
            start = time.perf_counter()
            found = answer(*pair)
            milliseconds.append(1000 * (time.perf_counter() - start))
            recalls.append(len(truth & {int(i) for i in found}) / len(truth))
        yield {
            "tier": tier.name, "units": tier.dim, "format": name, "bytes": sum(f.stat().st_size for f in files),
            "open_s": round(opened, 4), "top10_ms": round(median(milliseconds), 3), "recall@10": fmean(recalls),
        }  # fmt: skip


def _by_tier(tier: Tier, head: int, relation: int) -> list[int]:
    return [tier.entity_id(name) for name in tier.top_k(head, relation, K)[0]]


def _tier(directory: Path, tier: Tier) -> Answer:
    opened = Tier.open(directory)
    return lambda head, relation: _by_tier(opened, head, relation)


#: x: what is zipped of a unit, see `_distance`
_DISTANCES = {
    "l1": "x[4] * abs(x[2] - x[3] * x[1])",
    "l2": "x[4] * power(x[2] - x[3] * x[1], 2)",
    "modulus": "x[5] * sqrt(power(x[3] - x[1], 2) + power(x[4] - x[2], 2))",
}


def _duckdb(directory: Path, tier: Tier) -> Answer:
    connection = duckdb.connect()
    files = str(directory / "entities*.parquet").replace("'", "''")
    connection.execute(f"CREATE VIEW entities AS SELECT * FROM read_parquet('{files}')")

    def answer(head: int, relation: int) -> list[int]:
        asked = tier.query(head, relation, "tail")
        if asked.geometry == "product":
            vector = f"FLOAT[{tier.columns}]"
            order, given = f"array_inner_product(vector::{vector}, ?::{vector}) DESC", [asked.vector * asked.weights]
        else:
            lists, given = _distance(asked)
            order = f"list_sum([{_DISTANCES[asked.geometry]} for x in list_zip({lists})])"
        statement = f"SELECT id FROM entities ORDER BY {order}, id LIMIT {K}"
        rows = connection.execute(statement, [numbers.tolist() for numbers in given]).fetchall()
        return [row[0] for row in rows]

    return answer


def _distance(asked: Query) -> tuple[str, list[NDArray[np.float64]]]:
    """Return the lists to zip, in SQL, and the values of their parameters."""
    if asked.geometry == "modulus":
        real_imaginary = "vector[1:len(vector):2], vector[2:len(vector):2]"
        return f"{real_imaginary}, ?, ?, ?", [asked.vector[0::2], asked.vector[1::2], asked.weights]
    factor = np.ones_like(asked.vector) if asked.factor is None else asked.factor
    return "vector, ?, ?, ?", [asked.vector, factor, asked.weights]


def _onnx(directory: Path, tier: Tier) -> Answer:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(directory / TOP_K_FILE), providers=["CPUExecutionProvider"])
    asks_head, k = np.array([False]), np.array([K])

    def answer(head: int, relation: int) -> NDArray[np.int64]:
        feeds = {"entity": np.array([head]), "relation": np.array([relation]), "asks_head": asks_head, "k": k}
        ids: NDArray[np.int64] = session.run(["ids"], feeds)[0][0]
        return ids

    return answer


def _index(directory: Path, tier: Tier) -> Answer:
    index = SearchIndex.open(tier, directory)
    return lambda head, relation: index.best(head, relation, "tail", K)[0]


#: by name: files, how to open them, modules that it takes
FORMATS: Mapping[str, tuple[tuple[str, ...], Callable[[Path, Tier], Answer], tuple[str, ...]]] = {
    "safetensors": (("*.safetensors", MANIFEST), _tier, ()),
    "parquet": (("*.parquet",), _duckdb, ()),
    "onnx": ((TOP_K_FILE, SCORE_FILE), _onnx, ("onnxruntime",)),
    "index": ((INDEX_FILE,), _index, ("faiss",)),
}


def formats_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Return the records as a table for the terminal."""
    table = Table(title="formats", caption=(
        f"bytes: of the files of that format alone (onnx reads the tables of safetensors); ms: a query for {K} tails; "
        f"recall@{K}: of the exact answers."
    ))  # fmt: skip
    for heading in ("tier", "format"):
        table.add_column(heading)
    for heading in ("bytes", "s to open", "ms per query", f"recall@{K}"):
        table.add_column(heading, justify="right")
    for r in records:
        figures = (f"{r['bytes']:,}", f"{r['open_s']:.3f}", f"{r['top10_ms']:.2f}", f"{r['recall@10']:.3f}")
        table.add_row(r["tier"], r["format"], *figures)
    return table
