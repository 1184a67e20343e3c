"""The reader of exported tiers: scores, names, and what it refuses."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tables import (
    RELATION_UNIT_COLUMNS,
    SCORERS,
    UNIT_COLUMNS,
    export,
    model_facts,
    plain_score,
    small_tables,
)
from tier_writer import Format, Model, write_tiers

from medscale.config import ExportSection
from medscale.errors import ExportError
from medscale.manifest import MANIFEST, VERIFIED, write_manifest
from medscale.model.reference import sub_model_scores
from medscale.runtime import Tier
from medscale.runtime.names import NameTable
from medscale.runtime.shards import MAX_HEADER_BYTES, map_tensors
from medscale.runtime.verification import VERIFY
from medscale.split import write_export

TIERS = {"phone": 3, "pc": 5, "server": 12}


@pytest.fixture(scope="module")
def phone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of one small exported tier; tests that damage it copy it first."""
    facts = model_facts("complex", damping=(0.5, 0.25), reciprocal=True)
    tables, directory = small_tables(facts, 50, 4), tmp_path_factory.mktemp("run") / "export"
    names = [f"e{i}" for i in range(50)], [f"r{i}" for i in range(4)]
    model = Model(
        tables.entities, tables.relation_rows, *names, "complex", damping=facts.damping, reciprocal=True,
    )  # fmt: skip
    write_tiers(directory, model, TIERS, Format(shard_rows=20))
    return directory / "phone"


@pytest.fixture
def copy(phone: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(phone, tmp_path / "phone"))


def rewrite_manifest(directory: Path, **facts: object) -> None:
    """Seal a directory's files and changed facts anew, as a hostile writer could."""
    old = json.loads((directory / MANIFEST).read_text())
    write_manifest(directory, old["kind"], old["format"], old["facts"] | facts)


def shipped(directory: Path) -> list[Path]:
    """Return what an export wrote, without what readers noted since."""
    return sorted(path for path in directory.iterdir() if not path.name.startswith(VERIFIED))


# Scores


@pytest.mark.parametrize(("scorer", "norm"), SCORERS)
@pytest.mark.parametrize("damping", [(1.0, 1.0), (0.5, 0.25)])
@pytest.mark.parametrize("reciprocal", [False, True])
def test_scores_are_those_of_the_model_cropped(
    tmp_path: Path, data_dir: Path, scorer: str, norm: str, damping: tuple[float, ...], reciprocal: bool
) -> None:
    lines = (data_dir / "umls" / "train.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    entities = sorted({name for row in rows for name in (row[0], row[2])})
    relations = sorted({row[1] for row in rows})
    facts = model_facts(scorer, norm, damping=damping, reciprocal=reciprocal)
    tables = small_tables(facts, len(entities), len(relations))
    write_export(
        tables, pa.array(entities), pa.array(relations), facts, TIERS, tmp_path / "export", ExportSection(shard_rows=60)
    )

    triples = rows[:40]
    h, r, t = (
        np.array([names.index(row[i]) for row in triples])
        for i, names in ((0, entities), (1, relations), (2, entities))
    )

    def reference(known: np.ndarray, relation: np.ndarray, other: np.ndarray) -> np.ndarray:
        tensors = (torch.from_numpy(np.ascontiguousarray(x)).double() for x in (known, relation, other))
        columns = (UNIT_COLUMNS[scorer], RELATION_UNIT_COLUMNS[scorer])
        return sub_model_scores(scorer, norm, facts.dims, damping, columns, *tensors).numpy()

    forward = reference(tables.entities[h], tables.relation_rows[r], tables.entities[t])
    asked_for_heads = forward
    if reciprocal:
        inverse = tables.relation_rows[r + len(relations)]
        asked_for_heads = reference(tables.entities[t], inverse, tables.entities[h])
    for i, name in enumerate(TIERS):
        tier = Tier.open(tmp_path / "export" / name)
        scale = np.abs(forward[i]).max()
        found = tier.score([row[0] for row in triples], [row[1] for row in triples], [row[2] for row in triples])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, (forward[i] + asked_for_heads[i]) / 2, rtol=1e-5, atol=1e-6 * scale)
        for j in range(5):
            head, relation, tail = triples[j]
            tails, heads = tier.score_tails(head, relation), tier.score_heads(relation, tail)
            assert tails.shape == heads.shape == (len(entities),)
            np.testing.assert_allclose(tails[t[j]], forward[i][j], rtol=1e-5, atol=1e-5 * scale)
            np.testing.assert_allclose(heads[h[j]], asked_for_heads[i][j], rtol=1e-5, atol=1e-5 * scale)


