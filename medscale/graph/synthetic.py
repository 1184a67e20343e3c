"""A generated SKG-like graph at any scale: users, products, shops, tags, ... under 15 relations.

Planted structure makes it worth learning. Each user belongs to a community, which is the user's class label,
and has two favourite categories among the community's. Products belong to a category, and through it to a
community. A relation's tail comes from the head's own community or category with the share `focus`, else from
anywhere; within it, popular members are drawn far more often (degrees follow a power law). Part of the views
and likes repeat a purchase. A product's brand, shop and category and a user's city and occupation come once.

Triple number i is a pure function of (seed, i): any part can be written alone, in any order, and the parts'
size changes nothing but where the files are cut.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from medscale.cluster import HERE, Tasks
from medscale.config import SyntheticSection
from medscale.graph.schema import open_writer
from medscale.logs import Advance
from medscale.seed import mixed, permuted, subseed

__all__ = [
    "RELATIONS",
    "Relation",
    "community_of_user",
    "kind_sizes",
    "num_communities",
    "num_parts",
    "triples_part",
    "types_parts",
    "write_raw",
]

Ints = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint64]

#: categories of one community; a user favours two of them
_CATEGORIES = 4
#: share of draws that go to the first favourite category rather than the second
_FIRST_FAVOURITE = 0.7
#: rank = size x uniform^x: how unequal members are. Degrees fall off as rank^(1/x - 1)
_POPULARITY, _ACTIVITY = 2.5, 1.7
#: share of views and likes that repeat a purchase
_REPEATED = 0.4


@dataclass(frozen=True)
class Relation:
    """How the triples of one relation come about."""

    head: str
    tail: str
    #: what the tail shares with the head
    group: Literal["community", "category"]
    #: share of tails that are drawn from the head's own group
    focus: float
    #: triples per head, for a relation that lists its heads one by one (0: heads are drawn by activity)
    per_head: int = 0
    #: share of the triples that are left after the listed ones
    share: float = 0.0


RELATIONS: dict[str, Relation] = {
    "buys": Relation("user", "product", "category", 0.85, share=0.20),
    "views": Relation("user", "product", "category", 0.75, share=0.28),
    "likes": Relation("user", "product", "category", 0.85, share=0.12),
    "follows": Relation("user", "user", "community", 0.80, share=0.15),
    "visits": Relation("user", "shop", "community", 0.75, share=0.08),
    "interested_in": Relation("user", "tag", "category", 0.75, share=0.08),
    "prefers_brand": Relation("user", "brand", "category", 0.80, share=0.05),
    "member_of": Relation("user", "group", "community", 0.85, share=0.04),
    "lives_in": Relation("user", "city", "community", 0.50, per_head=1),
    "works_as": Relation("user", "occupation", "community", 0.60, per_head=1),
    "sold_by": Relation("product", "shop", "community", 0.85, per_head=1),
    "made_by": Relation("product", "brand", "category", 0.90, per_head=1),
    "in_category": Relation("product", "category", "category", 1.0, per_head=1),
    "has_tag": Relation("product", "tag", "category", 0.85, per_head=2),
    "located_in": Relation("shop", "city", "community", 0.80, per_head=1),
}
#: listed triples take at most this share of all
_LISTED = 0.5


def num_communities(section: SyntheticSection) -> int:
    """Return the number of communities: as asked for, but no more than users."""
    return min(section.num_communities, section.num_users)


def kind_sizes(section: SyntheticSection) -> dict[str, int]:
    """Return the number of entities of each kind; those of a kind are spread evenly over its groups."""
    users, communities = section.num_users, num_communities(section)
    categories = communities * _CATEGORIES
    return {
        "user": users,
        "product": max(users // 5, categories),
        "brand": max(users // 100, categories),
        "tag": max(users // 50, categories),
        "category": categories,
        "shop": max(users // 50, communities),
        "group": max(users // 100, communities),
        "city": max(users // 500, communities),
        "occupation": 2 * communities,
    }


def community_of_user(section: SyntheticSection, users: Ints) -> Ints:
    """Return the community, which is the class label, of users int64[n] (numbers before they are named)."""
    return users % num_communities(section)


def num_parts(section: SyntheticSection) -> int:
    """Return into how many parts the triples fall."""
    return -(-section.num_triples // section.part_triples)


def triples_part(section: SyntheticSection, seed: int, part: int) -> pa.Table:
    """Return part `part` of the triples, (head, relation, tail) strings: at most `part_triples` rows."""
    first = part * section.part_triples
    last = min(first + section.part_triples, section.num_triples)
    tables = []
    for name, (start, count) in _plan(section).items():
        numbers = np.arange(max(first - start, 0), min(last - start, count), dtype=np.int64)
        if len(numbers):
            tables.append(_named(section, seed, name, *_draw(section, seed, name, numbers)))
    return pa.concat_tables(tables).combine_chunks()


def types_parts(section: SyntheticSection, seed: int) -> Iterator[tuple[str, pa.Table]]:
    """Yield (file name, rows) of all entities: (entity, type), and for users (entity, type, label)."""
    for kind, part in _types_parts(section):
        yield f"{kind}-{part:05d}.parquet", _types_part(section, seed, kind, part)


def _types_parts(section: SyntheticSection) -> list[tuple[str, int]]:
    sizes = kind_sizes(section).items()
    return [(kind, part) for kind, size in sizes for part in range(-(-size // section.part_triples))]


def _types_part(section: SyntheticSection, seed: int, kind: str, part: int) -> pa.Table:
    first, size = part * section.part_triples, kind_sizes(section)[kind]
    numbers = np.arange(first, min(first + section.part_triples, size), dtype=np.int64)
    columns = {"entity": _names(seed, kind, numbers, size), "type": pa.array([kind] * len(numbers))}
    if kind == "user":
        columns["label"] = _joined("community", community_of_user(section, numbers))
    return pa.table(columns)


class _RawPart(NamedTuple):
    """A raw file to be written: triples, or the types of a kind of entities."""

    section: SyntheticSection
    seed: int
    directory: Path
    kind: str | None
    part: int


def write_raw(section: SyntheticSection, seed: int, directory: Path, advance: Advance, tasks: Tasks = HERE) -> None:
    """Write `train/part-*.parquet` and `entity_types/*.parquet` as raw files; `advance` counts triples."""
    for name in ("train", "entity_types"):
        (directory / name).mkdir(parents=True)
    parts: list[tuple[str | None, int]] = [(None, part) for part in range(num_parts(section))]
    parts += _types_parts(section)
    tasks.run(_write_part, [_RawPart(section, seed, directory.absolute(), *part) for part in parts], advance)


def _write_part(raw: _RawPart, advance: Advance) -> None:
    if raw.kind is None:
        table = triples_part(raw.section, raw.seed, raw.part)
        path = raw.directory / "train" / f"part-{raw.part:05d}.parquet"
    else:
        table = _types_part(raw.section, raw.seed, raw.kind, raw.part)
        path = raw.directory / "entity_types" / f"{raw.kind}-{raw.part:05d}.parquet"
    with open_writer(path, table.schema) as writer:
        writer.write_table(table)
    if raw.kind is None:
        advance(table.num_rows)


def _plan(section: SyntheticSection) -> dict[str, tuple[int, int]]:
    """Return by relation where its triples begin and how many there are; together exactly `num_triples`."""
    sizes = kind_sizes(section)
    listed = {name: sizes[r.head] * r.per_head for name, r in RELATIONS.items() if r.per_head}
    scale = min(1.0, _LISTED * section.num_triples / sum(listed.values()))
    counts = {name: max(1, int(count * scale)) for name, count in listed.items()}
    left = section.num_triples - sum(counts.values())
    drawn = {name: max(1, int(left * r.share)) for name, r in RELATIONS.items() if r.share}
    drawn["views"] += left - sum(drawn.values())
    plan, start = {}, 0
    for name, count in (drawn | counts).items():
        plan[name] = (start, count)
        start += count
    return plan


def _draw(section: SyntheticSection, seed: int, name: str, numbers: Ints) -> tuple[Ints, Ints]:
    """Return heads and tails, int64[n], of the triples with these numbers within their relation."""
    relation, sizes = RELATIONS[name], kind_sizes(section)
    stream = _stream(seed, name, numbers)
    if relation.per_head:
        heads = numbers % sizes[relation.head]
    else:
        heads = _rank(_uniform(stream, 0), np.int64(sizes[relation.head]), _ACTIVITY)
    own, num_groups = _own_group(section, seed, relation, heads, _uniform(stream, 1))
    anywhere = (_uniform(stream, 2) * num_groups).astype(np.int64)
    group = np.where(_uniform(stream, 3) < relation.focus, own, anywhere)
    size = sizes[relation.tail]
    tails = group + num_groups * _rank(_uniform(stream, 4), _members(size, num_groups, group), _POPULARITY)
    if relation.head == relation.tail:
        tails = np.where(tails == heads, (tails + num_groups) % size, tails)
    return heads, tails


def _stream(seed: int, name: str, numbers: Ints) -> Bits:
    """Return the random state of each triple, uint64[n]; a repeated purchase has the purchase's."""
    own = mixed(numbers, subseed(seed, "synthetic", name))
    if name not in ("views", "likes"):
        return own
    purchase = mixed(numbers, subseed(seed, "synthetic", "buys"))
    return np.where(_uniform(own, 5) < _REPEATED, purchase, own)


