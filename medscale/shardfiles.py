"""One shard of an export: its rows are read once, coded cut by cut, and written to the files of every tier.

A few rows are in memory at a time, so shards may be written side by side, by threads or by tasks of Ray, and so may the
files of one; a shard's bytes depend on nothing but the shard. `runtime/FORMAT.md` says what they are.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medscale.errors import ExportError
from medscale.logs import Advance
from medscale.runtime.files import shard_name, shard_names_name
from medscale.runtime.precision import Precision, decode, encode, stored_dtype, stored_width
from medscale.tierfiles import ParquetRows, RowsFile, fixed_size_list, list_type, name_tensors, octets, write_tensors

__all__ = [
    "Entities", "Form", "Shard", "TableSource", "TierForm", "WrittenShard", "check_finite", "hash_shard", "norms_up",
    "payload_of", "write_shard",
]  # fmt: skip

Result = TypeVar("Result")

Array = NDArray[Any]
#: ids of entities that rise
Entities = range | NDArray[np.int64]

_FLOAT32 = np.dtype("<f4")


class TableSource(Protocol):
    """Where the rows of a trained model come from, a few at a time; several threads may ask at once.

    Tasks of Ray get a pickled copy.
    """

    def entity_columns(self, start: int, stop: int, num_columns: int) -> NDArray[np.float32]:
        """Return the first columns of entities [start, stop), float32[stop - start, num_columns]."""
        ...

    def entity_rows(self, entities: NDArray[np.int64], num_columns: int) -> NDArray[np.float32]:
        """Return the first columns of entities by id (rising), float32[len(entities), num_columns]."""
        ...

    def relations(self, num_columns: int) -> NDArray[np.float32]:
        """Return the first columns of all relation rows, inverses included, as they are trained."""
        ...


@dataclass(frozen=True)
class TierForm:
    """What a tier's files hold of a row: the cuts [first_cut, last_cut), and names or not."""

    directory: Path
    first_cut: int
    last_cut: int
    has_names: bool


@dataclass(frozen=True, kw_only=True)
class Form:
    """What all shards of an export have in common."""

    source: TableSource
    #: where cuts end, in columns
    ends: tuple[int, ...]
    precision: Precision
    #: the scorer is a product
    has_norms: bool
    #: rows held at a time, which are also a row group of Parquet
    chunk_rows: int
    parquet: bool
    tiers: tuple[TierForm, ...]
    num_shards: int
    #: rows have their ids beside them
    has_ids: bool
    #: threads that write a shard's files, beside the one that reads its rows; 0: that one does all
    writers: int = 0

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The columns [start, stop) of each cut."""
        return list(itertools.pairwise((0, *self.ends)))

    @property
    def has_scales(self) -> bool:
        """Whether numbers are whole multiples of a scale per row and cut."""
        return self.precision in ("int8", "int4")

    def widths(self, tier: TierForm) -> list[int]:
        """Return the columns of each cut that a tier's files hold."""
        return [stop - start for start, stop in self.spans[tier.first_cut : tier.last_cut]]

    def rows(self, entities: Entities) -> NDArray[np.float32]:
        """Return rows, float32 [len(entities), columns].

        Raises:
            ExportError: a column is not finite.

        """
        columns = self.ends[-1]
        if isinstance(entities, range):
            rows = self.source.entity_columns(entities.start, entities.stop, columns)
        else:
            rows = self.source.entity_rows(entities, columns)
        assert (rows.shape, rows.dtype) == ((len(entities), columns), _FLOAT32)
        check_finite(rows, entities, "entity")
        return rows


@dataclass(frozen=True)
class Shard:
    """Some entities that lie in files together, and what they are called."""

    number: int
    entities: Entities
    #: string, by place in `entities`
    names: pa.Array
    #: int32, by place in `entities`; None: the graph has no types
    types: NDArray[np.int32] | None


class WrittenShard(NamedTuple):
    """Hashes of a shard: of each file by name for every tier, and of the bytes of each cut."""

    files: tuple[Mapping[str, str], ...]
    cuts: tuple[bytes, ...]


class _Cut(NamedTuple):
    """One cut of a few rows: as stored, with its scales (or None), and as the stored numbers decode (or None)."""

    stored: Array
    scales: NDArray[np.float32] | None
    decoded: NDArray[np.float32] | None