@settings(max_examples=30, deadline=None)
@given(
    scorer=st.sampled_from(SCORERS),
    dims=st.sets(st.integers(1, 24), min_size=1, max_size=5).map(lambda dims: tuple(sorted(dims))),
    damping=st.sampled_from([1.0, 0.5, 0.3]),
    cut=st.integers(0, 4),
    seed=st.integers(0, 2**32),
)
def test_a_crop_scores_like_a_plain_float64_loop(
    tmp_path_factory: pytest.TempPathFactory,
    scorer: tuple[str, str], dims: tuple[int, ...], damping: float, cut: int, seed: int,
) -> None:  # fmt: skip
    facts = model_facts(*scorer, dims=dims, damping=(damping,) * (len(dims) - 1))
    tables = small_tables(facts, 7, 2, seed)
    dim = dims[cut % len(dims)]
    directory = tmp_path_factory.mktemp("run") / "export"
    export(directory, facts, tables, {"tier": dim}, shard_rows=3)
    tier = Tier.open(directory / "tier")
    head, relation = seed % 7, seed % 2
    scores, tails = tier.score(head, relation, np.arange(7)), tier.score_tails(head, relation)
    heads = tier.score_heads(relation, head)
    for other in range(7):
        rows = (tables.entities[head], tables.relation_rows[relation], tables.entities[other])
        expected, size = plain_score(facts, dim, *rows)
        assert scores[other] == pytest.approx(expected, rel=1e-5, abs=1e-7 * size)
        assert tails[other] == pytest.approx(expected, rel=1e-5, abs=1e-6 * size)
        expected, size = plain_score(facts, dim, rows[2], rows[1], rows[0])
        assert heads[other] == pytest.approx(expected, rel=1e-5, abs=1e-6 * size)


def test_scores_broadcast_over_names_and_ids(phone: Path) -> None:
    tier = Tier.open(phone)
    heads = np.array([[1], [2]], np.uint16)
    grid = tier.score(heads, "r1", ["e3", "e4", "e5"])
    assert grid.shape == (2, 3)
    assert grid[1, 2] == tier.score("e2", 1, 5) == tier.score(2, "r1", "e5")
    assert tier.score([], 0, []).shape == (0,)


def test_top_k_is_best_first_and_breaks_ties_by_id(tmp_path: Path) -> None:
    facts = model_facts("distmult")
    tables = small_tables(facts, 30, 2)
    tables.entities[[4, 9, 21]] = tables.entities[17]
    export(tmp_path / "export", facts, tables, {"all": 12}, shard_rows=8)
    tier = Tier.open(tmp_path / "export" / "all")
    scores = tier.score("e3", "r1", np.arange(30))
    expected = sorted(range(30), key=lambda i: (-scores[i], i))
    for k in range(1, 31):
        names, best = tier.top_k("e3", "r1", k)
        assert names == [f"e{i}" for i in expected[:k]]
        assert best.tolist() == scores[expected[:k]].tolist()
    assert tier.top_k("e3", "r1", 1000)[0] == tier.top_k("e3", "r1", 30)[0]
    assert tier.top_k_heads("r1", "e3", 3)[0] == tier.top_k("e3", "r1", 3)[0]  # DistMult is symmetric
    with pytest.raises(ExportError, match="at least 1"):
        tier.top_k("e3", "r1", 0)


# Look-ups


