"""A graph directory, read back: what was written, or an error that names the file. Never other triples."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medscale.config import GraphSection
from medscale.errors import GraphError
from medscale.graph.ingest import ingest
from medscale.graph.reader import Graph, open_graph
from medscale.graph.schema import (
    PART_ROWS,
    ROW_GROUP_ROWS,
    TRIPLES_SCHEMA,
    PartWriter,
    open_parquet,
    open_writer,
)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    root = tmp_path_factory.mktemp("reader")
    draw = random.Random(0)
    rows = {f"e{draw.randrange(200)}\tr{draw.randrange(5)}\te{draw.randrange(200)}\n" for _ in range(3_000)}
    (root / "t.tsv").write_text("".join(sorted(rows)))
    (root / "types.tsv").write_text("".join(f"e{i}\tkind{i % 3}\n" for i in range(200)))
    section = GraphSection(train=("t.tsv",), valid_fraction=0.1, entity_types="types.tsv")
    return ingest(section, name="toy", seed=0, data_root=root, directory=root / "toy")


@pytest.fixture
def copy(graph: Graph, tmp_path: Path) -> Path:
    return Path(shutil.copytree(graph.directory, tmp_path / "toy"))


def test_open_graph_gives_what_ingest_gave(graph: Graph) -> None:
    opened = open_graph(graph.directory)
    assert opened == graph
    assert opened.num_triples["test"] == 0
    assert opened.triples("test").shape == (0, 3)
    assert opened.parts("test") == []
    triples = opened.triples("train")
    assert triples.dtype == np.int64
    assert triples.shape == (opened.num_triples["train"], 3)
    assert len(np.unique(triples, axis=0)) == len(triples)


def test_names_and_types(graph: Graph) -> None:
    names = graph.entity_names()
    assert len(names) == graph.num_entities == 200
    assert names.to_pylist() == sorted(names.to_pylist())
    assert graph.relation_names().to_pylist() == [f"r{i}" for i in range(5)]
    types = graph.entity_types()
    assert types is not None
    assert types.column("entity").to_pylist() == list(range(200))
    assert [f"kind{int(n[1:]) % 3}" for n in names.to_pylist()] == types.column("type").to_pylist()


def graph_or_error(directory: Path) -> Graph | GraphError:
    try:
        return open_graph(directory)
    except GraphError as error:
        return error


def triples_or_error(directory: Path) -> np.ndarray | GraphError:
    try:
        return open_graph(directory, verify=False).triples("train")
    except GraphError as error:
        return error


def test_every_single_flipped_bit_is_found(graph: Graph, copy: Path) -> None:
    draw = random.Random(0)
    for name in (*graph.files, "manifest.json"):
        path = copy / name
        good = path.read_bytes()
        for _ in range(4):
            bad = bytearray(good)
            bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
            path.write_bytes(bytes(bad))
            opened = graph_or_error(copy)
            if name == "manifest.json":
                assert isinstance(opened, GraphError) or opened.sha256 != graph.sha256
            else:
                assert isinstance(opened, GraphError), name
                assert name in str(opened)
        path.write_bytes(good)
    assert open_graph(copy).sha256 == graph.sha256


def test_without_verifying_page_checksums_still_guard_the_triples(graph: Graph, copy: Path) -> None:
    expected = graph.triples("train")
    path = copy / "train" / "part-00000.parquet"
    good = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(40):
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(bad))
        triples = triples_or_error(copy)
        if isinstance(triples, GraphError):
            assert "train" in str(triples)
            refused += 1
        else:
            assert np.array_equal(triples, expected)
    assert refused > 30


def test_missing_extra_and_truncated_files_are_named(copy: Path) -> None:
    part = copy / "train" / "part-00000.parquet"
    data = part.read_bytes()
    part.write_bytes(data[:-1])
    with pytest.raises(GraphError, match=r"part-00000\.parquet has \d+ bytes, its manifest says"):
        open_graph(copy)
    with pytest.raises(GraphError, match=r"part-00000\.parquet is damaged or missing"):
        open_graph(copy, verify=False).triples("train")
    part.unlink()
    with pytest.raises(GraphError, match=r"part-00000\.parquet is missing"):
        open_graph(copy)
    part.write_bytes(data)
    (copy / "train" / "part-00001.parquet").write_bytes(data)
    with pytest.raises(GraphError, match=r"part-00001\.parquet is not in the manifest"):
        open_graph(copy)


def rewrite(path: Path, rows: list[list[int]], schema: pa.Schema = TRIPLES_SCHEMA) -> None:
    with open_writer(path, schema) as writer:
        writer.write_table(pa.table([pa.array(column) for column in zip(*rows, strict=True)], schema=schema))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([200, 0, 0], r"row group 0, row 1 \(both from 0\): head 200 is out of range 0\.\.199"),
        ([0, 5, 0], r"relation 5 is out of range 0\.\.4"),
        ([0, 0, -1], r"tail -1 is out of range"),
        ([2**33, 0, 0], r"head 8589934592 is out of range"),
    ],
)
def test_ids_out_of_range_are_refused(copy: Path, row: list[int], message: str) -> None:
    rewrite(copy / "train" / "part-00000.parquet", [[0, 0, 0], row])
    with pytest.raises(GraphError, match=message):
        open_graph(copy, verify=False).triples("train")


def test_wrong_rows_and_columns_are_refused(graph: Graph, copy: Path) -> None:
    path = copy / "train" / "part-00000.parquet"
    rewrite(path, [[0, 0, 0]])
    with pytest.raises(GraphError, match="train holds 1 triples"):
        open_graph(copy, verify=False).triples("train")
    rewrite(path, [[0, 0, 0]] * (graph.num_triples["train"] + 1))
    with pytest.raises(GraphError, match="holds more rows than"):
        open_graph(copy, verify=False).triples("train")
    other = pa.schema([pa.field(name, pa.int32()) for name in TRIPLES_SCHEMA.names])
    rewrite(path, [[0, 0, 0]], other)
    with pytest.raises(GraphError, match="has columns head int32"):
        open_graph(copy, verify=False).triples("train")


def test_damaged_facts_are_refused(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    for key, value in [
        ("num_entities", -1),
        ("num_triples", {"train": 1}),
        ("name", None),
        ("num_relations", True),
    ]:
        changed = {**manifest, "facts": {**manifest["facts"], key: value}}
        (copy / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(GraphError, match=r"manifest\.json is damaged"):
            open_graph(copy)
    with pytest.raises(GraphError, match="never completed"):
        open_graph(copy / "train")


def test_parts_depend_on_rows_alone(tmp_path: Path) -> None:
    rows = np.arange(3 * 257).reshape(257, 3)
    for name, sizes in (("one", [257]), ("many", [1, 99, 0, 7, 150])):
        with PartWriter(tmp_path / name, TRIPLES_SCHEMA, part_rows=100) as writer:
            for batch in np.split(rows, np.cumsum(sizes)[:-1]):
                writer.append({column: batch[:, i] for i, column in enumerate(("head", "relation", "tail"))})
        assert writer.num_rows == 257
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == [f"part-{i:05d}.parquet" for i in range(3)]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
    tables = [pq.read_table(tmp_path / "one" / name) for name in files]
    assert [len(table) for table in tables] == [100, 100, 57]
    assert np.array_equal(np.stack([c.to_numpy() for c in pa.concat_tables(tables).columns], axis=1), rows)


def test_parts_and_row_groups_have_their_sizes(tmp_path: Path) -> None:
    with PartWriter(tmp_path / "train", TRIPLES_SCHEMA) as writer:
        for _ in range(3):
            column = np.zeros(PART_ROWS // 2 + 1, dtype=np.int64)
            writer.append({"head": column, "relation": column, "tail": column})
    with open_parquet(tmp_path / "train" / "part-00000.parquet") as first:
        groups = [first.metadata.row_group(i).num_rows for i in range(first.metadata.num_row_groups)]
    assert groups == [ROW_GROUP_ROWS] * 8
    assert writer.num_parts == 2
