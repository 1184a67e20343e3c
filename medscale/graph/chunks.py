"""Raw triples as chunks: rows of small numbers, and the names that they stand for in this chunk alone.

A chunk holds as many rows as the memory of a task allows, whatever the files' sizes; so no task ever sees all names.
The split of a row is decided here, where its names are known.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from medscale.graph.hashing import hashes
from medscale.graph.raw import read_rows
from medscale.graph.schema import SPLITS
from medscale.graph.sources import RawFile, RawLayout
from medscale.graph.spill import spill
from medscale.logs import Advance

__all__ = ["INTEGER", "KINDS", "ROW_BYTES", "Chunk", "Kind", "Portion", "Reading", "portions_of", "read_portion"]

Kind = Literal["entities", "relations"]
KINDS: tuple[Kind, ...] = ("entities", "relations")

#: what a row takes beside its names, until it is a triple of ids
ROW_BYTES = 64
#: most bytes of raw files that one task reads together: many small files make few chunks
_PORTION_BYTES = 64 << 20
#: a name that is an integer: at most 16 digits, no leading zero, exactly what its integer prints as
INTEGER = "^(?:0|[1-9][0-9]{0,15})$"


class Reading(NamedTuple):
    """What decides how raw files become chunks."""

    directory: Path
    layout: RawLayout
    literals: str
    seed: int
    valid_fraction: float
    test_fraction: float
    #: of a chunk, its names and `ROW_BYTES` per row
    num_bytes: int


class Portion(NamedTuple):
    """Files that one task reads, all of one split."""

    reading: Reading
    number: int
    split: str
    files: tuple[RawFile, ...]


class Chunk(NamedTuple):
    """A chunk on disk: NAME.rows (split uint8; head, relation, tail int32) and its names by kind."""

    name: str
    #: by split
    num_rows: tuple[int, ...]
    #: by kind: of the names in NAME.KIND, (name, seen uint8: whether it occurs in train)
    num_names: dict[Kind, int]
    #: by kind: whether all names are integers
    integers: dict[Kind, bool]


def portions_of(reading: Reading, files: Mapping[str, list[RawFile]], num_tasks: int) -> list[Portion]:
    """Return which files are read together: neighbours of one split, but enough portions for all tasks."""
    total = sum(file.path.stat().st_size for split in SPLITS for file in files[split])
    most = min(_PORTION_BYTES, total // (4 * num_tasks)) if num_tasks > 1 else _PORTION_BYTES
    grouped: list[tuple[str, list[RawFile]]] = []
    size = 0
    for split in SPLITS:
        for file in files[split]:
            size += file.path.stat().st_size
            if not grouped or grouped[-1][0] != split or size > most:
                grouped.append((split, []))
                size = file.path.stat().st_size
            grouped[-1][1].append(file)
    return [Portion(reading, number, split, tuple(found)) for number, (split, found) in enumerate(grouped)]


def read_portion(portion: Portion, advance: Advance) -> tuple[list[Chunk], int]:
    """Read files into chunks; return these, and how many triples with a literal were passed over.

    Raises:
        GraphError: a file is wrong; names file and line or row.

    """
    reading, chunks, dropped = portion.reading, list[Chunk](), 0
    waiting, size = list[dict[str, pa.Array]](), 0

    def write() -> None:
        nonlocal waiting, size
        if sum(len(names["head"]) for names in waiting):
            name = f"{portion.number:06d}-{len(chunks):04d}"
            chunks.append(_write_chunk(reading, name, portion.split, waiting))
        waiting, size = [], 0

    for file in portion.files:
        position = 0
        for rows in read_rows(file, reading.layout, literals=reading.literals):
            waiting.append(rows.names)
            size += sum(names.nbytes for names in rows.names.values()) + ROW_BYTES * len(rows.names["head"])
            dropped += rows.literals_dropped
            if size >= reading.num_bytes:
                write()
            advance(rows.position - position)
            position = rows.position
        advance(file.path.stat().st_size - position)
    write()
    return chunks, dropped


def _write_chunk(reading: Reading, name: str, split: str, waiting: Sequence[dict[str, pa.Array]]) -> Chunk:
    columns = {role: pa.chunked_array([names[role] for names in waiting], pa.string()) for role in waiting[0]}
    splits = _splits(reading, columns) if split == "train" else np.full(len(columns["head"]), SPLITS.index(split))
    splits = splits.astype(np.uint8)
    entities, (heads, tails) = _coded(columns["head"], columns["tail"])
    relations, (labels,) = _coded(columns["relation"])
    spill(
        reading.directory / f"{name}.rows",
        {"split": splits, "head": heads, "relation": labels, "tail": tails},
    )
    names: dict[Kind, pa.Array] = {"entities": entities, "relations": relations}
    codes: dict[Kind, list[npt.NDArray[np.int32]]] = {"entities": [heads, tails], "relations": [labels]}
    for kind in KINDS:
        seen = np.zeros(len(names[kind]), dtype=np.uint8)
        for used in codes[kind]:
            seen[used[splits == 0]] = 1
        spill(reading.directory / f"{name}.{kind}", {"name": names[kind], "seen": seen})
    return Chunk(
        name,
        tuple(np.bincount(splits, minlength=len(SPLITS)).tolist()),
        {kind: len(names[kind]) for kind in KINDS},
        {kind: bool(pc.all(pc.match_substring_regex(names[kind], INTEGER)).as_py()) for kind in KINDS},
    )


def _coded(*columns: pa.ChunkedArray) -> tuple[pa.Array, list[npt.NDArray[np.int32]]]:
    """Return the distinct values of all columns, and each column as indices into them."""
    together = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())
    encoded = together.dictionary_encode().chunks  # all with one dictionary
    indices = np.concatenate([np.asarray(chunk.indices) for chunk in encoded])
    return encoded[-1].dictionary, np.split(indices, np.cumsum([len(column) for column in columns])[:-1])


def _splits(reading: Reading, columns: dict[str, pa.ChunkedArray]) -> npt.NDArray[np.int64]:
    """Tell rows' splits (indices into `SPLITS`) from their names: duplicates and later additions move no triple."""
    splits = np.zeros(len(columns["head"]), dtype=np.int64)
    if reading.valid_fraction or reading.test_fraction:
        position = hashes(reading.seed, "split", columns)
        test = round(reading.test_fraction * 2**64)
        splits[position < test + round(reading.valid_fraction * 2**64)] = SPLITS.index("valid")
        splits[position < test] = SPLITS.index("test")
    return splits
