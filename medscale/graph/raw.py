"""Raw files as batches of names, with Arrow's readers: streamed, gzip and zstd included, in a few MiB.

The readers say that something is wrong, seldom where. So on any complaint the file is read again by a plain
scanner (`scan`; for Parquet a search by row group), which names the line or row. Blank lines are passed over,
LF and CRLF both end a line, a byte order mark is dropped.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from medscale.errors import GraphError
from medscale.graph.scan import (
    NTRIPLES_LINE,
    NTRIPLES_SKIP,
    decode_iri,
    open_raw,
    read_header,
    scan_rows,
)
from medscale.graph.schema import MAX_ID, MAX_NAME_BYTES, open_parquet
from medscale.graph.sources import RawFile, RawLayout

__all__ = ["Rows", "layout_problems", "read_rows"]

_BLOCK_BYTES = 4 << 20
_BATCH_ROWS = 1 << 16
#: no N-Triples line may hold it, so that Arrow's CSV reader hands out whole lines as one column
_NO_DELIMITER = "\x01"

#: A Parquet file that promises more than this is refused from its footer: real triples need bits for each row
#: and shrink a hundredfold at most, while a file of 91 kB can be made to unfold to gigabytes.
_MAX_ROWS_PER_BYTE = 64
_MAX_UNFOLDING = 1000
_ALWAYS_ALLOWED_ROWS = 1 << 20
_ALWAYS_ALLOWED_BYTES = 64 << 20


class Rows(NamedTuple):
    """Some rows of a raw file."""

    #: one string column per role of the layout; no nulls, no empty names
    names: dict[str, pa.Array]
    #: N-Triples with a literal that were passed over to get these rows
    literals_dropped: int
    #: bytes of the file that have been read so far
    position: int


class _SuspectError(Exception):
    """The fast reader saw something wrong; the search for the line or row comes next."""


def read_rows(file: RawFile, layout: RawLayout, *, literals: str = "drop") -> Iterator[Rows]:
    """Yield the rows of a raw file in bounded memory. N-Triples: literals "drop" or "keep".

    Raises:
        GraphError: something is wrong; names file and line, or row group and row, and says what to do.

    """
    readers = {"parquet": _parquet, "ntriples": _ntriples}
    read = readers.get(file.format, _delimited)
    try:
        yield from read(file, layout, literals)
    except (_SuspectError, pa.ArrowException, OSError, ValueError) as cause:
        _locate(file, layout, literals)
        raise GraphError(f"{file.path} cannot be read: {cause}") from None


def layout_problems(file: RawFile, layout: RawLayout) -> list[str]:
    """Return all that is wrong with a file's columns, and with what its Parquet footer promises.

    Raises:
        GraphError: the header line or the footer cannot be read at all.

    """
    if file.format == "parquet":
        return _footer_problems(file, layout)
    if file.format == "ntriples" or layout.names is not None:
        return []
    found = read_header(file)
    return [*_column_problems(file, layout, found)] if found else []


def _column_problems(file: RawFile, layout: RawLayout, found: tuple[str, ...]) -> Iterator[str]:
    for role, column in zip(layout.roles, layout.columns, strict=True):
        if column not in found:
            yield f"{file.path}: no column {column!r} for {role}; it has {', '.join(map(repr, found))}"
        elif found.count(column) > 1:
            yield f"{file.path}: {found.count(column)} columns are named {column!r}"


# TSV and CSV


def _delimited(file: RawFile, layout: RawLayout, literals: str) -> Iterator[Rows]:
    quoted = file.format == "csv"
    parse = pa_csv.ParseOptions(delimiter=file.delimiter, quote_char='"' if quoted else False)
    columns = layout.columns
    if quoted:
        # All of them, for a quote that is never closed swallows the lines after it in whichever column.
        columns = tuple(dict.fromkeys([*columns, *(layout.names or read_header(file))]))
    for batch, position in _csv_batches(file, layout.names, columns, parse):
        if quoted and any(_holds_line_end(array) for array in batch.columns):
            raise _SuspectError
        names = {role: batch.column(i) for i, role in enumerate(layout.roles)}
        yield Rows(_checked(names), 0, position)


def _holds_line_end(array: pa.Array) -> bool:
    return bool(pc.any(pc.match_substring_regex(array, "[\r\n]")).as_py())


def _csv_batches(
    file: RawFile, names: tuple[str, ...] | None, columns: tuple[str, ...], parse: pa_csv.ParseOptions
) -> Iterator[tuple[pa.RecordBatch, int]]:
    stream, lying = open_raw(file)
    convert = pa_csv.ConvertOptions(
        column_types=dict.fromkeys(columns, pa.string()),
        include_columns=list(columns),
        strings_can_be_null=False,
    )
    with lying, stream:
        try:
            reader = pa_csv.open_csv(
                stream,
                read_options=pa_csv.ReadOptions(column_names=names, block_size=_BLOCK_BYTES, use_threads=False),
                parse_options=parse,
                convert_options=convert,
            )
        except pa.ArrowInvalid as cause:
            if "Empty CSV file" in str(cause):
                return
            raise
        for batch in reader:
            yield batch, lying.tell()


def _checked(names: dict[str, pa.Array]) -> dict[str, pa.Array]:
    for array in names.values():
        if array.null_count or (len(array) and not _lengths_fit(array)):
            raise _SuspectError
    return names


def _lengths_fit(array: pa.Array) -> bool:
    extremes = pc.min_max(pc.binary_length(array))
    return bool(extremes["min"].as_py() > 0 and extremes["max"].as_py() <= MAX_NAME_BYTES)


# N-Triples


def _ntriples(file: RawFile, layout: RawLayout, literals: str) -> Iterator[Rows]:
    parse = pa_csv.ParseOptions(delimiter=_NO_DELIMITER, quote_char=False)
    for batch, position in _csv_batches(file, ("line",), ("line",), parse):
        lines = batch.column(0)
        lines = lines.filter(pc.invert(pc.match_substring_regex(lines, NTRIPLES_SKIP)))
        terms = pc.extract_regex(lines, NTRIPLES_LINE)
        if terms.null_count:
            raise _SuspectError
        is_literal = pc.starts_with(terms.field("tail"), '"')
        if literals == "drop":
            terms = terms.filter(pc.invert(is_literal))
        names = dict(zip(layout.roles, map(_term_names, _term_columns(terms, layout)), strict=True))
        yield Rows(_checked(names), len(lines) - len(terms), position)


def _term_columns(terms: pa.StructArray, layout: RawLayout) -> list[pa.Array]:
    # Entity types come as <entity> <any predicate> <type>.
    wanted = ("head", "relation", "tail") if len(layout.roles) == 3 else ("head", "tail")
    return [terms.field(name) for name in wanted]


def _term_names(terms: pa.Array) -> pa.Array:
    iris = pc.starts_with(terms, "<")
    names = pc.if_else(iris, pc.ascii_trim(terms, characters="<>"), terms)
    escaped = pc.and_(iris, pc.match_substring(terms, "\\"))
    if not pc.any(escaped).as_py():
        return names
    # Rare, so decoded one by one.
    decoded = pa.array([decode_iri(term) for term in terms.filter(escaped).to_pylist()], pa.string())
    return pc.replace_with_mask(names, escaped, decoded)


# Parquet


def _parquet(file: RawFile, layout: RawLayout, literals: str) -> Iterator[Rows]:
    with open_parquet(file.path) as parquet:
        size = file.path.stat().st_size
        done, total = 0, max(parquet.metadata.num_rows, 1)
        for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=list(layout.columns)):
            done += batch.num_rows
            names = {
                role: _as_names(batch.column(column)) for role, column in zip(layout.roles, layout.columns, strict=True)
            }
            yield Rows(_checked(names), 0, size * done // total)
    if done != parquet.metadata.num_rows:
        raise _SuspectError(f"{done} rows where its footer says {parquet.metadata.num_rows}")


def _as_names(array: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_integer(array.type) and _outside(array).any():
        raise _SuspectError
    names = array.cast(pa.string())
    # Parquet readers hand bytes out as strings unseen.
    names.validate(full=True)
    return names


def _outside(array: pa.Array) -> npt.NDArray[np.bool_]:
    numbers = np.asarray(array.fill_null(0))
    return (numbers < 0) | (numbers > MAX_ID)


def _is_name_type(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
    )


def _opened(file: RawFile) -> pq.ParquetFile:
    try:
        return open_parquet(file.path)
    except (pa.ArrowException, OSError) as cause:
        raise GraphError(f"{file.path}: not a Parquet file, or cut off: {cause}") from None


def _footer_problems(file: RawFile, layout: RawLayout) -> list[str]:
    with _opened(file) as parquet:
        schema, metadata = parquet.schema_arrow, parquet.metadata
    if not _is_consistent(metadata):
        raise GraphError(f"{file.path}: its footer is damaged, its row counts disagree; get it anew")
    problems = [*_column_problems(file, layout, tuple(schema.names)), *_bomb_problems(file, metadata)]
    for role, column in zip(layout.roles, layout.columns, strict=True):
        if schema.names.count(column) == 1 and not _is_name_type(schema.field(column).type):
            kind = schema.field(column).type
            problems.append(f"{file.path}: column {column!r} for {role} is {kind}; strings or integers are needed")
    return problems


def _is_consistent(metadata: pq.FileMetaData) -> bool:
    """Whether all of a footer's row counts agree: a reader that trusts a damaged one loses rows silently."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    # A list column has more values than rows; no column has fewer.
    whole = all(g.column(i).num_values >= g.num_rows for g in groups for i in range(g.num_columns))
    return whole and sum(group.num_rows for group in groups) == metadata.num_rows


