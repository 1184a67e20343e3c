"""Raw files: which ones a job names, in which format they are, and which of their columns are wanted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medscale.config import GraphSection
from medscale.errors import GraphError
from medscale.graph.schema import SPLITS

__all__ = [
    "Format",
    "RawFile",
    "RawLayout",
    "entity_types_layout",
    "find_all_files",
    "triples_layout",
    "type_columns_layouts",
]

Format = Literal["tsv", "csv", "parquet", "ntriples"]

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_FORMATS: dict[str, Format] = {
    ".tsv": "tsv", ".txt": "tsv", ".csv": "csv", ".parquet": "parquet", ".nt": "ntriples",
}  # fmt: skip


@dataclass(frozen=True)
class RawFile:
    """One raw file and how to decode it."""

    path: Path
    #: relative to the data root, as reported
    name: str
    format: Format
    #: of the whole file; None: plain
    compression: Literal["gzip", "zstd"] | None

    @property
    def delimiter(self) -> str:
        """Between the fields of a line."""
        return "," if self.format == "csv" else "\t"


@dataclass(frozen=True)
class RawLayout:
    """Which columns of a raw file are wanted, and as what."""

    #: what the columns are to us: ("head", "relation", "tail")
    roles: tuple[str, ...]
    #: the columns' names in the file, in the order of `roles`
    columns: tuple[str, ...]
    #: TSV and CSV without a header: the names of all columns in file order; None: the first line names them
    names: tuple[str, ...] | None


def triples_layout(section: GraphSection) -> RawLayout:
    """Return where a job's triples files hold head, relation and tail."""
    columns = (section.head_column, section.relation_column, section.tail_column)
    return RawLayout(("head", "relation", "tail"), columns, None if section.header else section.columns)


def type_columns_layouts(section: GraphSection) -> list[RawLayout]:
    """Return where a job's triples files hold the types of heads and of tails, as far as they do."""
    given = ((section.head_column, section.head_type_column), (section.tail_column, section.tail_type_column))
    names = None if section.header else section.columns
    return [RawLayout(("entity", "type"), (entity, kind), names) for entity, kind in given if kind is not None]


def entity_types_layout(section: GraphSection, num_columns: int) -> RawLayout:
    """Return where a file of entity types holds entity, type and, with a third column, label."""
    columns = ("entity", "type", "label")[:num_columns]
    return RawLayout(columns, columns, None if section.header else columns)


def find_all_files(section: GraphSection, data_root: Path) -> dict[str, list[RawFile]]:
    """Return the files of every key of a job that names some: "train", "valid", "test", "entity_types".

    Raises:
        GraphError: as `find_files`, but for all keys at once.

    """
    named = {split: getattr(section, split) for split in SPLITS}
    named["entity_types"] = (section.entity_types,) if section.entity_types else ()
    found: dict[str, list[RawFile]] = {}
    problems: list[str] = []
    for key, patterns in named.items():
        try:
            found[key] = find_files(patterns, section, data_root, f"graph.{key}")
        except GraphError as problem:
            problems.append(str(problem))
    if problems:
        raise GraphError("; ".join(dict.fromkeys(problems)))
    return found


def find_files(patterns: Sequence[str], section: GraphSection, data_root: Path, key: str) -> list[RawFile]:
    """Return the files that one key of the job names, globs expanded, in the order of names per pattern.

    Raises:
        GraphError: the data root or a file is missing, a name leads out of the root, or a format is unknown.

    """
    if not data_root.is_dir():
        raise GraphError(f"the data root {data_root} is no directory; {_SET_THE_ROOT}")
    files: dict[str, RawFile] = {}
    for pattern in patterns:
        for name in _expand(pattern, data_root, key):
            files[name] = _raw_file(data_root / name, name, section)
    return list(files.values())


_SET_THE_ROOT = "give the folder of the raw files with --data-dir or MEDSCALE_DATA_DIR"


def _expand(pattern: str, data_root: Path, key: str) -> list[str]:
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise GraphError(f"{key}: {pattern!r} leads out of the data root {data_root}; name files relative to it")
    if (data_root / pattern).is_file():
        return [pattern]
    names = sorted(p.relative_to(data_root).as_posix() for p in data_root.glob(pattern) if p.is_file())
    if not names:
        raise GraphError(f"{key}: no file {pattern!r} under the data root {data_root}; {_SET_THE_ROOT}")
    return names


def _raw_file(path: Path, name: str, section: GraphSection) -> RawFile:
    suffixes = path.suffixes
    compression = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression:
        suffixes = suffixes[:-1]
    if section.format != "auto":
        return RawFile(path, name, section.format, compression)  # type: ignore[arg-type]
    known = _FORMATS.get(suffixes[-1]) if suffixes else None
    if known is None:
        raise GraphError(
            f"{path}: the suffix tells no format (known: {', '.join(_FORMATS)}, then .gz or .zst); "
            "set graph.format to tsv, csv, parquet or ntriples"
        )
    return RawFile(path, name, known, compression)  # type: ignore[arg-type]
