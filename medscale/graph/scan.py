"""The plain reader of raw text files: line by line, field by field, and exact about what is wrong where.

Far slower than `raw`, which does the work; this one finds the line that an error is about, and is the plain
twin that tests compare `raw` with.
"""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from medscale.errors import GraphError
from medscale.graph.schema import MAX_NAME_BYTES
from medscale.graph.sources import RawFile, RawLayout

__all__ = ["NTRIPLES_LINE", "NTRIPLES_SKIP", "decode_iri", "open_raw", "read_header", "scan_rows"]

_IRI = r'<[^<>"{}|^`\x00-\x20]+>'
_BLANK_NODE = r'_:[^ \t<>"]*[^ \t<>".]'
_LITERAL = r'"(?:[^"\\]|\\.)*"(?:@[A-Za-z0-9-]+|\^\^<[^<>"{}|^`\x00-\x20]+>)?'
#: one triple; the same text serves Python's `re` and Arrow's RE2
NTRIPLES_LINE = (
    rf"^[ \t]*(?P<head>{_IRI}|{_BLANK_NODE})[ \t]*(?P<relation>{_IRI})[ \t]*"
    rf"(?P<tail>{_IRI}|{_BLANK_NODE}|{_LITERAL})[ \t]*\.[ \t]*(?:#.*)?$"
)
#: a line without a triple: blank, or a comment
NTRIPLES_SKIP = r"^[ \t]*(?:#.*)?$"

_ESCAPE = re.compile(r"\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})|\\")


def open_raw(file: RawFile) -> tuple[pa.NativeFile, pa.NativeFile]:
    """Open a raw file: (its decompressed bytes, the file as it lies, whose position tells the progress)."""
    lying = pa.OSFile(str(file.path))
    if file.compression is None:
        return lying, lying
    return pa.CompressedInputStream(lying, file.compression), lying


def decode_iri(term: str) -> str:
    r"""Return the name of an N-Triples term: an IRI without its brackets and \u escapes, others as they are.

    Raises:
        ValueError: an escape that N-Triples does not know.

    """
    if not term.startswith("<"):
        return term
    name = _ESCAPE.sub(_unescape, term[1:-1])
    name.encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError
    return name


def _unescape(match: re.Match[str]) -> str:
    digits = match[1] or match[2]
    if digits is None:
        raise ValueError("an IRI holds a backslash that begins no \\u escape")
    return chr(int(digits, 16))


def read_header(file: RawFile) -> tuple[str, ...]:
    """Return the fields of a file's first line that is not blank; () if it has none.

    Raises:
        GraphError: that line cannot be read.

    """
    for number, line in _lines(file):
        return tuple(_fields(file, number, line))
    return ()


def scan_rows(file: RawFile, layout: RawLayout, literals: str = "keep") -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield (line number from 1, the fields in the order of the layout's roles) for each row of a text file.

    N-Triples yield head, relation, tail; with literals="drop" triples with a literal are passed over.

    Raises:
        GraphError: at the first line that is wrong; names file and line and says what to do.

    """
    if file.format == "ntriples":
        yield from _ntriples_rows(file, literals)
    else:
        yield from _delimited_rows(file, layout)


def _delimited_rows(file: RawFile, layout: RawLayout) -> Iterator[tuple[int, tuple[str, ...]]]:
    names = layout.names or read_header(file)
    wanted = [names.index(column) for column in layout.columns]
    is_header = layout.names is None
    for number, line in _lines(file):
        fields = _fields(file, number, line)
        if len(fields) != len(names):
            raise _wrong(file, number, f"{len(fields)} fields where {len(names)} are expected ({', '.join(names)})")
        if not is_header:
            yield number, tuple(_checked(file, number, names[index], fields[index]) for index in wanted)
        is_header = False


def _ntriples_rows(file: RawFile, literals: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    line_pattern, skip = re.compile(NTRIPLES_LINE), re.compile(NTRIPLES_SKIP)
    for number, line in _lines(file):
        if skip.match(line):
            continue
        match = None if "\x01" in line else line_pattern.match(line)
        if match is None:
            raise _wrong(file, number, "not an N-Triples line: <subject> <predicate> <object> .")
        if literals == "drop" and match["tail"].startswith('"'):
            continue
        try:
            terms = [decode_iri(match[role]) for role in ("head", "relation", "tail")]
        except ValueError as cause:
            raise _wrong(file, number, str(cause)) from None
        yield number, tuple(_checked(file, number, "term", term) for term in terms)


def _checked(file: RawFile, number: int, column: str, name: str) -> str:
    if not name:
        raise _wrong(file, number, f"{column} is empty: fill it in or remove the line")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise _wrong(file, number, f"{column} is longer than {MAX_NAME_BYTES} bytes")
    return name


def _fields(file: RawFile, number: int, line: str) -> list[str]:
    if file.format != "csv":
        return line.split(file.delimiter)
    try:
        return next(csv.reader([line], strict=True))
    except csv.Error as cause:
        raise _wrong(file, number, f"broken quoting ({cause}); a quoted field ends on its own line") from None


def _lines(file: RawFile) -> Iterator[tuple[int, str]]:
    """Number the lines that are not blank; handles line ends, a byte order mark, bad UTF-8."""
    stream, _ = open_raw(file)
    # Bad bytes become lone surrogates, so that the line that holds them is known.
    text = io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8", errors="surrogateescape")
    number = 0
    with text:
        while line := _next_line(file, text, number):
            number += 1
            line = line.removesuffix("\n")
            if number == 1:
                line = line.removeprefix("\ufeff")
            if line:
                yield number, _utf8(file, number, line)


def _next_line(file: RawFile, text: io.TextIOWrapper, number: int) -> str:
    try:
        line = text.readline(3 * MAX_NAME_BYTES + 1)
    except OSError as cause:
        raise _wrong(file, number + 1, f"the compressed data break off or are damaged ({cause})") from None
    if len(line) > 3 * MAX_NAME_BYTES:
        raise _wrong(file, number + 1, f"longer than {3 * MAX_NAME_BYTES} characters: is this a text file?")
    return line


def _utf8(file: RawFile, number: int, line: str) -> str:
    try:
        line.encode()
    except UnicodeEncodeError as cause:
        byte = ord(line[cause.start]) - 0xDC00
        raise _wrong(file, number, f"not UTF-8 (byte 0x{byte:02x} after {cause.start} characters)") from None
    return line


def _wrong(file: RawFile, number: int, what: str) -> GraphError:
    return GraphError(f"{Path(file.path)}:{number}: {what}")