class _Margins:
    """What is kept of a shard per row and cut, until all of its rows have come."""

    def __init__(self, form: Form, num_rows: int) -> None:
        shape = (num_rows, len(form.ends))
        self.scales = np.zeros(shape, _FLOAT32) if form.has_scales else None
        self.norms = np.zeros(shape, _FLOAT32) if form.has_norms else None

    def keep(self, start: int, cuts: Sequence[_Cut]) -> None:
        """Keep those of rows that begin at a place in the shard."""
        for number, cut in enumerate(cuts):
            here = slice(start, start + len(cut.stored))
            if self.scales is not None:
                assert cut.scales is not None
                self.scales[here, number] = cut.scales
            # The first cut alone has no norm: nothing smaller is ever pruned by it.
            if self.norms is not None and number:
                assert cut.decoded is not None
                self.norms[here, number] = norms_up(cut.decoded)

    def of(self, tier: TierForm) -> dict[str, Array]:
        """Return the tensors that a tier holds of them."""
        tensors: dict[str, Array] = {}
        if self.scales is not None:
            tensors["scales"] = self.scales[:, tier.first_cut : tier.last_cut]
        if self.norms is not None and tier.last_cut > 1:
            tensors["norms"] = self.norms[:, max(1, tier.first_cut) : tier.last_cut]
        return tensors


def write_shard(work: tuple[Form, Shard], advance: Advance) -> WrittenShard:
    """Write a shard's files of all tiers; those that are there already are replaced.

    Raises:
        ExportError: a column is not finite, or too large for the precision.

    """
    form, shard = work
    margins = _Margins(form, len(shard.entities))
    files = [_TierFiles(form, tier, shard, margins.of(tier)) for tier in form.tiers]
    digests = [hashlib.sha256() for _ in form.ends]
    with _Writers(form.writers) as writers:
        for start, entities in _portions(form, shard.entities):
            rows = form.rows(entities)
            cuts = list(_cuts(form, rows, entities))
            margins.keep(start, cuts)
            names = shard.names.slice(start, len(entities))
            appends = [append for file in files for append in file.appends(entities, names, rows, cuts)]
            writers.run([*appends, functools.partial(_digest, digests, cuts)])
            advance(len(entities))
        hashes = writers.results([functools.partial(file.close, margins) for file in files])
    return WrittenShard(tuple(hashes), _with_scales(digests, margins))


def hash_shard(work: tuple[Form, Entities], advance: Advance) -> tuple[bytes, ...]:
    """Return the hash of the bytes of each cut of some entities, as `write_shard` does, but write nothing.

    Raises:
        ExportError: a column is not finite, or too large for the precision.

    """
    form, all_entities = work
    margins, digests = _Margins(form, len(all_entities)), [hashlib.sha256() for _ in form.ends]
    for start, entities in _portions(form, all_entities):
        cuts = list(_cuts(form, form.rows(entities), entities))
        margins.keep(start, cuts)
        _digest(digests, cuts)
        advance(len(entities))
    return _with_scales(digests, margins)


class _Writers:
    """Threads that append some rows to all files while the next rows are read."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads) if threads else None
        self._running: list[Future[object]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, works: Sequence[Callable[[], object]]) -> None:
        """Do these works at some time, after those of the call before."""
        for future in self._running:
            future.result()
        self._running = []
        for work in works:
            if self._pool is None:
                work()
            else:
                self._running.append(self._pool.submit(work))

    def results(self, works: Sequence[Callable[[], Result]]) -> list[Result]:
        """Return what these works return, once all before them are done."""
        self.run([])
        return [work() for work in works] if self._pool is None else list(self._pool.map(lambda work: work(), works))


def _digest(digests: "Sequence[hashlib._Hash]", cuts: Sequence[_Cut]) -> None:
    for digest, cut in zip(digests, cuts, strict=True):
        digest.update(octets(cut.stored))


def _with_scales(digests: "Sequence[hashlib._Hash]", margins: _Margins) -> tuple[bytes, ...]:
    for number, digest in enumerate(digests):
        if margins.scales is not None:
            digest.update(octets(margins.scales[:, number]))
    return tuple(digest.digest() for digest in digests)


def payload_of(shards: Sequence[tuple[bytes, ...]]) -> list[str]:
    """Return the payload hash of each cut, in hexadecimal, from the hashes of all shards in their order."""
    return [hashlib.sha256(b"".join(hashes)).hexdigest() for hashes in zip(*shards, strict=True)]


def check_finite(rows: NDArray[np.float32], ids: Sequence[int] | Entities, what: str) -> None:
    """Refuse rows with a column that is not finite.

    Raises:
        ExportError: names the first of them.

    """
    finite = np.isfinite(rows)
    if not finite.all():
        first = int(np.flatnonzero(~finite.all(axis=1))[0])
        raise ExportError(
            f"{what} {ids[first]} has a column that is NaN or infinite: the checkpoint cannot be exported; resume "
            "from the one before it"
        )


def norms_up(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the Euclidean norm of each row, float32, rounded up."""
    exact = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1))
    norms: NDArray[np.float32] = exact.astype(_FLOAT32)
    low = norms < exact
    norms[low] = np.nextafter(norms[low], np.float32(np.inf))
    return norms


