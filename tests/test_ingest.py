"""Raw files to a graph: every format gives the same graph, counts are the field's, errors name the place."""

import gzip
import hashlib
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medscale.config import GraphSection
from medscale.errors import CapacityError, GraphError
from medscale.graph import ingest as ingest_module
from medscale.graph.ingest import ingest
from medscale.graph.raw import Rows, layout_problems, read_rows
from medscale.graph.reader import Graph
from medscale.graph.scan import scan_rows
from medscale.graph.schema import MAX_ID, MAX_NAME_BYTES
from medscale.graph.shuffle import _order
from medscale.graph.sources import RawFile, RawLayout

ROLES = ("head", "relation", "tail")
LAYOUT = RawLayout(ROLES, ROLES, ROLES)
TOY = [
    ("b", "likes", "a"),
    ("a", "likes", "c"),
    ("c", "knows", "é\u4e2d"),
    ("a", 'say "hi"', "b"),
    ("NA", "knows", "null"),
]


def build(root: Path, **section: Any) -> Graph:
    """Ingest files that lie in `root` into `root`/graphs/toy."""
    directory = root / "graphs" / "toy"
    return ingest(GraphSection(**section), name="toy", seed=0, data_root=root, directory=directory)


def named(graph: Graph, split: str = "train") -> set[tuple[str, str, str]]:
    entities, relations = graph.entity_names().to_pylist(), graph.relation_names().to_pylist()
    return {(entities[h], relations[r], entities[t]) for h, r, t in graph.triples(split).tolist()}


def tsv(triples: list[tuple[str, ...]], end: str = "\n") -> bytes:
    return "".join("\t".join(triple) + end for triple in triples).encode()


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path.name


def fingerprint(graph: Graph) -> dict[str, bytes]:
    return {name: (graph.directory / name).read_bytes() for name in graph.files}


# Real graphs


@pytest.mark.parametrize(
    ("folder", "suffix", "entities", "relations", "triples", "unseen"),
    [
        ("umls", "", 135, 46, (5_216, 652, 661), (0, 0)),
        ("CoDEx-S", ".zst", 2_034, 42, (32_888, 1_827, 1_828), (0, 0)),
        ("WN18RR", ".zst", 40_943, 11, (86_835, 3_034, 3_134), (210, 210)),
        ("FB15k-237", ".zst", 14_541, 237, (272_115, 17_535, 20_466), (9, 28)),
    ],
)
def test_real_graphs_have_the_known_counts(
    data_dir: Path, tmp_path: Path, folder: str, suffix: str, entities: int, relations: int,
    triples: tuple[int, int, int], unseen: tuple[int, int],
) -> None:  # fmt: skip
    files = {split: (f"{folder}/{split}.tsv{suffix}",) for split in ("train", "valid", "test")}
    section = GraphSection(**files)
    graph = ingest(section, name=folder, seed=0, data_root=data_dir, directory=tmp_path / folder)
    assert (graph.num_entities, graph.num_relations) == (entities, relations)
    assert tuple(graph.num_triples.values()) == triples
    assert graph.facts["unseen"] == dict(zip(("valid", "test"), unseen, strict=True))
    assert graph.facts["duplicates"] == {"train": 0, "valid": 0, "test": 0}
    for split, count in graph.num_triples.items():
        assert len(graph.triples(split)) == count


def test_dropping_unseen_names_is_an_option(data_dir: Path, tmp_path: Path) -> None:
    files = {split: (f"WN18RR/{split}.tsv.zst",) for split in ("train", "valid", "test")}
    section = GraphSection(**files, drop_unseen=True)
    graph = ingest(section, name="wn", seed=0, data_root=data_dir, directory=tmp_path / "wn")
    assert graph.num_triples == {"train": 86_835, "valid": 3_034 - 210, "test": 3_134 - 210}
    assert graph.num_entities == 40_559
    assert graph.facts["unseen_policy"] == "dropped"
    assert graph.facts["unseen"] == {"valid": 210, "test": 210}


