"""Rows of entities as they lie in mapped files: shards of rows, each of one piece or more of columns.

A tier of layout "full" has one piece a shard; each delta that goes on top adds a piece, and rows that joined later are
a section of shards of their own. Nothing is copied or decoded before it is asked for.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from medscale.errors import DamagedTierError, MissingShardError, UnknownNameError
from medscale.runtime.facts import TierFacts
from medscale.runtime.files import INDEX, TierFiles, shard_name, shard_names_name, shard_of_name
from medscale.runtime.names import NameTable
from medscale.runtime.precision import Precision, decode, stored_width
from medscale.runtime.scoring import Array

__all__ = ["Piece", "Portion", "Rows", "Section", "Shard"]


@dataclass(frozen=True)
class Piece:
    """Some cuts of the columns of a shard's rows, as stored."""

    #: [rows, stored numbers]
    stored: Array
    #: float32[rows, cuts], or None
    scales: Array | None
    #: float32[rows, the last cuts]: Euclidean norms, rounded up; or None
    norms: Array | None
    precision: Precision
    #: columns of each cut
    widths: tuple[int, ...]

    @property
    def columns(self) -> int:
        """Columns of a row in this piece."""
        return sum(self.widths)

    def rows(self, part: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Return rows as float32 [rows, columns]; a view of the map where that is what is stored."""
        scales = None if self.scales is None else self.scales[part]
        return decode(self.stored[part], scales, self.precision, self.widths)

    def columns_of(self, part: slice | NDArray[np.int64], start: int, stop: int) -> NDArray[np.float32]:
        """Return columns [start, stop) of rows; at int8 and int4 they begin and end with cuts."""
        if (start, stop) == (0, self.columns):
            return self.rows(part)
        if self.scales is None:
            return decode(self.stored[part, start:stop], None, self.precision, (stop - start,))
        ends = np.cumsum([0, *self.widths]).tolist()
        first, last = ends.index(start), ends.index(stop)
        places = np.cumsum([0, *(stored_width(self.precision, width) for width in self.widths)])
        stored = self.stored[part, places[first] : places[last]]
        return decode(stored, self.scales[part, first:last], self.precision, self.widths[first:last])


@dataclass(frozen=True)
class Shard:
    """The rows of one shard."""

    #: id of the first row where ids follow one another
    first: int
    #: int64[rows], rising, where they do not
    ids: Array | None
    pieces: tuple[Piece, ...]

    def __len__(self) -> int:
        return len(self.pieces[0].stored)

    def ids_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the ids of rows."""
        return rows + self.first if self.ids is None else self.ids[rows]

    def columns_of(
        self, part: slice | NDArray[np.int64], start: int, stop: int
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield (column, float32 [rows, columns]) of each piece that has some of the columns [start, stop)."""
        begin = 0
        for piece in self.pieces:
            end = begin + piece.columns
            if begin < stop and end > start:
                low, high = max(start, begin), min(stop, end)
                yield low, piece.columns_of(part, low - begin, high - begin)
            begin = end

    @property
    def norms(self) -> list[tuple[int, Array]]:
        """(cut, float32[rows]) of each cut whose norms are stored."""
        found, cut = [], 0
        for piece in self.pieces:
            cut += len(piece.widths)
            if piece.norms is not None:
                stored = piece.norms.shape[1]
                found += [(cut - stored + i, piece.norms[:, i]) for i in range(stored)]
        return found


@dataclass(frozen=True)
class Portion:
    """Some rows of a shard, one after the other."""

    shard: Shard
    rows: slice

    @property
    def ids(self) -> slice | NDArray[np.int64]:
        """The rows' ids: int64[rows], or a slice where they follow one another."""
        shard, rows = self.shard, self.rows
        return slice(shard.first + rows.start, shard.first + rows.stop) if shard.ids is None else shard.ids[rows]


@dataclass(frozen=True)
class Section:
    """The shards of one export's rows: ids [first_entity, stop_entity) of its facts."""

    facts: TierFacts
    directory: str
    #: those that are here
    shards: Mapping[int, Shard]
    #: by shard: which file to fetch
    missing: Mapping[int, str]
    #: names of rows, by number of the table: a shard's, or in format 1 those of all entities
    tables: Mapping[int, NameTable]
    #: int32[rows] by shard: places in `entity_types`
    types: Mapping[int, Array]
    #: int32[num_entities]: the shard of each entity, where shards go by hashes and the file is here
    index: Array | None

    @classmethod
    def of(cls, files: TierFiles, partial: bool) -> "Section":
        """Map a tier of layout "full" or "rows".

        Raises:
            DamagedTierError: a file is missing that must be there, or does not hold what the facts promise.

        """
        facts = files.facts
        shards, missing = _shards(files, partial)
        tables: dict[int, NameTable] = {}
        types: dict[int, Array] = {}
        if facts.format == 1:
            tables[0] = files.all_names()[0]
        else:
            for number in range(facts.num_shards):
                if partial and not files.is_here(shard_names_name(number, facts.num_shards)):
                    continue
                rows = len(shards[number]) if number in shards else -1
                tables[number], kinds = files.shard_names(number, rows)
                if kinds is not None:
                    types[number] = kinds
        index = None
        if facts.sharding == "hash" and not (partial and not files.is_here(INDEX)):
            index = files.index()
        return cls(facts, str(files.directory), shards, missing, tables, types, index)

    def with_columns(self, files: TierFiles, partial: bool) -> "Section":
        """Return the section with a delta's columns beside its own.

        Raises:
            DamagedTierError: as above, or its rows are others.

        """
        shards, missing = _shards(files, partial)
        together = {}
        for number in shards.keys() & self.shards.keys():
            ours, theirs = self.shards[number], shards[number]
            if ours.ids is not None and (theirs.ids is None or not np.array_equal(ours.ids, theirs.ids)):
                file = shard_name(number, self.facts.num_shards)
                raise DamagedTierError(f"{files.directory / file}: its ids are not those of {self.directory}")
            together[number] = replace(ours, pieces=(*ours.pieces, *theirs.pieces))
        facts = replace(files.facts, layout="full")
        return replace(self, facts=facts, shards=together, missing={**missing, **self.missing})

    def shard(self, number: int) -> Shard:
        """Return a shard.

        Raises:
            MissingShardError: it was not fetched.

        """
        shard = self.shards.get(number)
        if shard is None:
            raise self._missing(self.missing[number])
        return shard

    def _missing(self, file: str) -> MissingShardError:
        return MissingShardError(f"{self.directory}: {file} was not fetched; fetch it, then open the tier again", file)

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (shard, row in it) of rows of the section, int64 each in their shape.

        Raises:
            MissingShardError: the shard, or the index that tells it, was not fetched.
            DamagedTierError: index and shards disagree.

        """
        if self.facts.sharding == "range":
            shards, places = np.divmod(rows, self.facts.shard_rows)
            return shards, places
        shards = self._among_those_here(rows) if self.index is None else self.index[rows].astype(np.int64)
        places = np.empty_like(shards)
        for number in np.unique(shards).tolist():
            here = shards == number
            ids = self.shard(number).ids
            assert ids is not None
            wanted = rows[here] + self.facts.first_entity
            places[here] = np.searchsorted(ids, wanted)
            if not np.array_equal(ids[np.minimum(places[here], len(ids) - 1)] if len(ids) else [], wanted):
                raise DamagedTierError(f"{self.directory}: {INDEX} names a shard of an entity that does not hold it")
        return shards, places

    def _among_those_here(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the shard of each row, int64 in their shape, where the index that tells it is not here.

        Raises:
            MissingShardError: they are in none of the shards that are.

        """
        found = np.full(rows.shape, -1, np.int64)
        for number, shard in self.shards.items():
            assert shard.ids is not None
            found[np.isin(rows + self.facts.first_entity, shard.ids)] = number
        if (found < 0).any():
            raise self._missing(INDEX)
        return found

    def find(self, name: str) -> int | None:
        """Return the id of a name, or None.

        Raises:
            MissingShardError: where it may be was not fetched.

        """
        facts = self.facts
        if facts.sharding == "hash":
            number = shard_of_name(name, facts.num_shards)
            if number not in self.tables:
                raise self._missing(shard_names_name(number, facts.num_shards))
            row = self.tables[number].find(name)
            return None if row is None else int(self.shard(number).ids_of(np.array(row)))
        for number, table in self.tables.items():
            row = table.find(name)
            if row is not None:
                return facts.first_entity + number * facts.shard_rows + row
        absent = [n for n in range(facts.num_shards) if n not in self.tables] if facts.format > 1 else []
        if absent:
            raise MissingShardError(
                f"{self.directory}: {name!r} is in none of the {len(self.tables)} shards whose names are here; fetch "
                f"the other {len(absent)} names-*, the first is {shard_names_name(absent[0], facts.num_shards)}",
                shard_names_name(absent[0], facts.num_shards),
            )
        return None

    def name(self, row: int) -> str:
        """Return the name of a row of the section.

        Raises:
            MissingShardError: its names were not fetched.
            DamagedTierError: the name is damaged.

        """
        if self.facts.format == 1:
            return self.tables[0].name(row)
        number, place = (int(array) for array in self.locate(np.array(row)))
        if number not in self.tables:
            raise self._missing(shard_names_name(number, self.facts.num_shards))
        return self.tables[number].name(place)

    def type_of(self, row: int) -> int:
        """Return the place in `entity_types` of a row's type, or -1."""
        number, place = (int(array) for array in self.locate(np.array(row)))
        if number not in self.types:
            raise self._missing(shard_names_name(number, self.facts.num_shards))
        return int(self.types[number][place])

    def type_ids(self, kind: int) -> Iterator[NDArray[np.int64]]:
        """Yield ids of entities of a type, shard by shard."""
        for number in range(self.facts.num_shards):
            if number not in self.types:
                raise self._missing(shard_names_name(number, self.facts.num_shards))
            yield self.shard(number).ids_of(np.flatnonzero(self.types[number] == kind))


def _shards(files: TierFiles, partial: bool) -> tuple[dict[int, Shard], dict[int, str]]:
    """Return the shards that are here, and the file of each that is not."""
    facts, shards, missing, held = files.facts, {}, {}, 0
    for number in range(facts.num_shards):
        name = shard_name(number, facts.num_shards)
        if partial and not files.is_here(name):
            missing[number] = name
            continue
        tensors = files.shard(number)
        piece = Piece(
            tensors["vectors"], tensors.get("scales"), tensors.get("norms"), facts.precision, facts.own_columns
        )
        shards[number] = Shard(facts.first_entity + number * facts.shard_rows, tensors.get("ids"), (piece,))
        held += len(piece.stored)
    if not missing and held != facts.num_entities:
        raise DamagedTierError(
            f"{files.directory}: its shards have {held} rows, its manifest says {facts.num_entities}"
        )
    return shards, missing


class Rows:
    """All rows of a tier, by id and by name: one section, and one more for each delta of rows on top."""

    #: for messages
    what = "entity"

    def __init__(self, sections: Sequence[Section]) -> None:
        self.sections = tuple(sections)
        self.columns = sections[0].facts.dim * sections[0].facts.unit_columns
        self.num_entities = sections[-1].facts.stop_entity

    def vectors(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return float32 [..., columns], a copy, of ids that are in range."""
        return self.columns_of(ids, 0, self.columns)

    def columns_of(self, ids: NDArray[np.int64], start: int, stop: int) -> NDArray[np.float32]:
        """Return columns [start, stop) of ids that are in range: float32 [..., columns], a copy."""
        found = np.empty((ids.size, stop - start), np.float32)
        for shard, here, places in self._places(ids.reshape(-1)):
            for column, rows in shard.columns_of(places, start, stop):
                found[here, column - start : column - start + rows.shape[-1]] = rows
        return found.reshape(*ids.shape, stop - start)

    def vector(self, entity: int) -> NDArray[np.float32]:
        """Return the row of an id that is in range, float32 [columns], a copy: `vectors` of one, with less ado."""
        section = self._section(entity)
        row = entity - section.facts.first_entity
        if section.facts.sharding == "hash":
            return self.vectors(np.array(entity))
        number, place = divmod(row, section.facts.shard_rows)
        parts = [piece.rows(slice(place, place + 1))[0] for piece in section.shard(number).pieces]
        return parts[0].copy() if len(parts) == 1 else np.concatenate(parts)

    def norms(self, ids: NDArray[np.int64], cut: int) -> NDArray[np.float32]:
        """Return the stored norms of a cut, float32 [N], of ids [N]."""
        found = np.empty(ids.shape, np.float32)
        for shard, here, places in self._places(ids):
            found[here] = dict(shard.norms)[cut][places]
        return found

    def _places(self, ids: NDArray[np.int64]) -> Iterator[tuple[Shard, slice | NDArray[np.bool_], NDArray[np.int64]]]:
        """Yield (shard, which of the ids it holds, their rows in it)."""
        for section in self.sections:
            facts = section.facts
            inside = (ids >= facts.first_entity) & (ids < facts.stop_entity)
            if not inside.any():
                continue
            numbers, places = section.locate(ids[inside] - facts.first_entity)
            if (numbers == numbers[0]).all() and inside.all():
                # Most tables are of one shard, and need no search for who holds what.
                yield section.shard(int(numbers[0])), slice(None), places
                return
            for number in np.unique(numbers).tolist():
                here = inside.copy()
                here[inside] = numbers == number
                yield section.shard(number), here, places[numbers == number]

    def find(self, name: str) -> int | None:
        """Return the id of a name, or None."""
        for section in self.sections[:-1]:
            found = section.find(name)
            if found is not None:
                return found
        return self.sections[-1].find(name)

    def index(self, name: str) -> int:
        """Return the id of a name.

        Raises:
            UnknownNameError: no such name.
            MissingShardError: it may be in a shard that was not fetched.

        """
        found = self.find(name)
        if found is None:
            where = self.sections[-1].directory
            raise UnknownNameError(f"unknown entity {name!r}: it is not among the {self.num_entities:,} of {where}")
        return found

    def check(self, index: int) -> int:
        """Return the id, which must be in range.

        Raises:
            UnknownNameError: it is not.

        """
        if not 0 <= index < self.num_entities:
            where = self.sections[-1].directory
            raise UnknownNameError(f"unknown entity id {index}: {where} has ids 0 to {self.num_entities - 1}")
        return index

    def name(self, entity: int) -> str:
        """Return the name of an id that is in range."""
        section = self._section(entity)
        return section.name(entity - section.facts.first_entity)

    def shard_of(self, entity: int) -> str:
        """Return the file that holds the row of an id that is in range, here or not."""
        section = self._section(entity)
        facts, row = section.facts, entity - section.facts.first_entity
        if facts.sharding == "range":
            number = row // facts.shard_rows
        elif section.index is not None:
            number = int(section.index[row])
        else:
            raise section._missing(INDEX)
        return shard_name(number, facts.num_shards)

    def _section(self, entity: int) -> Section:
        return next(section for section in self.sections if entity < section.facts.stop_entity)

    def portions(self, numbers: int) -> list[Portion]:
        """Return all rows in portions of about so many numbers.

        Raises:
            MissingShardError: a shard was not fetched.

        """
        step = max(1, numbers // self.columns)
        return [
            Portion(shard, slice(start, min(start + step, len(shard))))
            for section in self.sections
            for shard in map(section.shard, range(section.facts.num_shards))
            for start in range(0, len(shard), step)
        ]

    def type_ids(self, kind: str) -> NDArray[np.int64]:
        """Return the ids of all entities of a type, int64, rising; none if no section knows the type."""
        found = [
            ids
            for section in self.sections
            if kind in section.facts.entity_types
            for ids in section.type_ids(section.facts.entity_types.index(kind))
        ]
        return np.sort(np.concatenate([np.zeros(0, np.int64), *found]))

    def type_of(self, entity: int) -> str | None:
        """Return the type of an id that is in range, or None."""
        section = self._section(entity)
        kinds = section.facts.entity_types
        kind = section.type_of(entity - section.facts.first_entity) if kinds else -1
        return None if kind < 0 else kinds[kind]