def _portions(form: Form, entities: Entities) -> Iterator[tuple[int, Entities]]:
    """Yield the entities a few at a time, each time with the place of the first."""
    for start in range(0, len(entities), form.chunk_rows):
        yield start, entities[start : start + form.chunk_rows]


def _cuts(form: Form, rows: NDArray[np.float32], entities: Entities) -> Iterator[_Cut]:
    needs_values = form.has_norms or (form.parquet and form.precision != "float16")
    for start, stop in form.spans:
        try:
            stored, scales = encode(rows[:, start:stop], form.precision)
        except OverflowError as cause:
            raise ExportError(
                f"entity {entities[cause.args[0]]} has a column that float16 cannot hold (beyond 65,504): choose "
                "another export.precision"
            ) from None
        decoded = None
        if needs_values:
            column = None if scales is None else scales[:, None]
            decoded = decode(stored, column, form.precision, [stop - start])
        yield _Cut(stored, scales, decoded)


class _TierFiles:
    """A shard's files of one tier."""

    def __init__(self, form: Form, tier: TierForm, shard: Shard, margins: Mapping[str, Array]) -> None:
        self.form = form
        self.tier = tier
        self.hashes: dict[str, str] = {}
        place = (shard.number, form.num_shards)
        num_rows, widths = len(shard.entities), form.widths(tier)
        width = sum(stored_width(form.precision, columns) for columns in widths)
        self.rows = RowsFile(
            tier.directory / shard_name(*place),
            vectors=(stored_dtype(form.precision), (num_rows, width)),
            known={"ids": np.asarray(shard.entities, np.int64)} if form.has_ids else {},
            later={name: (array.dtype, array.shape) for name, array in margins.items()},
        )
        self.parquet: ParquetRows | None = None
        if form.parquet:
            number = pa.float16() if form.precision == "float16" else pa.float32()
            columns = {"id": pa.int64()} | ({"name": pa.string()} if tier.has_names else {})
            columns |= {"vector": list_type(number, sum(widths))}
            self.parquet = ParquetRows(self.rows.path.with_suffix(".parquet"), columns)
        if tier.has_names:
            tensors = name_tensors("entity", shard.names)
            if shard.types is not None:
                tensors["entity_type"] = shard.types
            name = shard_names_name(*place)
            self.hashes[name] = write_tensors(tier.directory / name, tensors)

    def appends(
        self, entities: Entities, names: pa.Array, whole: NDArray[np.float32], all_cuts: Sequence[_Cut]
    ) -> Iterator[Callable[[], object]]:
        """Yield what appends some rows, given whole and by cuts, to each of the files."""
        cuts = all_cuts[self.tier.first_cut : self.tier.last_cut]
        if self.form.precision == "float32":
            spans = self.form.spans[self.tier.first_cut : self.tier.last_cut]
            stored = values = np.ascontiguousarray(whole[:, spans[0][0] : spans[-1][1]])
        else:
            stored = values = _joined([cut.stored for cut in cuts])
        yield functools.partial(self.rows.append, stored)
        if self.parquet is not None:
            if self.form.has_scales:
                values = _joined([cut.decoded for cut in cuts if cut.decoded is not None])
            ids = pa.array(np.asarray(entities, np.int64))
            columns = {"id": ids, "name": names, "vector": fixed_size_list(values)}
            yield functools.partial(self.parquet.append, columns)

    def close(self, margins: _Margins) -> Mapping[str, str]:
        """Finish the files and return the SHA-256 of each by name."""
        self.hashes[self.rows.path.name] = self.rows.close(margins.of(self.tier))
        if self.parquet is not None:
            self.hashes[self.parquet.path.name] = self.parquet.close()
        return self.hashes


def _joined(parts: Sequence[Array]) -> Array:
    """Return arrays side by side; one is returned as it is."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
