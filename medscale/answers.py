"""Answers a file of queries from an exported tier: what `medscale predict` does.

QUERIES is Parquet with the columns `relation` and `head`, `tail` or both: names (string) or ids (int64), null for the
side that is asked. ANSWERS is Parquet: `query` int64 (the row in QUERIES, from 0), `rank` int32 from 1, `entity` int64,
`name` string, `score` float32; `--k` rows for each query, in order. Many queries share each scan of the tier's rows,
and parts of QUERIES may be answered as tasks on a Ray cluster; the answers do not depend on either.
"""

import contextlib
import functools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medscale.cluster import tasks_of
from medscale.errors import ExportError, GraphError, UnknownNameError
from medscale.logs import Advance, log, progress
from medscale.runtime import Cascade, Tier
from medscale.runtime.query import Query
from medscale.runtime.scan import best_of_each
from medscale.storage import staging_directory

__all__ = ["SCHEMA", "predict"]

SCHEMA = pa.schema(
    [
        ("query", pa.int64()),
        ("rank", pa.int32()),
        ("entity", pa.int64()),
        ("name", pa.string()),
        ("score", pa.float32()),
    ]
)
COLUMNS = ("head", "relation", "tail")
#: queries that one task answers
PART_QUERIES = 16_384
#: queries that share a scan
SCAN_QUERIES = 256


@dataclass(frozen=True)
class Part:
    """Some rows of the queries, and where their answers go."""

    tier: str
    queries: str
    group: int
    #: rows of the group
    start: int
    stop: int
    #: row of the file that the group begins with
    offset: int
    out: Path
    k: int
    skip_unknown: bool
    cascade: bool


