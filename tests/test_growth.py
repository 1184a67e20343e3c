"""A graph that grows: old ids stay, the outcome depends on the triples alone, and everything is counted."""

import dataclasses
import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medscale.config import GraphSection
from medscale.errors import GraphError
from medscale.graph import growth, schema
from medscale.graph.growth import extend_graph
from medscale.graph.hashing import hashes
from medscale.graph.ingest import ingest
from medscale.graph.reader import Graph, open_graph

Triple = tuple[str, str, str]

SECTION = GraphSection(train=("train.tsv",), valid=("valid.tsv",), test=("test.tsv",), entity_types="types.tsv")
OLD = [(f"e{i:02d}", f"r{i % 3}", f"e{i * 7 % 40:02d}") for i in range(40)]
#: new entities a, b, zz; a new relation q0, before r0 in the alphabet; two that are there; one twice; one of old names
NEW = [
    ("zz", "r0", "e01"), ("a", "q0", "zz"), ("e03", "r1", "b"), OLD[5], OLD[6], ("a", "q0", "zz"), ("e01", "r0", "e39"),
]  # fmt: skip


def write(path: Path, triples: Sequence[Triple]) -> None:
    path.write_text("".join("\t".join(triple) + "\n" for triple in triples), encoding="utf-8")


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    root = tmp_path_factory.mktemp("parent")
    write(root / "train.tsv", OLD)
    write(root / "valid.tsv", [("e01", "r0", "e39"), ("only-valid", "r1", "e02")])
    write(root / "test.tsv", [("e02", "r2", "only-test")])
    (root / "types.tsv").write_text("e01\tkind\ne02\tother\n")
    return ingest(SECTION, name="parent", seed=3, data_root=root, directory=root / "graph")


def grown(
    parent: Graph, root: Path, *files: str, only_new_names: bool = False, section: GraphSection = SECTION,
    num_others: int = 0,
) -> Graph:  # fmt: skip
    return extend_graph(
        parent, section, files, name="grown", data_root=root, directory=root / "grown", only_new_names=only_new_names,
        num_others=num_others, source={},
    )  # fmt: skip


def named(graph: Graph, split: str) -> list[Triple]:
    entities, relations = graph.entity_names().to_pylist(), graph.relation_names().to_pylist()
    return [(entities[h], relations[r], entities[t]) for h, r, t in graph.triples(split).tolist()]


def test_old_ids_stay_and_new_ones_follow_in_order(parent: Graph, tmp_path: Path) -> None:
    write(tmp_path / "new.tsv", NEW)
    graph = grown(parent, tmp_path, "new.tsv", only_new_names=True)
    assert graph == open_graph(graph.directory)  # verified
    assert graph.entity_names().to_pylist() == [*parent.entity_names().to_pylist(), "a", "b", "zz"]
    assert graph.relation_names().to_pylist() == ["r0", "r1", "r2", "q0"]
    assert set(named(graph, "train")) == {*OLD, *NEW}
    assert len(named(graph, "train")) == graph.num_triples["train"] == len({*OLD, *NEW})
    assert set(named(graph, "growth")) == {NEW[0], NEW[1], NEW[2]}
    for split in ("valid", "test"):
        np.testing.assert_array_equal(graph.triples(split), parent.triples(split))
    assert graph.entity_types() == parent.entity_types()


def test_the_order_of_its_triples_is_that_of_a_graph_built_at_once(parent: Graph, tmp_path: Path) -> None:
    write(tmp_path / "new.tsv", NEW)
    graph = grown(parent, tmp_path, "new.tsv")
    for split, purpose in (("train", "order"), ("growth", "growth")):
        triples = graph.triples(split)
        hashed = hashes(3, purpose, dict(zip(schema.TRIPLE_COLUMNS, triples.T, strict=True)))
        assert (np.diff(hashed.astype(object)) > 0).all()


@pytest.mark.parametrize(
    ("num_others", "fewest", "number"), [(0, 1, 0), (0, 30, 0), (4, 1, 12), (4, 30, 30), (100, 1, 41)]
)
def test_new_names_learn_from_their_triples_and_some_others(
    parent: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_others: int, fewest: int, number: int
) -> None:
    """Three triples mention a new name; forty old ones, and a new one of old names, do not."""
    monkeypatch.setattr(growth, "FEWEST_OTHERS", fewest)
    write(tmp_path / "new.tsv", NEW)
    found = named(grown(parent, tmp_path, "new.tsv", num_others=num_others), "growth")
    assert len(found) == len(set(found)) == 3 + number
    assert {NEW[0], NEW[1], NEW[2]} <= set(found) <= {*OLD, *NEW}


def test_what_was_met_is_told(parent: Graph, tmp_path: Path) -> None:
    write(tmp_path / "new.tsv", [*NEW, ("only-valid", "r0", "e00")])
    facts = grown(parent, tmp_path, "new.tsv").facts
    assert facts["duplicates"]["train"] == 3
    assert facts["leaks"] == {"valid": 1, "test": 0}
    assert parent.facts["unseen"] == {"valid": 1, "test": 1}
    assert facts["unseen"] == {"valid": 0, "test": 1}
    lineage = facts["lineage"]
    assert lineage["graph"] == "parent"
    assert lineage["graph_sha256"] == parent.sha256
    assert (lineage["num_entities"], lineage["num_relations"]) == (parent.num_entities, 3)
    assert [file["file"] for file in lineage["files"]] == ["new.tsv"]
    assert lineage["lineage"] is None