def test_entity_types_of_a_real_graph(data_dir: Path, tmp_path: Path) -> None:
    section = GraphSection(train=("FB15k-237/test.tsv.zst",), entity_types="FB15k-237/entity_category4.tsv.zst")
    graph = ingest(section, name="fb", seed=0, data_root=data_dir, directory=tmp_path / "fb")
    table = graph.entity_types()
    assert table is not None
    assert set(table.column("type").to_pylist()) == {"location", "music", "organization", "sports"}
    assert table.column("label").null_count == table.num_rows
    counts = graph.facts["entity_types"]
    assert counts["rows"] == table.num_rows
    assert counts["rows_of_unknown_entities"] > 0


# Formats


def test_every_format_gives_the_same_graph(tmp_path: Path) -> None:
    plain = tsv(TOY)
    quoted = [[f'"{field.replace(chr(34), chr(34) * 2)}"' for field in triple] for triple in TOY]
    csv = "note,tail,relation,head\n" + "".join(f"x,{t},{r},{h}\n" for h, r, t in quoted)
    parquet = tmp_path / "p" / "t.parquet"
    parquet.parent.mkdir()
    heads, relations, tails = zip(*TOY, strict=True)
    columns = {"x": [1.5] * len(TOY), "tail": tails, "head": heads, "relation": relations}
    pq.write_table(pa.table(columns), parquet)
    expected = fingerprint(build(tmp_path / "0", train=(write(tmp_path / "0" / "t.tsv", plain),)))
    renamed = csv.replace("\n", "\r\n").replace("head", "from")
    cases: list[tuple[str, bytes, dict[str, Any]]] = [
        ("t.txt", tsv(TOY, "\r\n"), {}),
        ("t.tsv", b"\xef\xbb\xbf" + plain + b"\n\r\n\n", {}),
        ("t.tsv", plain[:-1], {}),
        ("t.tsv.gz", gzip.compress(plain[:10]) + gzip.compress(plain[10:]), {}),
        ("t.tsv.zst", pa.compress(plain, "zstd", asbytes=True), {}),
        ("t.data", plain, {"format": "tsv"}),
        ("t.tsv", plain + plain, {}),
        (
            "t.tsv",
            tsv([(t, "extra", r, h) for h, r, t in TOY]),
            {"columns": ("tail", "x", "relation", "head")},
        ),
        ("t.csv", csv.encode(), {"header": True}),
        ("t.csv.gz", gzip.compress(renamed.encode()), {"header": True, "head_column": "from"}),
        ("t.parquet", parquet.read_bytes(), {}),
    ]
    for number, (name, data, keys) in enumerate(cases, 1):
        root = tmp_path / str(number)
        graph = build(root, train=(write(root / name, data),), **keys)
        assert fingerprint(graph) == expected, (name, keys)
        assert named(graph) == set(TOY)
        assert graph.entity_names().to_pylist() == sorted({e for h, _, t in TOY for e in (h, t)})


def test_ntriples(tmp_path: Path) -> None:
    text = r"""# a comment
<http://e/a> <http://r/likes> <http://e/b> .
  <http://e/a>	<http://r/likes>	_:node1.

<http://e/b> <http://r/age> "4\"2"^^<http://www.w3.org/2001/XMLSchema#integer> . # said who?
<http://e/\u00e9> <http://r/name> "Zo\u00eb"@fr-FR .
<http://e/\u00E9> <http://r/likes> <http://e/a> .
"""
    root = tmp_path / "drop"
    graph = build(root, train=(write(root / "t.nt", text.encode()),))
    expected = {
        ("http://e/a", "http://r/likes", "http://e/b"),
        ("http://e/a", "http://r/likes", "_:node1"),
        ("http://e/é", "http://r/likes", "http://e/a"),
    }
    assert named(graph) == expected
    assert graph.facts["literals_dropped"] == 2
    root = tmp_path / "keep"
    graph = build(root, train=(write(root / "t.nt.gz", gzip.compress(text.encode())),), literals="keep")
    assert named(graph) == expected | {
        ("http://e/b", "http://r/age", r'"4\"2"^^<http://www.w3.org/2001/XMLSchema#integer>'),
        ("http://e/é", "http://r/name", r'"Zo\u00eb"@fr-FR'),
    }