def predict(
    tier: Path, queries: Path, out: Path, *, k: int = 10, tasks: int = 1, skip_unknown: bool = False,
    cascade: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """Answer every query of a file with the k best entities; return (queries answered, queries skipped).

    Queries with unknown names or ids are skipped with `skip_unknown`. With `cascade`, the smaller tiers beside `tier`
    choose the rows that it scores: sooner, and not always the same answers. `out` appears whole or not at all.

    Raises:
        ExportError: the tier is damaged, or a name or id is unknown; names the row.
        GraphError: the queries cannot be read, a row is none (names the row), or `out` is their own file.

    """
    if out.resolve() == queries.resolve():
        raise GraphError(f"{out} holds the queries: the answers would take their place; name another file")
    opened = Tier.open(tier)  # verified here; tasks need not do it again
    if cascade:
        _chain(str(tier))
    with staging_directory(out.with_name(f"{out.name}.parts")) as draft:
        parts = list(_parts(tier, queries, draft, k, skip_unknown, cascade))
        total = sum(part.stop - part.start for part in parts)
        log(f"{total:,} queries to tier {opened.name}: {opened.num_entities:,} entities of {opened.columns} columns")
        with tasks_of(tasks, draft) as runner, progress("predict", total, "queries") as advance:
            answered = sum(runner.run(_answer, parts, advance))
        _join([part.out for part in parts], out)
        shutil.rmtree(draft)
    return answered, total - answered


def _parts(tier: Path, queries: Path, draft: Path, k: int, skip_unknown: bool, cascade: bool) -> Iterator[Part]:
    with _reading(queries):
        file = pq.ParquetFile(queries)
    missing = {"relation"} - set(file.schema_arrow.names)
    if missing or not {"head", "tail"} & set(file.schema_arrow.names):
        raise GraphError(
            f"{queries} lacks a column: relation, and head, tail or both; it has {file.schema_arrow.names}"
        )
    offset = number = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        for start in range(0, rows, PART_QUERIES):
            stop = min(start + PART_QUERIES, rows)
            out = draft / f"{number:06d}.parquet"
            yield Part(
                str(tier.resolve()), str(queries.resolve()), group, start, stop, offset, out, k, skip_unknown, cascade
            )
            number += 1
        offset += rows


def _answer(part: Part, advance: Advance) -> int:
    """Write the answers of a part; return how many queries it answered."""
    tier = _tier(part.tier)
    with _reading(Path(part.queries)):
        file = pq.ParquetFile(part.queries)
        names = [name for name in COLUMNS if name in file.schema_arrow.names]
        table = file.read_row_group(part.group, columns=names).slice(part.start, part.stop - part.start)
    columns = [table[name].to_pylist() if name in names else [None] * len(table) for name in COLUMNS]
    asked: list[tuple[int, Query]] = []
    answered = told = 0
    draft = part.out.with_suffix(".draft")
    with pq.ParquetWriter(draft, SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        for row, triple in enumerate(zip(*columns, strict=True), part.offset + part.start):
            try:
                asked.append((row, _query(tier, triple)))
            except UnknownNameError as cause:
                if not part.skip_unknown:
                    raise UnknownNameError(f"{part.queries}, row {row}: {cause}") from None
            except ValueError as cause:
                raise GraphError(f"{part.queries}, row {row}: {cause}") from None
            if len(asked) == SCAN_QUERIES or row == part.offset + part.stop - 1:
                writer.write_table(_table(tier, part, asked))
                answered += len(asked)
                asked = []
                advance(row + 1 - part.offset - part.start - told)
                told = row + 1 - part.offset - part.start
    draft.replace(part.out)
    return answered


def _query(tier: Tier, triple: tuple[Any, Any, Any]) -> Query:
    head, relation, tail = triple
    if relation is None or (head is None) == (tail is None):
        raise ValueError(f"a query has a relation, and a head or a tail; got {head!r}, {relation!r}, {tail!r}")
    return tier.query(tail if head is None else head, relation, "head" if head is None else "tail")


def _table(tier: Tier, part: Part, asked: Sequence[tuple[int, Query]]) -> pa.Table:
    queries = [query for _, query in asked]
    if part.cascade:
        chain = _chain(part.tier)
        found = [chain.best(query, part.k, exact=False)[:2] for query in queries]
    else:
        length = max((tier.length(query) for query in queries), default=0.0)
        found = best_of_each(queries, tier.rows, part.k, threads=tier.threads, length=length)
    counts = [len(ids) for ids, _ in found]
    ids = np.concatenate([np.zeros(0, np.int64), *(ids for ids, _ in found)])
    return pa.table(
        [
            pa.array(np.repeat(np.array([row for row, _ in asked], np.int64), counts)),
            pa.array(np.concatenate([np.zeros(0, np.int32), *(np.arange(1, n + 1, dtype=np.int32) for n in counts)])),
            pa.array(ids),
            pa.array([tier.entity_name(int(index)) for index in ids], pa.string()),
            pa.array(np.concatenate([np.zeros(0, np.float32), *(scores for _, scores in found)])),
        ],
        schema=SCHEMA,
    )


@functools.lru_cache(maxsize=1)
def _tier(path: str) -> Tier:
    return Tier.open(path, "never")


@functools.lru_cache(maxsize=1)
def _chain(path: str) -> Cascade:
    """Return the cascade of the smaller tiers beside a tier, and itself."""
    last = _tier(path)
    beside = Path(path).resolve().parent
    smaller = [name for name, dim in sorted(last.facts["tiers"].items(), key=lambda item: item[1]) if dim < last.dim]
    chain = [Tier.open(beside / name) for name in smaller if (beside / name).is_dir()]
    if not chain:
        raise ExportError(f"{path}: no smaller tier lies beside it, so there is no cascade; leave --cascade out")
    return Cascade([*chain, last])


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what pyarrow says of a damaged file into one sentence."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise GraphError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def _join(parts: Sequence[Path], out: Path) -> None:
    """Write the parts into one file, one after the other."""
    draft = out.with_name(f"{out.name}.tmp")
    try:
        with pq.ParquetWriter(draft, SCHEMA, compression="zstd", write_page_checksum=True) as writer:
            for part in parts:
                writer.write_table(pq.read_table(part))
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)