def test_vectors_and_facts(tmp_path: Path) -> None:
    facts = model_facts("simple")
    tables = small_tables(facts, 45, 3)
    export(tmp_path / "export", facts, tables, TIERS, shard_rows=10)
    tier = Tier.open(tmp_path / "export" / "pc")
    assert (tier.name, tier.dim, tier.columns, tier.scorer) == ("pc", 5, 10, "simple")
    assert (tier.num_entities, tier.num_relations, tier.damping, tier.reciprocal) == (45, 3, (1.0,), False)
    assert tier.facts["tiers"] == TIERS
    assert tier.facts["dims"] == [3, 5]
    for i in range(45):
        assert tier.vector(f"e{i}").tobytes() == tables.entities[i, :10].tobytes()
    order = np.array([[44, 0], [10, 9]])
    assert np.array_equal(tier.vectors(order), tables.entities[order][..., :10])
    vector = tier.vector(7)
    vector[:] = 0  # a copy: the tier's own rows stay
    assert tier.vector(7).any()


def test_every_name_is_found_and_no_other(tmp_path: Path) -> None:
    names = [
        "",
        "a",
        "a\0",
        "aa",
        "ab",
        "b",
        "é",
        "e\u0301",
        "日本語",
        "\U0001f600",
        "x" * 10_000,
        "a/../b",
        "0",
        "\uffff",
    ]
    facts = model_facts()
    tables = small_tables(facts, len(names), 2)
    chunks = pa.chunked_array([names[:3], [], names[3:]])
    write_export(tables, chunks, pa.array(["r", "s"]), facts, {"t": 3}, tmp_path / "export")
    tier = Tier.open(tmp_path / "export" / "t")
    for i, name in enumerate(names):
        assert tier.entity_id(name) == i
        assert tier.entity_name(i) == name
    assert [tier.relation_name(tier.relation_id(name)) for name in ("r", "s")] == ["r", "s"]
    for stranger in ("A", "a\0\0", "aaa", "~", "\udc80", "e", "x" * 9_999):
        with pytest.raises(ExportError, match="unknown entity"):
            tier.entity_id(stranger)


