"""The generated graph: exact in size, the same for ever by seed, skewed, with structure worth learning."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from medscale.config import SyntheticSection
from medscale.graph.schema import open_parquet
from medscale.graph.synthetic import (
    RELATIONS,
    community_of_user,
    kind_sizes,
    num_parts,
    triples_part,
    types_parts,
    write_raw,
)
from medscale.storage import sha256_of

FIRST_ROWS = [("user/1758", "buys", "product/139"), ("user/108", "buys", "product/164")]

SMALL = SyntheticSection(num_users=2_000, num_triples=60_000, part_triples=25_000)


def rows_of(section: SyntheticSection, seed: int = 0) -> pa.Table:
    return pa.concat_tables([triples_part(section, seed, part) for part in range(num_parts(section))])


def communities(section: SyntheticSection) -> dict[str, str]:
    tables = [table for name, table in types_parts(section, 0) if name.startswith("user")]
    return {row["entity"]: row["label"] for table in tables for row in table.to_pylist()}


@pytest.fixture(scope="module")
def small() -> pa.Table:
    return rows_of(SMALL)


@pytest.mark.parametrize(
    ("num_users", "num_triples", "num_communities"),
    [
        (10, 100, 16),
        (10, 100, 2),
        (11, 997, 10_000),
        (2_000, 60_000, 16),
        (500, 100_000, 7),
        (100_000, 200, 16),
    ],
)
def test_any_scale_has_exactly_its_triples_and_15_relations(
    num_users: int, num_triples: int, num_communities: int
) -> None:
    section = SyntheticSection(num_users=num_users, num_triples=num_triples, num_communities=num_communities)
    table = rows_of(section)
    assert table.num_rows == num_triples
    assert set(table.column("relation").to_pylist()) == set(RELATIONS)
    assert len(RELATIONS) == 15
    sizes = kind_sizes(section)
    assert sizes["user"] == num_users
    for column in ("head", "tail"):
        for name in table.column(column).unique().to_pylist():
            kind, _, number = name.partition("/")
            assert 0 <= int(number) < sizes[kind]


def test_heads_and_tails_are_of_their_kinds(small: pa.Table) -> None:
    for head, relation, tail in zip(*(small.column(i).to_pylist() for i in range(3)), strict=True):
        spec = RELATIONS[relation]
        assert head.startswith(spec.head + "/")
        assert tail.startswith(spec.tail + "/")
        assert head != tail


def test_deterministic_by_seed_and_free_of_part_size(small: pa.Table) -> None:
    other_parts = SyntheticSection(num_users=2_000, num_triples=60_000, part_triples=7_001)
    assert rows_of(other_parts).combine_chunks() == small.combine_chunks()
    assert triples_part(SMALL, 0, 2) == triples_part(SMALL, 0, 2)
    assert rows_of(SMALL, seed=1).combine_chunks() != small.combine_chunks()
    # The values themselves are a promise: a graph generated today and next year are the same.
    first = [tuple(row.values()) for row in triples_part(SMALL, 0, 0).slice(0, 2).to_pylist()]
    assert first == FIRST_ROWS


def test_every_entity_has_a_kind_and_every_user_a_class() -> None:
    kinds: Counter[str] = Counter()
    labels: list[str] = []
    for _, table in types_parts(SMALL, 0):
        kinds.update(table.column("type").to_pylist())
        assert len(table) <= SMALL.part_triples
        if "label" in table.column_names:
            labels += table.column("label").to_pylist()
        assert all(e.split("/")[0] == t for e, t in zip(*(table.column(i).to_pylist() for i in (0, 1)), strict=True))
    assert dict(kinds) == kind_sizes(SMALL)
    assert set(Counter(labels).values()) == {2_000 // 16}
    assert len(set(labels)) == 16


def test_names_are_a_permutation_and_tell_nothing_of_the_class() -> None:
    users = [(int(name.split("/")[1]), label) for name, label in communities(SMALL).items()]
    assert sorted(number for number, _ in users) == list(range(2_000))
    agree = sum(f"community/{c}" == label for (number, label) in users for c in [number % 16])
    assert agree / 2_000 < 0.12
    assert community_of_user(SMALL, np.arange(17)).tolist() == [*range(16), 0]


def test_degrees_follow_a_power_law() -> None:
    section = SyntheticSection(num_users=50_000, num_triples=600_000, num_communities=4)
    table = rows_of(section)
    tails = table.filter(pc.equal(table.column("relation"), "buys")).column("tail")
    degrees = np.sort(tails.value_counts().field("counts").to_numpy())[::-1]
    ranks = np.arange(1, len(degrees) + 1)
    slope, _ = np.polyfit(np.log(ranks[9:1000]), np.log(degrees[9:1000]), 1)
    # degree ~ rank^-0.6, a density with exponent 1 + 1/0.6, as in many social graphs
    assert -0.75 < slope < -0.45
    assert degrees[0] > 30 * np.median(degrees)


def test_communities_can_be_learned_from_links(small: pa.Table) -> None:
    label = communities(SMALL)
    of_product: dict[str, Counter[str]] = defaultdict(Counter)
    of_user: dict[str, list[str]] = defaultdict(list)
    for head, relation, tail in zip(*(small.column(i).to_pylist() for i in range(3)), strict=True):
        if relation == "buys":
            of_product[tail][label[head]] += 1
        if relation == "views":
            of_user[head].append(tail)
    right = total = 0
    for user, products in of_user.items():
        votes: Counter[str] = Counter()
        for product in products:
            votes.update({c: n / of_product[product].total() for c, n in of_product[product].items()})
        if votes:
            total += 1
            right += votes.most_common(1)[0][0] == label[user]
    assert total > 1_500
    assert right / total > 0.8


def test_links_can_be_predicted_from_community_and_popularity(small: pa.Table) -> None:
    """Counts of (community, relation, tail) in one half rank the tails of the other well above chance."""
    label = communities(SMALL)
    rows = list(zip(*(small.column(i).to_pylist() for i in range(3)), strict=True))
    order = np.random.default_rng(0).permutation(len(rows))
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for i in order[: len(rows) // 2]:
        head, relation, tail = rows[i]
        if head in label:
            counts[label[head], relation][tail] += 1
    reciprocal = []
    for i in order[len(rows) // 2 :][:3_000]:
        head, relation, tail = rows[i]
        if head in label:
            ranked = [name for name, _ in counts[label[head], relation].most_common()]
            reciprocal.append(1 / (ranked.index(tail) + 1) if tail in ranked else 0.0)
    assert np.mean(reciprocal) > 0.15


def test_functional_relations_have_one_tail(small: pa.Table) -> None:
    tails = defaultdict(set)
    for head, relation, tail in zip(*(small.column(i).to_pylist() for i in range(3)), strict=True):
        tails[relation, head].add(tail)
    for relation, spec in RELATIONS.items():
        heads = [head for name, head in tails if name == relation]
        if spec.per_head == 1:
            assert len(heads) == kind_sizes(SMALL)[spec.head]
            assert all(len(tails[relation, head]) == 1 for head in heads)


def test_raw_files_are_parts_of_bounded_size(tmp_path: Path) -> None:
    done: list[int] = []
    write_raw(SMALL, 0, tmp_path / "a", done.append)
    write_raw(SMALL, 0, tmp_path / "b", done.append)
    assert done == [25_000, 25_000, 10_000] * 2
    parts = sorted((tmp_path / "a" / "train").iterdir())
    assert [open_parquet(path).metadata.num_rows for path in parts] == [25_000, 25_000, 10_000]
    for path in (tmp_path / "a").rglob("*.parquet"):
        assert sha256_of(path) == sha256_of(tmp_path / "b" / path.relative_to(tmp_path / "a"))