def test_dense_integer_ids_stay_as_they_are(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    triples = np.unique(np.stack([generator.integers(0, n, 500) for n in (120, 12, 120)], axis=1), axis=0)
    assert set(np.unique(triples[:, [0, 2]])) == set(range(120))
    head, relation = triples[:, 0].astype(np.uint32), triples[:, 1].astype(np.int8)
    pq.write_table(pa.table({"head": head, "relation": relation, "tail": triples[:, 2]}), tmp_path / "t.parquet")
    graph = build(tmp_path, train=("t.parquet",))
    assert np.array_equal(np.unique(graph.triples("train"), axis=0), triples)


def test_globs_and_several_files(tmp_path: Path) -> None:
    for number, triple in enumerate(TOY):
        write(tmp_path / "parts" / f"p{number}.tsv", tsv([triple]))
    write(tmp_path / "parts" / "empty.tsv", b"")
    graph = build(tmp_path, train=("parts/p*.tsv", "parts/p0.tsv", "parts/empty.tsv"))
    assert named(graph) == set(TOY)
    assert graph.facts["duplicates"]["train"] == 0
    assert len(graph.facts["raw_files"]) == len(TOY) + 1


def test_entity_types_with_labels(tmp_path: Path) -> None:
    write(tmp_path / "t.tsv", tsv(TOY))
    write(
        tmp_path / "types.csv",
        b"entity,type,label\na,person,x\nb,place,y\na,person,x\na,author,z\nnobody,person,x\n",
    )
    graph = build(tmp_path, train=("t.tsv",), entity_types="types.csv", header=False, format="auto")
    table = graph.entity_types()
    assert table is not None
    a, b = (graph.entity_names().index(name).as_py() for name in "ab")
    # Without graph.header the first line is a row like any other, here of an unknown entity.
    assert graph.facts["entity_types"] == {"rows": 3, "rows_of_unknown_entities": 2}
    assert table.to_pylist() == [
        {"entity": a, "type": "author", "label": "z"},
        {"entity": a, "type": "person", "label": "x"},
        {"entity": b, "type": "place", "label": "y"},
    ]


# Counting, splitting, shuffling


def test_duplicates_leaks_and_unseen_names_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", tsv([("a", "r", "b"), ("a", "r", "b"), ("b", "r", "c"), ("a", "r", "b")]))
    write(tmp_path / "valid.tsv", tsv([("b", "r", "c"), ("b", "r", "c"), ("c", "r", "a")]))
    write(tmp_path / "test.tsv", tsv([("new", "r", "a"), ("a", "new", "b"), ("a", "r", "b")]))
    graph = build(tmp_path, train=("train.tsv",), valid=("valid.tsv",), test=("test.tsv",))
    assert graph.num_triples == {"train": 2, "valid": 2, "test": 3}
    assert graph.facts["duplicates"] == {"train": 2, "valid": 1, "test": 0}
    assert graph.facts["leaks"] == {"valid": 1, "test": 1}
    assert graph.facts["unseen"] == {"valid": 0, "test": 2}
    assert named(graph, "test") == {("new", "r", "a"), ("a", "new", "b"), ("a", "r", "b")}


def many(count: int) -> list[tuple[str, ...]]:
    draw = random.Random(0)
    return [(f"e{draw.randrange(300)}", f"r{draw.randrange(9)}", f"e{draw.randrange(300)}") for _ in range(count)]


def test_seeded_split(tmp_path: Path) -> None:
    triples = many(5_000)
    write(tmp_path / "t.tsv", tsv(triples + triples[:500]))
    fractions = {"valid_fraction": 0.1, "test_fraction": 0.2}
    graph = build(tmp_path, train=("t.tsv",), **fractions)
    splits = {split: named(graph, split) for split in ("train", "valid", "test")}
    assert set.union(*splits.values()) == set(triples)
    assert sum(map(len, splits.values())) == len(set(triples))
    assert len(splits["valid"]) / len(set(triples)) == pytest.approx(0.1, abs=0.02)
    assert len(splits["test"]) / len(set(triples)) == pytest.approx(0.2, abs=0.02)
    section = GraphSection(train=("t.tsv",), **fractions)  # type: ignore[arg-type]
    other = ingest(section, name="toy", seed=1, data_root=tmp_path, directory=tmp_path / "other")
    assert named(other, "test") != splits["test"]


def test_rows_are_shuffled_and_order_and_memory_change_nothing(tmp_path: Path) -> None:
    triples = sorted(set(many(5_000)))
    write(tmp_path / "t.tsv", tsv(triples))
    section = GraphSection(train=("t.tsv",))
    first = ingest(section, name="toy", seed=0, data_root=tmp_path, directory=tmp_path / "1")
    random.Random(1).shuffle(triples)
    write(tmp_path / "t.tsv", tsv(triples))
    section = GraphSection(train=("t.tsv",), memory_mib=128)
    second = ingest(section, name="toy", seed=0, data_root=tmp_path, directory=tmp_path / "2")
    assert fingerprint(first) == fingerprint(second)
    assert first.sha256 == second.sha256
    heads = first.triples("train")[:, 0]
    # Shuffled rows rise about half of the time; sorted ones nearly never fall.
    assert 0.4 < np.mean(np.diff(heads) > 0) < 0.6


def in_pieces(folder: Path, triples: list[tuple[str, ...]], number: int) -> None:
    """Write triples as that many files, each of which becomes a chunk where memory is short."""
    for part in range(number):
        write(folder / f"part-{part:02d}.tsv", tsv(triples[part::number]))


@pytest.mark.parametrize("kind", ["text", "integers", "integers in some files"])
def test_chunks_and_ranges_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """With 7 chunks, and with ranges of a few names and of a few hundred triples."""
    draw = random.Random(2)
    triples = [tuple(str(draw.randrange(n)) for n in (3_000, 30, 3_000)) for _ in range(4_000)]
    if kind != "integers":
        triples[::7] = [tuple(f"name of {word}" for word in triple) for triple in triples[::7]]
    if kind == "text":
        triples = [tuple(f"\u4e2d {word}" for word in triple) for triple in triples]
    in_pieces(tmp_path, triples, 7)
    kinds = "".join(f"{word}\t{draw.choice(['a', 'b'])}\n" for triple in triples for word in triple[::2])
    write(tmp_path / "kinds.tsv", (kinds + "nobody\ta\n").encode())
    section = GraphSection(
        train=("part-*.tsv",), valid_fraction=0.1, test_fraction=0.1, entity_types="kinds.tsv", drop_unseen=True
    )
    whole = ingest(section, name="toy", seed=0, data_root=tmp_path, directory=tmp_path / "whole")
    monkeypatch.setattr(ingest_module, "_MOST_BYTES", 20_000)
    pieces = ingest(section, name="toy", seed=0, data_root=tmp_path, directory=tmp_path / "pieces")
    assert fingerprint(pieces) == fingerprint(whole)
    assert pieces.sha256 == whole.sha256
    assert pieces.facts["unseen"]["test"] > 0
    types = pieces.entity_types()
    assert types is not None
    assert set(types.column("entity").to_pylist()) == set(range(pieces.num_entities))


def test_more_chunks_and_ranges_than_files_may_be_open(tmp_path: Path) -> None:
    in_pieces(tmp_path, many(3_000), 60)
    program = f"""
import resource
from pathlib import Path
from medscale.config import GraphSection
from medscale.graph import ingest as module
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
module._MOST_BYTES = 6_000
section, root = GraphSection(train=("part-*.tsv",), valid_fraction=0.1), Path({str(tmp_path)!r})
print(module.ingest(section, name="toy", seed=0, data_root=root, directory=root / "toy").sha256)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    section = GraphSection(train=("part-*.tsv",), valid_fraction=0.1)
    whole = ingest(section, name="toy", seed=0, data_root=tmp_path, directory=tmp_path / "whole")
    assert done.stdout.strip() == whole.sha256


def test_ids_and_rows_are_in_the_documented_order(tmp_path: Path) -> None:
    """Ids by name, rows and splits by the MD5 of a text: written down here once more, plainly."""
    triples = set(many(3_000))
    write(tmp_path / "t.tsv", tsv(list(triples)))
    section = GraphSection(train=("t.tsv",), test_fraction=0.25)
    graph = ingest(section, name="toy", seed=5, data_root=tmp_path, directory=tmp_path / "toy")

    def number(*words: object) -> int:
        return int.from_bytes(hashlib.md5("\t".join(map(str, words)).encode()).digest()[8:], "little")

    entities = {name: i for i, name in enumerate(sorted({e for h, _, t in triples for e in (h, t)}))}
    relations = {name: i for i, name in enumerate(sorted({r for _, r, _ in triples}))}
    for split, wanted in (("train", False), ("test", True)):
        chosen = [t for t in triples if (number("split", 5, *t) < 2**62) == wanted]
        rows = [(entities[h], relations[r], entities[t]) for h, r, t in chosen]
        assert graph.triples(split).tolist() == [
            list(row) for row in sorted(rows, key=lambda r: number("order", 5, *r))
        ]


def test_equal_hashes_are_ordered_by_ids() -> None:
    draw = np.random.default_rng(0)
    hashed, triples = draw.integers(0, 40, 200, dtype=np.uint64), draw.integers(0, 3, (200, 3))
    order = _order(hashed, triples)
    assert sorted(order.tolist()) == list(range(200))
    keys = [(int(hashed[i]), *triples[i].tolist()) for i in order]
    assert keys == sorted(keys)


# The plain twin


def in_rows(batch: Rows) -> list[tuple[str, ...]]:
    return list(zip(*(batch.names[role].to_pylist() for role in ROLES), strict=True))


FIELDS = st.text(st.characters(exclude_characters="\t\n\r\x00", exclude_categories=["Cs"]), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(FIELDS, FIELDS, FIELDS), max_size=8), st.sampled_from(["tsv", "csv"]), st.booleans())
def test_fast_reader_equals_plain_scanner(rows: list[tuple[str, str, str]], kind: str, crlf: bool) -> None:
    end = "\r\n" if crlf else "\n"
    if kind == "csv":
        quoted = [['"' + field.replace('"', '""') + '"' for field in row] for row in rows]
        text = "".join(",".join(row) + end for row in quoted)
    else:
        text = "".join("\t".join(row) + end for row in rows)
    with tempfile.TemporaryDirectory() as root:
        file = RawFile(Path(root) / "t", "t", kind, None)  # type: ignore[arg-type]
        write(file.path, text.encode())
        fast = [row for batch in read_rows(file, LAYOUT) for row in in_rows(batch)]
        plain = [fields for _, fields in scan_rows(file, LAYOUT)]
    if not (rows and rows[0][0].startswith("\ufeff") and kind == "tsv"):
        assert fast == plain == rows


def test_fast_ntriples_equal_plain_scanner(tmp_path: Path) -> None:
    terms = [
        "<http://a/b>",
        "<x:\\u00e9>",
        "_:b.1",
        '"lit . eral"',
        '"q\\"q"@en',
        '"1"^^<x:int>',
        '"<a> <b> <c> ."',
    ]
    draw = random.Random(0)
    ends = ["", " # c", " "]
    lines = [
        f"{draw.choice(terms[:3])} <r:{draw.randrange(3)}> {draw.choice(terms)} .{draw.choice(ends)}\n"
        for _ in range(300)
    ]
    file = RawFile(tmp_path / "t.nt", "t.nt", "ntriples", None)
    write(file.path, "".join(lines).encode())
    for literals in ("keep", "drop"):
        batches = list(read_rows(file, LAYOUT, literals=literals))
        fast = [row for batch in batches for row in in_rows(batch)]
        assert fast == [fields for _, fields in scan_rows(file, LAYOUT, literals)]
        assert len(fast) + sum(b.literals_dropped for b in batches) == 300


# What is wrong, and where


GOOD = tsv(many(2_000))
LONG = b"b" * (MAX_NAME_BYTES + 1)
ZST = pa.compress(GOOD, "zstd", asbytes=True)
NT = b"<a> <r> <b> .\n" * 1_000

BAD: list[tuple[str, bytes, dict[str, Any], str]] = [
    ("t.tsv", GOOD + b"a\tr\n" + GOOD, {}, r"t\.tsv:2001: 2 fields where 3 are expected"),
    ("t.tsv", GOOD + b"a\tr\tb\tc\n", {}, r"t\.tsv:2001: 4 fields"),
    ("t.tsv", GOOD + b"\n\na\t\tb\n", {}, r"t\.tsv:2003: relation is empty"),
    ("t.tsv", GOOD + b"a\tr\tb\xff\n", {}, r"t\.tsv:2001: not UTF-8 \(byte 0xff after 5 characters\)"),
    ("t.tsv", GOOD + b"a\tr\t" + LONG + b"\n", {}, r"t\.tsv:2001: tail is longer than"),
    ("t.tsv", b"a" * (20 << 20), {}, r"t\.tsv:1: longer than"),
    ("t.tsv.gz", gzip.compress(GOOD)[:-50], {}, r"t\.tsv\.gz:\d+: the compressed data break off"),
    ("t.tsv.zst", ZST[:-50], {}, r"t\.tsv\.zst:\d+: the compressed data break off"),
    ("t.tsv.gz", GOOD, {}, r"t\.tsv\.gz:1: the compressed data break off or are damaged"),
    ("t.tsv", b"", {}, r"no training triples in t\.tsv"),
    ("t.tsv", b"\n\n", {}, r"no training triples in t\.tsv"),
    ("t.csv", b"head,relation,tail\n", {"header": True}, r"no training triples in t\.csv"),
    ("t.csv", b'a,r,b\na,r,"b\nc,r,d\n', {}, r"t\.csv:2: broken quoting"),
    ("t.csv", b"h,relation\n1,2\n", {"header": True}, r"no column 'head' for head.* no column 'tail'"),
    ("t.csv", b"head,head,relation,tail\n1,2,3,4\n", {"header": True}, r"2 columns are named 'head'"),
    ("t.nt", NT + b"<a> <r> <b>\n", {}, r"t\.nt:1001: not an N-Triples line"),
    ("t.nt", NT + b"<a> <r> <\\x41> .\n", {}, r"t\.nt:1001: .*backslash"),
    ("t.nt", NT + b"<a> <r> \"\x01\" .\n", {}, r"t\.nt:1001: not an N-Triples line"),
    ("t.bin", GOOD, {}, r"suffix tells no format .*set graph\.format"),
    ("t.parquet", GOOD, {}, r"t\.parquet: not a Parquet file"),
]  # fmt: skip


def nothing_left(root: Path) -> bool:
    return not (root / "graphs").exists() or not list((root / "graphs").iterdir())


@pytest.mark.parametrize(("name", "data", "keys", "message"), BAD)
def test_bad_text_files(tmp_path: Path, name: str, data: bytes, keys: dict[str, Any], message: str) -> None:
    write(tmp_path / name, data)
    with pytest.raises(GraphError, match=message):
        build(tmp_path, train=(name,), **keys)
    assert nothing_left(tmp_path)


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> None:
    pq.write_table(pa.table(columns), path, **options)


NAMES = [f"e{i}" for i in range(100)]
IDS = list(range(100))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ([*NAMES, None, "x"], r"row group 5, row 0 \(both from 0\): head is null"),
        ([*NAMES, "x", ""], r"row group 5, row 1 \(both from 0\): head is empty"),
        ([*IDS, -1, 0], r"row group 5, row 0 .* head is -1; ids go from 0 to 2\^53"),
        ([*IDS, 0, MAX_ID + 1], r"row group 5, row 1 .* head is 9007199254740993"),
        ([*IDS, None, 0], r"row group 5, row 0 .* head is null"),
        (pa.array([*IDS, 0, 2**64 - 1], pa.uint64()), r"row group 5, row 1 .* head is 18446744073709551615"),
        (pa.array([b"x"] * 101 + [b"\xff"]).view(pa.string()), r"row group 5, row 1 .* head is not UTF-8"),
    ],
)
def test_bad_parquet_values(tmp_path: Path, head: Any, message: str) -> None:
    columns = {"head": head, "relation": ["r"] * 102, "tail": ["t"] * 102}
    parquet(tmp_path / "t.parquet", columns, row_group_size=20)
    with pytest.raises(GraphError, match=message):
        build(tmp_path, train=("t.parquet",))
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("large", [2**31, 2**33, MAX_ID])
def test_large_integer_ids_become_dense_ones(tmp_path: Path, large: int) -> None:
    parquet(tmp_path / "t.parquet", {"head": [0, large], "relation": [0, 0], "tail": [large, 7]})
    graph = build(tmp_path, train=("t.parquet",))
    assert named(graph) == {("0", "0", str(large)), (str(large), "0", "7")}
    assert graph.entity_names().to_pylist() == ["0", "7", str(large)]


@pytest.mark.parametrize(
    ("columns", "problems"),
    [
        ({}, ["no column 'head'", "no column 'relation'", "no column 'tail'"]),
        ({"head": ["a"], "tail": ["b"]}, ["no column 'relation' for relation; it has 'head', 'tail'"]),
        ({"subject": ["a"], "relation": ["r"], "tail": ["b"]}, ["no column 'head'"]),
        ({"head": [1.0], "relation": [True], "tail": ["b"]}, ["for head is double", "for relation is bool"]),
        ({"head": [b"a"], "relation": ["r"], "tail": [["b"]]}, ["for head is binary", "for tail is list"]),
        ({"head": [None], "relation": ["r"]}, ["'head' for head is null", "no column 'tail'"]),
    ],
)  # fmt: skip
def test_wrong_schemas_are_reported_in_full(tmp_path: Path, columns: dict[str, Any], problems: list[str]) -> None:
    parquet(tmp_path / "bad.parquet", columns)
    parquet(tmp_path / "good.parquet", {"head": ["a"], "relation": ["r"], "tail": ["b"]})
    with pytest.raises(GraphError) as caught:
        build(tmp_path, train=("good.parquet",), valid=("bad.parquet",), test=("bad.parquet",))
    for problem in problems:
        assert str(caught.value).count(problem) == 2, (problem, str(caught.value))


def test_repeated_parquet_column(tmp_path: Path) -> None:
    table = pa.table([["a"], ["b"], ["r"], ["t"]], names=["head", "head", "relation", "tail"])
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(GraphError, match="2 columns are named 'head'"):
        build(tmp_path, train=("t.parquet",))


@pytest.mark.parametrize("rows", [20_000_000])
def test_parquet_bomb_is_refused_from_its_footer(tmp_path: Path, rows: int) -> None:
    index = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1_000_000, dtype=np.int8)), pa.array(["x"]))
    table = pa.table({"head": index, "relation": index, "tail": index})
    with pq.ParquetWriter(tmp_path / "t.parquet", table.schema, compression="zstd") as writer:
        for _ in range(rows // 1_000_000):
            writer.write_table(table)
    with pytest.raises(GraphError, match=r"\d+ bytes that promise 20000000 rows; refused"):
        build(tmp_path, train=("t.parquet",))


def rows_or_error(file: RawFile) -> int | GraphError:
    try:
        assert not layout_problems(file, LAYOUT)
        return sum(len(rows.names["head"]) for rows in read_rows(file, LAYOUT))
    except GraphError as error:
        return error


def test_damaged_parquet_is_an_error_or_rows_but_never_a_crash(tmp_path: Path) -> None:
    columns = {role: [f"{role}{i % 50}" for i in range(2_000)] for role in ROLES}
    parquet(tmp_path / "good.parquet", columns, write_page_checksum=True)
    good = (tmp_path / "good.parquet").read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(60):
        data = bytearray(good)
        place = draw.randrange(len(data))
        kind = draw.choice(["flip", "cut", "zero", "swap"])
        if kind == "flip":
            data[place] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del data[place:]
        elif kind == "zero":
            data[place : place + 64] = bytes(len(data[place : place + 64]))
        else:
            data = data[place:] + data[:place]
        write(tmp_path / "bad.parquet", bytes(data))
        file = RawFile(tmp_path / "bad.parquet", "bad.parquet", "parquet", None)
        outcome = rows_or_error(file)
        assert outcome == 2_000 or "bad.parquet" in str(outcome)
        refused += isinstance(outcome, GraphError)
    assert refused > 40


def test_missing_files_name_the_data_root_and_how_to_set_it(tmp_path: Path) -> None:
    missing = r"graph\.train: no file 'no\.tsv' under the data root .*--data-dir or MEDSCALE_DATA_DIR"
    with pytest.raises(GraphError, match=missing):
        build(tmp_path, train=("no.tsv",))
    with pytest.raises(GraphError, match=r"the data root .* is no directory"):
        build(tmp_path / "nowhere", train=("no.tsv",))
    for name in ("/etc/passwd", "../x.tsv"):
        with pytest.raises(GraphError, match="leads out of the data root"):
            build(tmp_path, train=(name,))


def run_ingest(root: Path, prelude: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = f"""
import resource, sys
from pathlib import Path
from medscale.config import GraphSection
from medscale.errors import MedscaleError
from medscale.graph.ingest import ingest
root = Path({str(root)!r})
{prelude}
try:
    section = GraphSection(train=("t.tsv",))
    ingest(section, name="toy", seed=0, data_root=root, directory=root / "graphs" / "toy")
except MedscaleError as error:
    print(error)
    sys.exit(error.exit_code)
"""
    variables = {**os.environ, **environment}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def test_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    write(tmp_path / "t.tsv", tsv(many(20_000)))
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    result = run_ingest(tmp_path, limit)
    assert result.returncode == CapacityError.exit_code, result.stderr
    assert "cannot write under" in result.stdout
    assert nothing_left(tmp_path)


def test_a_killed_ingest_is_repeated_cleanly(tmp_path: Path) -> None:
    write(tmp_path / "t.tsv", tsv(many(500)))
    for point in ("before-manifest", "before-rename"):
        result = run_ingest(tmp_path, "", MEDSCALE_FAULT=point)
        assert result.returncode == -9
        assert not (tmp_path / "graphs" / "toy").exists()
    graph = build(tmp_path, train=("t.tsv",))
    assert [path.name for path in (tmp_path / "graphs").iterdir()] == ["toy"]
    assert named(graph) == set(many(500))


def test_memory_is_bounded_by_its_key(tmp_path: Path) -> None:
    """A million triples of two million names: some 70 MB of text, and 400 MiB where all may lie in memory."""
    for part in range(10):
        rows = (f"a name of some length {i:09d}\tr\tanother name, longer {i:09d}\n" for i in range(100_000))
        write(tmp_path / f"t{part}.tsv", "".join(f"{part}{row}" for row in rows).encode())
    write(tmp_path / "tiny.tsv", tsv(TOY))
    program = f"""
from pathlib import Path
from medscale.config import GraphSection
from medscale.graph.ingest import ingest
root = Path({str(tmp_path)!r})
def peak_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))
for name, memory_mib in (("tiny", 128), ("little", 128), ("much", 4096)):
    section = GraphSection(train=("tiny.tsv" if name == "tiny" else "t?.tsv",), memory_mib=memory_mib)
    graph = ingest(section, name="toy", seed=0, data_root=root, directory=root / name)
    print("peak", graph.sha256, peak_mib())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    told = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("peak ")]
    (_, libraries), (little, mib), (much, more_mib) = told
    assert little == much
    # Half as much again: what allocators keep for the next table.
    assert int(mib) - int(libraries) < 128 * 1.5
    assert int(more_mib) - int(libraries) > 256, "where it may, it takes more"


def test_type_columns_of_the_triples(tmp_path: Path) -> None:
    rows = ["h,ht,r,t,tt", "ann,person,buys,tea,product", "bob,person,buys,tea,product", "ann,buyer,knows,bob,person"]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    graph = build(
        tmp_path, train=("t.csv",), format="auto", header=True, head_column="h", relation_column="r", tail_column="t",
        head_type_column="ht", tail_type_column="tt",
    )  # fmt: skip
    names, table = graph.entity_names().to_pylist(), graph.entity_types()
    assert table is not None
    found = {(names[row["entity"]], row["type"]) for row in table.to_pylist()}
    assert found == {("ann", "person"), ("ann", "buyer"), ("bob", "person"), ("tea", "product")}


def test_all_missing_files_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(GraphError) as caught:
        build(tmp_path, train=("a.tsv",), valid=("b.tsv",), entity_types="c.tsv")
    for name in ("graph.train: no file 'a.tsv'", "graph.valid: no file 'b.tsv'", "graph.entity_types: no file 'c.tsv'"):
        assert name in str(caught.value)