@pytest.mark.parametrize(
    "entity",
    ["nobody", -1, 50, 2**70, True, 1.0, None, [1, 50], ["e1", "nobody"], [[1], [1, 2]], np.array([0.5])],
)
def test_unknown_entities_are_refused(phone: Path, entity: object) -> None:
    tier = Tier.open(phone)
    with pytest.raises(ExportError):
        tier.vectors(entity)  # type: ignore[arg-type]
    with pytest.raises(ExportError):
        tier.score(entity, "r0", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("relation", ["nothing", -1, 4, 7])
def test_unknown_relations_are_refused_inverses_included(phone: Path, relation: str | int) -> None:
    tier = Tier.open(phone)
    for ask in (tier.score_tails, lambda e, r: tier.score_heads(r, e), lambda e, r: tier.score(e, r, e)):
        with pytest.raises(ExportError, match="unknown relation"):
            ask("e0", relation)


def test_names_damaged_on_purpose_never_give_another_id() -> None:
    draw = np.random.default_rng(0)
    data = np.frombuffer(b"abcdef", np.uint8)
    for _ in range(500):
        offsets = np.array([0, *draw.integers(-3, 9, 5), 6], np.int64)
        table = NameTable("entity", "here", data, offsets, draw.integers(-2, 8, 6).astype(np.int64))
        for name in "abcdef":
            try:
                found = table.index(name)
            except ExportError:
                continue
            assert table.name(found) == name


def test_rows_are_mapped_not_read(phone: Path) -> None:
    tier = Tier.open(phone)
    maps = Path("/proc/self/maps").read_text()
    assert str(phone.resolve() / "entities-00002-of-00003.safetensors") in maps
    assert str(phone.resolve() / "names-00002-of-00003.safetensors") in maps
    assert tier.num_entities == 50


def test_the_reader_needs_neither_torch_nor_pyarrow(phone: Path) -> None:
    program = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchrec", "pyarrow", "ray", "fbgemm_gpu", "rich", "yaml"):
            raise ImportError(f"{{name}} is not for the runtime")
sys.meta_path.insert(0, Blocker())
from medscale.runtime import Tier
tier = Tier.open({str(phone)!r})
print(tier.top_k("e1", "r2", 2)[0], tier.vector("e1").shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = Tier.open(phone).top_k("e1", "r2", 2)[0]
    assert done.stdout.strip() == f"{names} (6,)"


# Damage


def test_every_flipped_bit_is_seen(copy: Path) -> None:
    draw = random.Random(0)
    for path in shipped(copy):
        original = path.read_bytes()
        for _ in range(20):
            damaged = bytearray(original)
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(ExportError):
                Tier.open(copy)
        path.write_bytes(original)
    Tier.open(copy)


def test_missing_extra_cut_and_swapped_files_are_named(copy: Path) -> None:
    files = [path for path in shipped(copy) if path.name != MANIFEST]
    for path in files:
        original = path.read_bytes()
        path.unlink()
        with pytest.raises(ExportError, match=path.name):
            Tier.open(copy)
        path.write_bytes(original[:-1])
        with pytest.raises(ExportError, match=path.name):
            Tier.open(copy)
        path.write_bytes(original)
    (copy / "more.bin").write_bytes(b"")
    with pytest.raises(ExportError, match=r"more\.bin"):
        Tier.open(copy)
    (copy / "more.bin").unlink()
    first, second = sorted(copy.glob("entities-*.safetensors"))[:2]
    first.rename(copy / "x")
    second.rename(first)
    (copy / "x").rename(second)
    with pytest.raises(ExportError, match="SHA-256"):
        Tier.open(copy)


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("dim", 0),
        ("dim", True),
        ("dim", "3"),
        ("dim", 10**30),
        ("columns", 5),
        ("relation_columns", 99),
        ("scorer", "transh"),
        ("scorer", ["complex"]),
        ("scorer", "transe"),
        ("norm", "l2"),
        ("norm", None),
        ("damping", 0.5),
        ("damping", [0.5]),
        ("damping", [1.5]),
        ("damping", "0.5"),
        ("damping", None),
        ("dims", []),
        ("dims", [3, 3]),
        ("dims", [2]),
        ("dims", [-1, 3]),
        ("dims", [1.5, 3]),
        ("dims", "3"),
        ("reciprocal", 1),
        ("reciprocal", False),
        ("precision", "float16"),
        ("precision", "int8"),
        ("layout", "delta"),
        ("sharding", "hash"),
        ("num_shards", 2),
        ("cuts", [2, 3]),
        ("payload", []),
        ("num_entities", 51),
        ("num_entities", 49),
        ("num_entities", 2**62),
        ("num_relations", 5),
        ("num_relations", 0),
        ("shard_rows", 10**30),
        ("shard_rows", 0),
        ("shard_rows", 25),
        ("shard_rows", 50),
        ("tier", 3),
        ("run", None),
    ],
)
def test_facts_that_contradict_the_files_are_refused_even_when_sealed(copy: Path, fact: str, value: object) -> None:
    rewrite_manifest(copy, **{fact: value})
    for verify in VERIFY:
        with pytest.raises(ExportError):
            Tier.open(copy, verify=verify)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "format 3"), ({"format": "1"}, "format"), ({"format": True}, "format"),
        ({"kind": "graph"}, "graph"),
        ({"facts": []}, "damaged"), ({"files": None}, "damaged"), ({"seal": "0"}, "sealed"),
    ],
)  # fmt: skip
def test_unknown_manifests_are_refused(copy: Path, change: dict[str, object], message: str) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(ExportError, match=message):
        Tier.open(copy)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{", '{"kind": "tier", "kind": "tier"}', "[" * 100_000, '{"kind": NaN}', "\ud800", "\0"],
)
def test_manifests_that_are_no_json_of_ours_are_refused(copy: Path, text: str) -> None:
    (copy / MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ExportError):
        Tier.open(copy)


def test_a_path_without_a_tier_says_so(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="holds no manifest"):
        Tier.open(tmp_path / "nowhere")


BAD_NAMES = [
    "..",
    "../secret",
    "../../secret",
    "a/../../secret",
    "/etc/passwd",
    "/secret",
    "//secret",
    "./secret",
    ".hidden",
    ".",
    "",
    "/",
    "a//b",
    "a/",
    "a/./b",
    "a\0b",
    "secret\0",
    "\0",
    "..\\secret",
    "a\\b",
    "C:\\secret",
    "C:secret",
    "~",
    "~/secret",
    "$HOME/x",
    "a b",
    "a\nb",
    "a\rb",
    "a\tb",
    "a:b",
    "%2e%2e/secret",
    "..%2fsecret",
    "é",
    "\u2024\u2024/secret",
    "a" * 201,
    "a/" * 5 + "a",
    "\ud800",
    "-rf",
    "file://x",
    "a;b",
]


def test_names_that_lead_outside_are_refused_and_never_opened(phone: Path, tmp_path: Path) -> None:
    """In a process of its own that records every file it opens."""
    assert len(BAD_NAMES) == len(set(BAD_NAMES)) == 40
    (tmp_path / "secret").write_bytes(b"secret")
    tier = Path(shutil.copytree(phone, tmp_path / "inside" / "tier"))
    manifest = json.loads((tier / MANIFEST).read_text())
    for i, name in enumerate(BAD_NAMES):
        case = Path(shutil.copytree(tier, tmp_path / "inside" / f"case{i}"))
        files = manifest["files"] | {name: manifest["files"]["relations.safetensors"]}
        (case / MANIFEST).write_text(json.dumps(manifest | {"files": files}))
    link = Path(shutil.copytree(tier, tmp_path / "inside" / "case40"))
    (link / "relations.safetensors").unlink()
    (link / "relations.safetensors").symlink_to(tmp_path / "secret")
    linked_manifest = Path(shutil.copytree(tier, tmp_path / "inside" / "case41"))
    (linked_manifest / MANIFEST).rename(tmp_path / "secret.json")
    (linked_manifest / MANIFEST).symlink_to(tmp_path / "secret.json")
    repeated = Path(shutil.copytree(tier, tmp_path / "inside" / "case42"))
    text = (repeated / MANIFEST).read_text()
    (repeated / MANIFEST).write_text(
        text.replace('"relations.safetensors": {', '"relations.safetensors": 0, "relations.safetensors": {')
    )
    program = f"""
import sys
from medscale.errors import ExportError
from medscale.runtime import Tier
root, opened = {str(tmp_path)!r}, []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
reasons = ["refused file name"] * 40 + ["leads out of", "it is a link", "twice"]
refused = 0
for case, reason in enumerate(reasons):
    for verify in ("once", "always", "never"):
        try:
            Tier.open(f"{{root}}/inside/case{{case}}", verify=verify)
            print("accepted", case, verify)
        except ExportError as error:
            assert reason in str(error), error
            refused += 1
outside = [path for path in opened if "secret" in path or "passwd" in path]
print(refused, outside, len(opened) > 40)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "129 [] True", done.stdout + done.stderr


# Abuse of the safetensors format


def write_safetensors(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


EMPTY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        ({"v": entry()}, bytes(16), 2**63),
        ({"v": entry()}, bytes(16), 2**64 - 1),
        ({"v": entry()}, bytes(16), 0),
        ({"v": entry()}, bytes(16), 100_000_001),
        ({"v": entry()}, bytes(16), 3),
        ({"v": entry()}, bytes(16), 1000),
        ({"v": entry()}, bytes(15), None),
        ({"v": entry()}, bytes(17), None),
        ({"v": entry()}, b"", None),
        ({"v": entry(shape=[2, 3])}, bytes(16), None),
        ({"v": entry(shape=[-2, -2])}, bytes(16), None),
        ({"v": entry(shape=[2**32, 2**32])}, bytes(16), None),
        ({"v": entry(shape=[2.0, 2.0])}, bytes(16), None),
        ({"v": entry(shape=[True, 4])}, bytes(16), None),
        ({"v": entry(shape=4)}, bytes(16), None),
        ({"v": entry(shape=[1, 2, 2])}, bytes(16), None),
        ({"v": entry(shape=[0, 2**70], offsets=[0, 0])}, b"", None),
        ({"v": entry(offsets=[16, 0])}, bytes(16), None),
        ({"v": entry(offsets=[-16, 0])}, bytes(16), None),
        ({"v": entry(offsets=[4, 20])}, bytes(20), None),
        ({"v": entry(offsets=[2**60, 2**60 + 16])}, bytes(16), None),
        ({"v": entry(offsets=[0, 16, 32])}, bytes(16), None),
        ({"v": entry(offsets="0")}, bytes(16), None),
        ({"v": entry("F64")}, bytes(32), None),
        ({"v": entry("O")}, bytes(16), None),
        ({"v": entry(["F32"])}, bytes(16), None),
        ({"v": entry(), "w": entry()}, bytes(16), None),
        ({"v": entry(), "w": entry(offsets=[8, 24])}, bytes(24), None),
        ({"v": entry(), "w": entry(offsets=[20, 36])}, bytes(36), None),
        ({"v": 3}, b"", None),
        ([], b"", None),
        ({"v": entry() | {"extra": 1}}, bytes(16), None),
        ({"__metadata__": {"a": 1}}, b"", None),
        (b"", b"", None),
        (b" {}", b"", None),
        (b"{", b"", None),
        (b"\xff\xfe{}", b"", None),
        (b'{"a":' * 20_000, b"", None),
        (b'{"v":%s,"v":%s}' % (EMPTY, EMPTY), b"", None),
        (b'{"v":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}', b"", None),
        (b'{"v":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}', b"", None),
        (b'{"v":"' + b"x" * MAX_HEADER_BYTES + b'"}', b"", None),
    ],
)
def test_malformed_safetensors_are_refused(tmp_path: Path, header: object, data: bytes, length: int | None) -> None:
    with pytest.raises(ExportError, match="not a sound safetensors"):
        map_tensors(write_safetensors(tmp_path / "x.safetensors", header, data, length))


def test_short_files_are_refused(tmp_path: Path) -> None:
    for size in range(9):
        (tmp_path / "x").write_bytes(bytes(size))
        with pytest.raises(ExportError):
            map_tensors(tmp_path / "x")
    with pytest.raises(ExportError):
        map_tensors(tmp_path)


def test_sound_files_map_as_the_library_reads_them(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(5, dtype=np.uint8),
        "c": np.arange(4, dtype=np.int64), "d": np.zeros((0, 3), np.float32), "e": np.array(2.5, np.float32),
    }  # fmt: skip
    safetensors.numpy.save_file(arrays, tmp_path / "x", metadata={"made": "here"})
    mapped = map_tensors(tmp_path / "x")
    assert mapped.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(mapped[name], array)
        assert mapped[name].dtype == array.dtype
        assert mapped[name].shape == array.shape
        assert not mapped[name].flags.writeable or not array.size


def mutated(draw: random.Random, data: bytes) -> bytes:
    """Return a file with one to three changes of the kinds that break parsers."""
    file = bytearray(data)
    tokens = [
        b"0",
        b"-1",
        b"99999999999999999999",
        b"1e3",
        b"null",
        b'"F64"',
        b'"BOOL"',
        b"[]",
        b"{",
        b"}",
        b",",
        b"\0",
        b"16",
    ]
    for _ in range(draw.randint(1, 3)):
        position = draw.randrange(min(len(file), 200))
        match draw.randrange(5):
            case 0:
                file[position] ^= 1 << draw.randrange(8)
            case 1:
                file[position : position + draw.randint(1, 4)] = draw.choice(tokens)
            case 2:
                del file[position : position + draw.randint(1, 8)]
            case 3:
                del file[draw.randrange(len(file)) :]
                file += b"" if file else b"\0"
            case _:
                digits = [i for i, byte in enumerate(file[:200]) if 48 <= byte < 58]
                if digits:
                    file[draw.choice(digits)] = draw.randrange(48, 58)
    return bytes(file)


def test_fuzzed_headers_never_give_what_the_library_would_not(tmp_path: Path) -> None:
    """2,000 mutations: a typed error, or exactly the arrays that the format's own library finds."""
    draw = random.Random(1)
    arrays = {
        "order": np.arange(3, dtype=np.int64),
        "vectors": np.ones((2, 2), np.float32),
        "bytes": np.ones(5, np.uint8),
    }
    sound, path = safetensors.numpy.save(arrays), tmp_path / "x"
    refused = accepted = 0
    for _ in range(2000):
        file = mutated(draw, sound)
        path.write_bytes(file)
        try:
            mapped = map_tensors(path)
        except ExportError:
            refused += 1
            continue
        accepted += 1
        known = safetensors.numpy.load(file)
        assert mapped.keys() == known.keys()
        assert all(mapped[n].tobytes() == known[n].tobytes() and mapped[n].shape == known[n].shape for n in known)
    assert refused > 1000
    assert accepted > 10  # renamed tensors, changed data: sound files still