def bytes_of(graph: Graph) -> dict[str, bytes]:
    return {name: (graph.directory / name).read_bytes() for name in graph.files}


def test_any_order_form_and_number_of_files_gives_the_same_bytes(parent: Graph, tmp_path: Path) -> None:
    roots = [tmp_path / name for name in ("plain", "turned", "parquet")]
    for root in roots:
        root.mkdir()
    write(roots[0] / "new.tsv", NEW)
    write(roots[1] / "one.tsv", NEW[:2:-1])
    with gzip.open(roots[1] / "two.tsv.gz", "wt") as file:
        file.write("".join("\t".join(triple) + "\n" for triple in NEW[2::-1]))
    columns = dict(zip(schema.TRIPLE_COLUMNS, map(list, zip(*NEW, strict=True)), strict=True))
    pq.write_table(pa.table(columns), roots[2] / "new.parquet")
    first = bytes_of(grown(parent, roots[0], "new.tsv"))
    assert first == bytes_of(grown(parent, roots[1], "two.tsv.gz", "one.tsv"))
    assert first == bytes_of(grown(parent, roots[2], "*.parquet"))


def test_integers_are_numbered_by_value(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", [("0", "0", "1"), ("1", "0", "2")])
    write(tmp_path / "new.tsv", [("10", "0", "9"), ("100", "0", "1")])
    section = GraphSection(train=("train.tsv",))
    parent = ingest(section, name="ints", seed=0, data_root=tmp_path, directory=tmp_path / "graph")
    graph = grown(parent, tmp_path, "new.tsv", section=section)
    assert graph.entity_names().to_pylist() == ["0", "1", "2", "9", "10", "100"]


def test_it_grows_again(parent: Graph, tmp_path: Path) -> None:
    write(tmp_path / "new.tsv", NEW)
    write(tmp_path / "more.tsv", [("aa", "r0", "zz"), NEW[0]])
    once = grown(parent, tmp_path, "new.tsv")
    twice = extend_graph(
        once, SECTION, ["more.tsv"], name="twice", data_root=tmp_path, directory=tmp_path / "twice",
        only_new_names=True, num_others=0, source={},
    )  # fmt: skip
    assert twice.entity_names().to_pylist() == [*once.entity_names().to_pylist(), "aa"]
    assert named(twice, "growth") == [("aa", "r0", "zz")]
    assert twice.facts["lineage"]["lineage"] == once.facts["lineage"]
    assert twice.facts["lineage"]["graph_sha256"] == once.sha256


def test_many_row_groups_merge_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of triples in small row groups: new ones before, between and after the old."""
    draw = np.random.default_rng(0)
    rows = [tuple(map(str, row)) for row in np.unique(draw.integers(0, 60, (3_000, 3)), axis=0).tolist()]
    order = draw.permutation(len(rows))
    write(tmp_path / "train.tsv", [rows[i] for i in order[:2_000]])
    write(tmp_path / "new.tsv", [rows[i] for i in order[1_900:]])
    write(tmp_path / "all.tsv", rows)
    section = GraphSection(train=("train.tsv",))
    monkeypatch.setattr(schema, "ROW_GROUP_ROWS", 128)
    monkeypatch.setattr("medscale.graph.parts.ROW_GROUP_ROWS", 100)
    parent = ingest(section, name="old", seed=0, data_root=tmp_path, directory=tmp_path / "old")
    assert pq.ParquetFile(tmp_path / "old" / "train" / "part-00000.parquet").num_row_groups > 10
    graph = grown(parent, tmp_path, "new.tsv", section=section)
    at_once = ingest(
        dataclasses.replace(section, train=("all.tsv",)), name="all", seed=0, data_root=tmp_path,
        directory=tmp_path / "all",
    )  # fmt: skip
    # All sixty names are in the first file, so ids and hashes agree.
    np.testing.assert_array_equal(graph.triples("train"), at_once.triples("train"))
    assert graph.facts["duplicates"]["train"] == 100
    assert graph.num_triples["growth"] == 0


@pytest.mark.parametrize(
    ("text", "only_new_names", "message"),
    [
        ("", False, "extend.triples: no triples in new.tsv"),
        ("e00\tr0\te00\n", False, "all 1 triples of new.tsv are in the graph already"),
        ("e01\tr0\te39\n", True, "mention no entity or relation that the graph lacks"),
        ("e00\tr0\n", False, "new.tsv:1"),
        (None, False, "extend.triples: no file 'new.tsv'"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    parent: Graph, tmp_path: Path, text: str | None, only_new_names: bool, message: str
) -> None:
    if text is not None:
        (tmp_path / "new.tsv").write_text(text)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(GraphError) as caught:
        grown(parent, tmp_path, "new.tsv", only_new_names=only_new_names)
    assert message in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_wrong_schema_is_told_with_all_that_is_wrong(parent: Graph, tmp_path: Path) -> None:
    pq.write_table(pa.table({"head": [1.5], "relation": ["r"]}), tmp_path / "new.parquet")
    with pytest.raises(GraphError) as caught:
        grown(parent, tmp_path, "new.parquet")
    assert "no column 'tail' for tail" in str(caught.value)
    assert "column 'head' for head is double" in str(caught.value)