def _bomb_problems(file: RawFile, metadata: pq.FileMetaData) -> Iterator[str]:
    size, rows = file.path.stat().st_size, metadata.num_rows
    groups = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    if rows > max(_ALWAYS_ALLOWED_ROWS, size * _MAX_ROWS_PER_BYTE):
        yield (
            f"{file.path}: {size} bytes that promise {rows} rows; refused above {_MAX_ROWS_PER_BYTE} rows "
            "per byte. Drop the duplicates, or write the file with less compression"
        )
    if sum(groups) > max(_ALWAYS_ALLOWED_BYTES, size * _MAX_UNFOLDING):
        yield (
            f"{file.path}: {size} bytes that unfold to {sum(groups)}; refused above {_MAX_UNFOLDING} times. "
            "Drop the duplicates, or write the file with less compression"
        )


# What is wrong where


def _locate(file: RawFile, layout: RawLayout, literals: str) -> None:
    """Read again, slowly, to raise a GraphError at the first bad line or row; return if there is none."""
    if file.format == "parquet":
        _locate_in_parquet(file, layout)
        return
    for _ in scan_rows(file, layout, literals):
        pass


def _locate_in_parquet(file: RawFile, layout: RawLayout) -> None:
    with _opened(file) as parquet:
        for group in range(parquet.metadata.num_row_groups):
            start = 0
            try:
                for batch in parquet.iter_batches(
                    batch_size=_BATCH_ROWS, row_groups=[group], columns=list(layout.columns)
                ):
                    _check_batch(file.path, layout, batch, group, start)
                    start += batch.num_rows
            except (pa.ArrowException, OSError) as cause:
                raise GraphError(
                    f"{file.path}: row group {group} is damaged after row {start}: {cause}; get the file anew"
                ) from None


def _check_batch(path: Path, layout: RawLayout, batch: pa.RecordBatch, group: int, start: int) -> None:
    for row in range(batch.num_rows):
        for column in layout.columns:
            wrong = _wrong_value(batch.column(column)[row])
            if wrong:
                raise GraphError(
                    f"{path}: row group {group}, row {start + row} (both from 0): {column} {wrong}; "
                    "correct it or remove the row"
                )


def _wrong_value(scalar: pa.Scalar) -> str | None:
    if not scalar.is_valid:
        return "is null"
    try:
        value = scalar.as_py()
    except UnicodeDecodeError as cause:
        return f"is not UTF-8 ({cause.reason})"
    if isinstance(value, int):
        return f"is {value}; ids go from 0 to 2^53" if not 0 <= value <= MAX_ID else None
    if not value:
        return "is empty"
    return f"is longer than {MAX_NAME_BYTES} bytes" if len(value.encode()) > MAX_NAME_BYTES else None