def _own_group(
    section: SyntheticSection, seed: int, relation: Relation, heads: Ints, chance: npt.NDArray[np.float64]
) -> tuple[Ints, int]:
    """Return the group of each head that its tail may share, int64[n], and how many groups there are."""
    communities = num_communities(section)
    if relation.group == "community":
        return heads % communities, communities
    if relation.head == "product":
        return heads % (communities * _CATEGORIES), communities * _CATEGORIES
    tastes = mixed(heads, subseed(seed, "synthetic", "tastes"))
    first, second = tastes % _CATEGORIES, tastes // _CATEGORIES % _CATEGORIES
    favourite = np.where(chance < _FIRST_FAVOURITE, first, second).astype(np.int64)
    return heads % communities + communities * favourite, communities * _CATEGORIES


def _members(size: int, num_groups: int, group: Ints) -> Ints:
    return (size - group + num_groups - 1) // num_groups


def _rank(chance: npt.NDArray[np.float64], size: Ints | np.int64, inequality: float) -> Ints:
    return np.minimum((chance**inequality * size).astype(np.int64), size - 1)


def _uniform(stream: Bits, draw: int) -> npt.NDArray[np.float64]:
    """Return draw number `draw` of each stream, float64[n] in [0, 1)."""
    return np.ldexp((mixed(stream, draw + 1) >> np.uint64(11)).astype(np.float64), -53)


def _named(section: SyntheticSection, seed: int, name: str, heads: Ints, tails: Ints) -> pa.Table:
    relation, sizes = RELATIONS[name], kind_sizes(section)
    return pa.table(
        {
            "head": _names(seed, relation.head, heads, sizes[relation.head]),
            "relation": pa.array([name]).take(pa.array(np.zeros(len(heads), dtype=np.int64))),
            "tail": _names(seed, relation.tail, tails, sizes[relation.tail]),
        }
    )


def _names(seed: int, kind: str, numbers: Ints, size: int) -> pa.Array:
    # Names then tell nothing of groups or popularity.
    return _joined(kind, permuted(numbers, size, subseed(seed, "synthetic", "names", kind)))


def _joined(word: str, numbers: Ints) -> pa.Array:
    return pc.binary_join_element_wise(word, pc.cast(pa.array(numbers), pa.string()), "/")
