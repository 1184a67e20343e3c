"""Cutting tables into tiers: exact columns, equal bytes, and a reader that never sees half an export."""

import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import tier_writer
from small_tables import SCORERS, UNIT_COLUMNS, MemoryTables, export, model_facts, small_tables

from medscale.config import ExportSection
from medscale.errors import ConfigError, ExportError, RunLockedError
from medscale.manifest import read_manifest, verify_files
from medscale.namehash import fnv1a, names_twice
from medscale.runtime import Tier
from medscale.runtime.precision import PRECISIONS, encode
from medscale.split import EntityTypes, write_export
from medscale.storage import run_lock
from medscale.tierfiles import list_type
from medscale.versions import publication, roll_back, versions_of

TIERS = {"server": 12, "phone": 3, "pc": 5}
PRODUCTS = ("simple", "complex", "distmult")


def digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def facts_of(tier: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((tier / "manifest.json").read_text())["facts"]
    return facts


def shard_tensors(tier: Path, kind: str = "entities") -> list[dict[str, np.ndarray]]:
    """Read the shards of a tier with the library of safetensors, in order."""
    return [safetensors.numpy.load_file(path) for path in sorted(tier.glob(f"{kind}-*.safetensors"))]


def by_id(tier: Path, tensor: str = "vectors") -> np.ndarray:
    """Return a tensor of all shards in the order of ids."""
    shards = shard_tensors(tier)
    rows = np.concatenate([shard[tensor] for shard in shards])
    if facts_of(tier)["sharding"] == "range":
        return rows
    ids = np.concatenate([shard["ids"] for shard in shards])
    return rows[np.argsort(ids)]


def plain_payload(tier: Path, widths: list[int]) -> list[str]:
    """Compute the payload hashes of the cuts in a tier's files, `widths` stored numbers each, as FORMAT.md says."""
    found, start = [], 0
    for number, width in enumerate(widths):
        hashes = b""
        for shard in shard_tensors(tier):
            data = np.ascontiguousarray(shard["vectors"][:, start : start + width]).tobytes()
            if "scales" in shard:
                data += np.ascontiguousarray(shard["scales"][:, number]).tobytes()
            hashes += hashlib.sha256(data).digest()
        found.append(hashlib.sha256(hashes).hexdigest())
        start += width
    return found


# What is written


@pytest.mark.parametrize(("scorer", "norm"), SCORERS)
@pytest.mark.parametrize("reciprocal", [False, True])
def test_cropped_columns_are_the_tables_bit_for_bit(tmp_path: Path, scorer: str, norm: str, reciprocal: bool) -> None:
    facts = model_facts(scorer, norm, reciprocal=reciprocal)
    tables = small_tables(facts, 103, 4)
    tables.entities[5, 0] = -0.0
    tables.entities[6, 0] = np.float32(1e-42)  # subnormal
    written = export(tmp_path / "export", facts, tables, TIERS, shard_rows=40, chunk_bytes=700)
    assert [tier.name for tier in written] == ["phone", "pc", "server"]
    for tier in written:
        directory = tmp_path / "export" / tier.name
        columns = tier.dim * UNIT_COLUMNS[scorer]
        crop = tables.entities[:, :columns]
        assert tier.columns == columns
        assert tier.bytes == sum(path.stat().st_size for path in directory.iterdir())
        assert tier.files == len(list(directory.iterdir()))
        assert by_id(directory).tobytes() == crop.tobytes()
        parts = [
            pq.read_table(path, page_checksum_verification=True)
            for path in sorted(directory.glob("entities-*.parquet"))
        ]
        assert [len(part) for part in parts] == [40, 40, 23]
        table = pa.concat_tables(parts)
        assert table.schema.types == [pa.int64(), pa.string(), list_type(pa.float32(), columns)]
        vectors = np.concatenate([chunk.flatten().to_numpy() for chunk in table["vector"].chunks])
        assert vectors.tobytes() == crop.tobytes()
        assert table["id"].to_pylist() == list(range(103))
        assert table["name"].to_pylist() == [f"e{i}" for i in range(103)]
        verify_files(directory, read_manifest(directory, "tier", 2, ExportError), ExportError)


@pytest.mark.parametrize("scorer", ["rotate", "complex", "pairre"])
@pytest.mark.parametrize("reciprocal", [False, True])
def test_relations_are_as_trained_or_turned_into_cos_and_sin(tmp_path: Path, scorer: str, reciprocal: bool) -> None:
    facts = model_facts(scorer, reciprocal=reciprocal)
    tables = small_tables(facts, 5, 4)
    export(tmp_path / "export", facts, tables, TIERS)
    export(tmp_path / "delta", facts, tables, TIERS, layout="delta", precision="int8")
    tensors = safetensors.numpy.load_file(tmp_path / "export" / "pc" / "relations.safetensors")
    rows, text = tensors["vectors"], tensors["relation_bytes"].tobytes()
    table = pq.read_table(tmp_path / "export" / "pc" / "relations.parquet", page_checksum_verification=True)
    number = 8 if reciprocal else 4
    assert rows.shape == (number, 10)
    if scorer == "rotate":
        phases = tables.relation_rows[:, :5].astype(np.float64)
        assert np.array_equal(rows[:, 0::2], np.cos(phases).astype(np.float32))
        assert np.array_equal(rows[:, 1::2], np.sin(phases).astype(np.float32))
    else:
        assert rows.tobytes() == tables.relation_rows[:, :10].tobytes()
    assert [text[a:b] for a, b in zip(*(tensors["relation_offsets"][i:] for i in (0, 1)), strict=False)] == [
        b"r0", b"r1", b"r2", b"r3",
    ]  # fmt: skip
    assert table["id"].to_pylist() == [0, 1, 2, 3] * (number // 4)
    assert table["name"].to_pylist() == ["r0", "r1", "r2", "r3"] * (number // 4)
    assert table["inverse"].to_pylist() == [i >= 4 for i in range(number)]
    assert np.array_equal(np.stack(table["vector"].to_numpy()), rows)
    delta = safetensors.numpy.load_file(tmp_path / "delta" / "pc" / "relations.safetensors")
    assert delta.keys() == {"vectors"}
    assert delta["vectors"].tobytes() == np.ascontiguousarray(rows[:, 6:]).tobytes()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sharding", ["range", "hash"])
@pytest.mark.parametrize("scorer", ["rotate", "distmult"])
def test_cuts_nest_byte_for_byte_across_tiers_and_layouts(
    tmp_path: Path, scorer: str, sharding: str, precision: str
) -> None:
    facts = model_facts(scorer)
    tables = small_tables(facts, 103, 4)
    tables.entities[7] = 0  # no scale
    form = {"precision": precision, "sharding": sharding, "shard_rows": 40}
    export(tmp_path / "full", facts, tables, TIERS, chunk_bytes=1000, **form)
    export(tmp_path / "delta", facts, tables, TIERS, layout="delta", **form)
    ends = [dim * UNIT_COLUMNS[scorer] for dim in (0, 3, 5, 12)]
    cuts = [encode(tables.entities[:, a:b], precision) for a, b in itertools.pairwise(ends)]  # type: ignore[arg-type]
    widths = [stored.shape[1] for stored, _ in cuts]
    payload = plain_payload(tmp_path / "full" / "server", widths)
    for number, name in enumerate(("phone", "pc", "server")):
        whole, delta = tmp_path / "full" / name, tmp_path / "delta" / name
        upto = cuts[: number + 1]
        assert by_id(whole).tobytes() == np.concatenate([stored for stored, _ in upto], axis=1).tobytes()
        assert by_id(delta).tobytes() == cuts[number][0].tobytes()
        if precision in ("int8", "int4"):
            scales = np.stack([scale for _, scale in upto if scale is not None], axis=1)
            assert by_id(whole, "scales").tobytes() == scales.tobytes()
            assert by_id(delta, "scales").tobytes() == np.ascontiguousarray(scales[:, -1:]).tobytes()
        # The chain of deltas is the full server tier.
        assert facts_of(whole)["payload"] == facts_of(delta)["payload"] == payload[: number + 1]
        assert facts_of(whole)["cuts"] == facts_of(delta)["cuts"] == [3, 5, 12][: number + 1]
        assert facts_of(whole)["base"] is None
        below = None if number == 0 else {"tier": ("phone", "pc")[number - 1], "payload": payload[:number]}
        assert facts_of(delta)["base"] == below
        assert facts_of(delta)["layout"] == ("delta" if number else "full")
        assert ("index.safetensors" in digests(delta)) == (sharding == "hash" and number == 0)
        assert bool(list(delta.glob("names-*"))) == (number == 0)
        for tier, columns in ((whole, number), (delta, int(number > 0))):
            found = {len(shard.get("norms", np.zeros((0, 0))).T) for shard in shard_tensors(tier)}
            assert found == {columns if scorer in PRODUCTS else 0}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("form", [("full", "range"), ("full", "hash"), ("delta", "range"), ("delta", "hash")])
def test_the_core_is_what_the_plain_writer_writes(tmp_path: Path, form: tuple[str, str], precision: str) -> None:
    layout, sharding = form
    facts = model_facts("complex", reciprocal=True)
    tables = small_tables(facts, 70, 3)
    types = EntityTypes(("city", "user"), (np.arange(70) % 3 - 1).astype(np.int32))
    how = {"layout": layout, "sharding": sharding, "precision": precision, "shard_rows": 20}
    export(tmp_path / "export", facts, tables, TIERS, types=types, formats=(), **how)
    model = tier_writer.Model(
        tables.entities, tables.relation_rows, [f"e{i}" for i in range(70)], ["r0", "r1", "r2"], "complex",
        reciprocal=True, entity_types=types.names, types=types.codes.tolist(),
    )  # fmt: skip
    tier_writer.write_tiers(tmp_path / "plain", model, TIERS, tier_writer.Format(**how))
    for name in TIERS:
        ours, theirs = tmp_path / "export" / name, tmp_path / "plain" / name
        assert facts_of(ours) == facts_of(theirs)
        files = sorted(path.name for path in theirs.iterdir())
        assert sorted(path.name for path in ours.iterdir()) == files
        for file in (file for file in files if file != "manifest.json"):
            one, two = (safetensors.numpy.load_file(place / file) for place in (ours, theirs))
            assert one.keys() == two.keys()
            for key in one:
                assert (one[key].dtype, one[key].shape) == (two[key].dtype, two[key].shape), (file, key)
                assert one[key].tobytes() == two[key].tobytes(), (file, key)


def test_norms_are_those_of_stored_numbers_rounded_up(tmp_path: Path) -> None:
    facts = model_facts("complex")
    tables = small_tables(facts, 50, 2)
    tables.entities[3] = 0
    for precision in PRECISIONS:
        export(tmp_path / "export", facts, tables, TIERS, precision=precision, shard_rows=30)
        table = pa.concat_tables(
            [pq.read_table(path) for path in sorted((tmp_path / "export" / "server").glob("entities-*.parquet"))]
        )
        values = np.array(table["vector"].to_pylist(), np.float64)
        norms = by_id(tmp_path / "export" / "server", "norms")
        for column, (start, stop) in enumerate(((6, 10), (10, 24))):
            exact = np.array([float(np.sqrt(sum(x * x for x in row))) for row in values[:, start:stop]])
            assert (norms[:, column] >= exact * (1 - 1e-15)).all()
            assert (norms[:, column] <= exact * (1 + 2.4e-7)).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_parquet_holds_what_the_core_decodes_to(tmp_path: Path, precision: str) -> None:
    facts = model_facts()
    tables = small_tables(facts, 60, 3)
    written = export(tmp_path / "export", facts, tables, TIERS, precision=precision, shard_rows=25, layout="delta")
    error = {"float32": 0, "float16": 2**-11, "int8": 1 / 254, "int4": 1 / 14}[precision]
    for tier, (start, stop) in zip(written, ((0, 3), (3, 5), (5, 12)), strict=True):
        names = ", name" if tier.layout == "full" else ""
        rows = duckdb.sql(
            f"SELECT id{names}, vector, vector[1:2] AS first FROM '{tmp_path}/export/{tier.name}/entities-*.parquet' "
            "ORDER BY id"
        ).fetchall()
        assert [row[0] for row in rows] == list(range(60))
        assert not names or [row[1] for row in rows] == [f"e{i}" for i in range(60)]
        exact = tables.entities[:, start:stop]
        largest = np.abs(exact).max(axis=1, keepdims=True)
        assert (np.abs(np.array([row[-2] for row in rows]) - exact) <= error * largest * 1.0001).all()
        assert [row[-1] for row in rows] == [row[-2][:2] for row in rows]


def test_an_entity_of_ten_units_takes_16_bytes(tmp_path: Path) -> None:
    for scorer, most in (("transe", 16), ("rotate", 28)):
        facts = model_facts(scorer, dims=(10, 20), damping=(1.0,))
        (phone,) = export(tmp_path / scorer, facts, small_tables(facts, 2000, 2), {"phone": 10}, precision="int8")
        assert phone.bytes_per_entity <= most


def test_shards_by_hash_hold_the_names_that_hash_to_them(tmp_path: Path) -> None:
    def plain_hash(name: str) -> int:
        value = 0xCBF29CE484222325
        for byte in name.encode():
            value = (value ^ byte) * 0x100000001B3 % 2**64
        return value

    facts = model_facts()
    tables = small_tables(facts, 103, 2)
    types = EntityTypes(("city", "user"), (np.arange(103) % 3 - 1).astype(np.int32))
    export(tmp_path / "export", facts, tables, TIERS, sharding="hash", shard_rows=10, types=types)
    tier = tmp_path / "export" / "pc"
    index = safetensors.numpy.load_file(tier / "index.safetensors")["shard"]
    assert index.dtype == np.int32
    assert index.tolist() == [plain_hash(f"e{i}") % 11 for i in range(103)]
    for number, (rows, names) in enumerate(zip(shard_tensors(tier), shard_tensors(tier, "names"), strict=True)):
        ids = np.flatnonzero(index == number)
        assert rows["ids"].tolist() == ids.tolist()
        assert names["entity_type"].tolist() == types.codes[ids].tolist()
        text, ends = names["entity_bytes"].tobytes(), names["entity_offsets"]
        found = [text[a:b].decode() for a, b in itertools.pairwise(ends)]
        assert found == [f"e{i}" for i in ids]
        assert [found[i] for i in names["entity_order"]] == sorted(found)
    assert facts_of(tier)["entity_types"] == ["city", "user"]
    assert facts_of(tier)["num_shards"] == 11


def test_shards_by_hash_may_be_empty(tmp_path: Path) -> None:
    facts = model_facts("complex")
    export(
        tmp_path / "export", facts, small_tables(facts, 12, 2), TIERS, sharding="hash", shard_rows=1, precision="int8"
    )
    tier = tmp_path / "export" / "server"
    counts = [len(shard["vectors"]) for shard in shard_tensors(tier)]
    assert sum(counts) == len(counts) == 12
    assert 0 in counts
    verify_files(tier, read_manifest(tier, "tier", 2, ExportError), ExportError)
    assert duckdb.sql(f"SELECT count(*) FROM '{tier}/entities-*.parquet'").fetchall() == [(12,)]


def test_hashes_of_names_are_fnv1a() -> None:
    known = {"": 0xCBF29CE484222325, "a": 0xAF63DC4C8601EC8C, "foobar": 0x85944171F73967E8}
    draw = random.Random(0)
    texts = ["".join(chr(draw.choice((65, 233, 0x65E5, 0x1F600))) for _ in range(n)) for n in range(40)]
    names = pa.chunked_array([pa.array(["x", *known]).slice(1), pa.array([], pa.string()), pa.array(texts)])
    found = fnv1a(names)
    assert found[:3].tolist() == list(known.values())
    for text, value in zip(texts, found[3:], strict=True):
        plain = 0xCBF29CE484222325
        for byte in text.encode():
            plain = (plain ^ byte) * 0x100000001B3 % 2**64
        assert int(value) == plain
    # Names whose hashes collide are not equal for that.
    assert names_twice(pa.chunked_array([["a", "b", "c"]]), np.array([7, 7, 7], np.uint64)) is None
    assert names_twice(pa.chunked_array([["a", "b", "a"]]), np.array([7, 7, 7], np.uint64)) == "a"


def test_exporting_again_gives_the_same_bytes(tmp_path: Path) -> None:
    facts = model_facts("complex", reciprocal=True)
    for form in ({}, {"precision": "int8", "layout": "delta", "sharding": "hash"}):
        tables = small_tables(facts, 90, 3)
        first: dict[str, str] = {}
        for threads in (1, 3, 1):
            export(tmp_path / "export", facts, tables, TIERS, shard_rows=20, threads=threads, **form)
            found = digests((tmp_path / "export").resolve())
            assert first in ({}, found)
            first = found
    export(tmp_path / "bare", facts, tables, TIERS, formats=())
    assert sorted(digests(tmp_path / "bare" / "pc")) == [
        "entities-00000-of-00001.safetensors", "manifest.json", "names-00000-of-00001.safetensors",
        "relations.safetensors",
    ]  # fmt: skip


def test_rows_stream_in_bounded_portions(tmp_path: Path) -> None:
    facts = model_facts()
    for sharding in ("range", "hash"):
        whole, portions = small_tables(facts, 1000, 3), small_tables(facts, 1000, 3)
        form = {"sharding": sharding, "shard_rows": 300}
        export(tmp_path / "whole" / "export", facts, whole, TIERS, **form)
        export(tmp_path / "portions" / "export", facts, portions, TIERS, chunk_bytes=1000, **form)
        assert whole.largest_read >= 300 * 12 * 4 * 0.7  # a shard
        assert portions.largest_read <= 1000
        for name in TIERS:
            one, other = (by_id(tmp_path / run / "export" / name) for run in ("whole", "portions"))
            assert one.tobytes() == other.tobytes()


def test_names_with_every_length_of_utf8_survive_chunks_and_slices(tmp_path: Path) -> None:
    names = [chr(point) * (point % 3 + 1) for point in (65, 233, 0x65E5, 0x1F600)] + ["", "tab\t", 'quo"te']
    sliced = pa.chunked_array([pa.array(["x", *names[:3], "y"]).slice(1, 3), pa.array(names[3:])])
    facts = model_facts()
    write_export(
        small_tables(facts, 7, 2),
        sliced,
        pa.array(["r", "s"], pa.large_string()),
        facts,
        {"t": 3},
        tmp_path / "export",
        ExportSection(shard_rows=2),
    )
    found = []
    for shard in shard_tensors(tmp_path / "export" / "t", "names"):
        text, ends = shard["entity_bytes"].tobytes(), shard["entity_offsets"]
        found += [text[a:b].decode() for a, b in itertools.pairwise(ends)]
    assert found == names


def test_extras_are_files_of_the_tier(tmp_path: Path) -> None:
    facts, seen = model_facts(), []

    def extra(tier: Any, directory: Path) -> None:
        seen.append((tier.name, tier.dim, directory.name))
        (directory / "model.onnx").write_bytes(bytes(tier.vector("e3")))

    written = export(tmp_path / "export", facts, small_tables(facts, 30, 2), TIERS, extras=[extra])
    assert seen == [("phone", 3, "phone"), ("pc", 5, "pc"), ("server", 12, "server")]
    for tier in written:
        directory = tmp_path / "export" / tier.name
        manifest = read_manifest(directory, "tier", 2, ExportError)
        assert manifest.files["model.onnx"]["bytes"] == 4 * tier.dim
        verify_files(directory, manifest, ExportError)
        assert tier.files == len(list(directory.iterdir()))


# Rows on top of another export


def grown(facts: Any, tables: MemoryTables, more: int) -> MemoryTables:
    """Return tables with more entities and a relation more; those that were there are as they were."""
    larger = small_tables(facts, len(tables.entities) + more, len(tables.relation_rows) + 1, seed=5)
    larger.entities[: len(tables.entities)] = tables.entities
    larger.relation_rows[: len(tables.relation_rows)] = tables.relation_rows
    return larger


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("sharding", ["range", "hash"])
@pytest.mark.parametrize("layout", ["full", "delta"])
def test_rows_that_joined_go_on_top_of_what_was_shipped(
    tmp_path: Path, layout: str, sharding: str, precision: str
) -> None:
    facts, form = model_facts("complex"), {"precision": precision, "sharding": sharding, "shard_rows": 20}
    tables = small_tables(facts, 50, 3)
    export(tmp_path / "parent", facts, tables, TIERS, layout=layout, **form)
    child, larger = model_facts("complex", run="child", step=9), grown(facts, tables, 25)
    export(tmp_path / "rows", child, larger, TIERS, base=tmp_path / "parent", **form)
    export(tmp_path / "whole", child, larger, TIERS, **form)
    for name in TIERS:
        rows, parent = (tmp_path / place / name for place in ("rows", "parent"))
        found = facts_of(rows)
        assert (found["layout"], found["first_entity"], found["num_entities"]) == ("rows", 50, 25)
        assert (found["num_relations"], found["num_shards"]) == (4, 2)
        assert found["base"] == {"tier": name, "payload": facts_of(parent)["payload"]}
        assert by_id(rows).tobytes() == by_id(tmp_path / "whole" / name)[50:].tobytes()
        if sharding == "hash":
            assert sorted(np.concatenate([s["ids"] for s in shard_tensors(rows)])) == list(range(50, 75))
            assert len(safetensors.numpy.load_file(rows / "index.safetensors")["shard"]) == 25
        names = sum(len(shard["entity_order"]) for shard in shard_tensors(rows, "names"))
        assert names == 25
        verify_files(rows, read_manifest(rows, "tier", 2, ExportError), ExportError)


def test_rows_are_refused_where_old_ones_have_changed(tmp_path: Path) -> None:
    facts = model_facts("complex")
    tables = small_tables(facts, 50, 3)
    parent = tmp_path / "parent"
    export(parent, facts, tables, TIERS, shard_rows=20)

    def refused(message: str, larger: MemoryTables, facts: Any = facts, base: Path = parent, **form: Any) -> None:
        with pytest.raises(ExportError, match=message):
            export(tmp_path / "rows", facts, larger, TIERS, base=base, **{"shard_rows": 20} | form)
        assert not (tmp_path / "rows").exists()

    for row, column in ((0, 0), (20, 11), (49, 23)):
        moved = grown(facts, tables, 5)
        moved.entities[row, column] += 1e-6
        refused("old rows have moved", moved)
    refused("none has joined", tables)
    refused("its shard_rows is 20", grown(facts, tables, 5), shard_rows=30)
    refused("its precision is 'float32'", grown(facts, tables, 5), precision="int8")
    refused("its scorer is 'complex'", grown(facts, tables, 5), facts=model_facts("simple"))
    export(tmp_path / "first", facts, grown(facts, tables, 5), TIERS, base=parent, shard_rows=20)
    refused("itself adds rows", grown(facts, tables, 9), base=tmp_path / "first")
    larger = grown(facts, tables, 5)
    with pytest.raises(ExportError, match="names other entities"):
        write_export(
            larger, pa.array([f"e{i + 1}" for i in range(55)]), pa.array(["r0", "r1", "r2", "r3"]), facts, TIERS,
            tmp_path / "rows", ExportSection(shard_rows=20), base=parent,
        )  # fmt: skip


# What is refused


def test_only_sub_models_can_be_tiers(tmp_path: Path) -> None:
    facts = model_facts()
    with pytest.raises(ConfigError) as caught:
        export(tmp_path / "export", facts, small_tables(facts, 5, 2), {"a": 4, "b": 3, "c": 13})
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["tier a", "tier c"]
    with pytest.raises(ConfigError, match="no tiers"):
        export(tmp_path / "export", facts, small_tables(facts, 5, 2), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["entities", "relation_rows"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_columns_that_are_not_finite_are_not_shipped(tmp_path: Path, where: str, value: float) -> None:
    facts = model_facts()
    good, bad = small_tables(facts, 30, 2), small_tables(facts, 30, 2)
    export(tmp_path / "export", facts, good, TIERS)
    getattr(bad, where)[1, 2] = value
    before = digests(tmp_path / "export")
    with pytest.raises(ExportError, match=r"(entity|relation) 1 has a column that is NaN or infinite"):
        export(tmp_path / "export", facts, bad, TIERS)
    assert digests(tmp_path / "export") == before
    assert not list((tmp_path / "export-versions").glob("*.tmp"))


def test_names_that_occur_twice_are_refused(tmp_path: Path) -> None:
    facts = model_facts()
    names = pa.chunked_array([["a", "b"], ["c", "a"]])
    with pytest.raises(ExportError, match="entity name 'a' more than once"):
        write_export(small_tables(facts, 4, 1), names, pa.array(["r"]), facts, {"t": 3}, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_graph_with_other_relations_is_refused(tmp_path: Path) -> None:
    facts = model_facts(reciprocal=True)
    tables, entity_names = small_tables(facts, 4, 2), pa.array(["a", "b", "c", "d"])
    with pytest.raises(ExportError, match="4 relation rows, the graph 4 relations"):
        write_export(tables, entity_names, pa.array(["r", "s", "t", "u"]), facts, {"t": 3}, tmp_path / "export")


def test_what_an_export_did_not_make_stays(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine").write_text("keep")
    facts = model_facts()
    with pytest.raises(ExportError, match="move it away"):
        export(tmp_path / "export", facts, small_tables(facts, 5, 2), TIERS)
    assert (tmp_path / "export" / "mine").read_text() == "keep"


def test_one_export_of_a_run_at_a_time(tmp_path: Path) -> None:
    facts = model_facts()
    with run_lock(tmp_path / "export-versions"), pytest.raises(RunLockedError):
        export(tmp_path / "export", facts, small_tables(facts, 5, 2), TIERS)


def test_parquet_pages_carry_checksums(tmp_path: Path) -> None:
    facts = model_facts()
    export(tmp_path / "export", facts, small_tables(facts, 200, 2), {"server": 12})
    path = tmp_path / "export" / "server" / "entities-00000-of-00001.parquet"
    original, draw = path.read_bytes(), random.Random(0)
    sound = pq.read_table(path)
    for _ in range(20):
        damaged = bytearray(original)
        damaged[draw.randrange(4, 200 * 12 * 4)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            table = pq.read_table(path, page_checksum_verification=True)
        except (OSError, pa.ArrowException):
            continue
        assert table.equals(sound)  # a bit that no reader looks at


def test_numbers_beyond_float16_are_refused_by_row(tmp_path: Path) -> None:
    facts = model_facts()
    tables = small_tables(facts, 90, 2)
    tables.entities[71, 4] = 65_520  # rounds to infinity
    with pytest.raises(ExportError, match="entity 71 has a column that float16 cannot hold"):
        export(tmp_path / "export", facts, tables, TIERS, precision="float16", shard_rows=20)
    tables.entities[71, 4] = 65_519
    export(tmp_path / "export", facts, tables, TIERS, precision="float16", shard_rows=20)
    assert by_id(tmp_path / "export" / "server")[71, 4] == 65_504


def test_deltas_of_equal_tiers_are_refused(tmp_path: Path) -> None:
    facts = model_facts()
    with pytest.raises(ConfigError, match="delta needs tiers of different dims"):
        export(tmp_path / "export", facts, small_tables(facts, 5, 2), {"a": 3, "b": 3, "c": 5}, layout="delta")
    export(tmp_path / "export", facts, small_tables(facts, 5, 2), {"a": 3, "b": 3, "c": 5})
    assert facts_of(tmp_path / "export" / "c")["cuts"] == [3, 5]


# What a reader sees


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sharding", ["range", "hash"])
@pytest.mark.parametrize("scorer", ["rotate", "simple"])
def test_readers_see_whole_deltas_and_joined_rows_alike(
    tmp_path: Path, scorer: str, sharding: str, precision: str
) -> None:
    facts, form = model_facts(scorer), {"precision": precision, "sharding": sharding, "shard_rows": 20, "formats": ()}
    tables = small_tables(facts, 50, 3)
    export(tmp_path / "full", facts, tables, TIERS, **form)
    export(tmp_path / "delta", facts, tables, TIERS, layout="delta", **form)
    larger = grown(facts, tables, 25)
    export(tmp_path / "rows", facts, larger, TIERS, base=tmp_path / "full", **form)
    export(tmp_path / "later", facts, larger, TIERS, **form)
    for name in TIERS:
        full, delta, later = (Tier.open(tmp_path / place / name) for place in ("full", "delta", "later"))
        assert np.array_equal(full.vectors(np.arange(50)), delta.vectors(np.arange(50)))
        if precision == "float32":
            assert np.array_equal(full.vectors(np.arange(50)), tables.entities[:, : full.columns])
        assert full.top_k("e1", "r1", 5)[0] == delta.top_k("e1", "r1", 5)[0]
        joined = full.upgrade(tmp_path / "rows" / name)
        assert np.array_equal(joined.vectors(np.arange(75)), later.vectors(np.arange(75)))
        assert joined.entity_id("e74") == 74
        assert joined.top_k("e60", "r3", 5)[0] == later.top_k("e60", "r3", 5)[0]


def marked_export(directory: Path, mark: int, layout: str = "full") -> None:
    """Export a model all of whose columns, and whose step, are `mark`."""
    facts = model_facts("distmult", step=mark)
    tables = small_tables(facts, 60, 2)
    tables.entities[:] = mark
    tables.relation_rows[:] = mark
    export(directory, facts, tables, {"phone": 3, "server": 12}, shard_rows=25, layout=layout, threads=1)


def read_mark(tier: Path) -> int:
    """Open a tier with every check and return the one mark that all of it carries."""
    opened = Tier.open(tier, verify="always")
    mark = opened.facts["step"]
    assert np.unique(opened.vectors(np.arange(60))).tolist() == [mark]
    assert opened.score("e0", "r0", np.arange(60)) == pytest.approx(np.full(60, opened.dim * mark**3))
    return int(mark)


def step_of(link: Path) -> int:
    return int(link.resolve().name.partition("-step-")[2])


@pytest.mark.parametrize("layout", ["full", "delta"])
def test_a_polling_reader_sees_the_old_export_or_the_new(tmp_path: Path, layout: str) -> None:
    marked_export(tmp_path / "export", 1, layout)
    seen: list[int] = []
    failures: list[BaseException] = []
    stop = threading.Event()

    def poll(name: str) -> None:
        while not stop.is_set():
            try:
                seen.append(read_mark(tmp_path / "export" / name))
            except BaseException as failure:
                failures.append(failure)

    readers = [threading.Thread(target=poll, args=(name,)) for name in ("phone", "server")]
    for reader in readers:
        reader.start()
    for mark in range(2, 12):
        marked_export(tmp_path / "export", mark, layout)
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures, failures[0]
    assert len(set(seen)) > 3
    assert read_mark(tmp_path / "export" / "phone") == 11
    versions = [path.name for path in versions_of(tmp_path / "export")]
    assert versions == ["000010-step-10", "000011-step-11"]


def test_going_back_leads_to_the_version_before(tmp_path: Path) -> None:
    link = tmp_path / "export"
    with pytest.raises(ExportError, match="not a published export"):
        roll_back(link)
    marked_export(link, 1)
    with pytest.raises(ExportError, match="no version before"):
        roll_back(link)
    marked_export(link, 2)
    marked_export(link, 3)
    assert [step_of(path) for path in versions_of(link)] == [2, 3]
    with run_lock(tmp_path / "export-versions"), pytest.raises(RunLockedError):
        roll_back(link)
    version, step = roll_back(link)
    assert (version.name, step) == ("000002-step-2", 2)
    assert read_mark(link / "server") == 2
    with pytest.raises(ExportError, match="no version before"):
        roll_back(link)
    # An export that is refused changes nothing.
    with pytest.raises(ZeroDivisionError), publication(link, 9, 2):
        raise ZeroDivisionError
    assert (link.resolve().with_name("000003-step-3") / "phone" / "manifest.json").exists()
    # What was gone back from is not what the next one is taken back to.
    marked_export(link, 4)
    assert not link.resolve().with_name("000003-step-3").exists()
    assert [step_of(path) for path in versions_of(link)] == [2, 4]
    damaged = link.resolve().with_name("000002-step-2") / "phone" / "relations.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(ExportError, match=r"stays at 000004-step-4.*relations.safetensors is damaged"):
        roll_back(link)
    assert read_mark(link / "phone") == 4


def test_as_many_versions_as_asked_for_are_kept(tmp_path: Path) -> None:
    facts = model_facts()
    for step in range(6):
        export(tmp_path / "export", model_facts(step=step), small_tables(facts, 5, 2), {"t": 3}, keep=3, formats=())
    assert [step_of(path) for path in versions_of(tmp_path / "export")] == [3, 4, 5]


def export_marks(directory: Path, marks: range, layout: str, fault: str, most_bytes: int | None) -> None:
    """Export marks one after the other, in a process of its own; its exit code is the number of an OSError."""
    os.environ["MEDSCALE_FAULT"] = fault
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    try:
        for mark in marks:
            marked_export(directory, mark, layout)
    except OSError as error:
        os._exit(error.errno or 1)
    os._exit(0)


def start_exporter(
    directory: Path, marks: range, layout: str = "full", fault: str = "", most_bytes: int | None = None
) -> BaseProcess:
    """Start `export_marks` in a child, forked from a server that has imported everything once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["medscale.split", "duckdb", "pytest", "safetensors.numpy"])
    process = context.Process(target=export_marks, args=(directory, marks, layout, fault, most_bytes))
    process.start()
    return process


@pytest.mark.parametrize(
    ("fault", "layout", "survivor"),
    [
        ("after-shard:7", "full", 1), ("after-shard:29", "delta", 5),
        ("before-manifest:2", "full", 1), ("before-rename:1", "delta", 1), ("after-rename:1", "full", 1),
        ("during-retire:1", "full", 6),
    ],
)  # fmt: skip
def test_a_killed_export_leaves_a_whole_one(tmp_path: Path, fault: str, layout: str, survivor: int) -> None:
    directory = tmp_path / "export"
    marked_export(directory, 1, layout)
    process = start_exporter(directory, range(5, 8), layout, fault)
    while process.is_alive():
        assert read_mark(directory / "phone") in (1, 5, 6, 7)
        assert read_mark(directory / "server") in (1, 5, 6, 7)
        time.sleep(0.005)  # leaves the exporter some of the machine
    assert process.exitcode == -signal.SIGKILL
    assert read_mark(directory / "phone") == read_mark(directory / "server") == survivor
    marked_export(directory, 9, layout)
    assert read_mark(directory / "server") == 9
    left = sorted(path.name for path in (tmp_path / "export-versions").iterdir())
    assert len(left) == 3, left  # the current version, the one before it, and the lock
    assert [step_of(path) for path in versions_of(directory)] == [survivor, 9]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "export-versions"]


def killed_at_any_moment(directory: Path, rounds: int, layout: str) -> None:
    """Kill exporters at random moments while a reader verifies in a loop; it must never see a damaged export."""
    draw, marks = random.Random(0), {1}
    marked_export(directory, 1, layout)
    for number in range(1, rounds + 1):
        these = range(100 * number, 100 * number + 50)
        process = start_exporter(directory, these, layout)
        marks |= set(these)
        while process.is_alive():
            mark = read_mark(directory / draw.choice(("phone", "server")))
            assert mark in marks
            if mark in these and draw.random() < 0.2:
                time.sleep(draw.uniform(0, 0.2))
                process.kill()
                process.join()
        assert process.exitcode == -signal.SIGKILL
        assert read_mark(directory / "phone") == read_mark(directory / "server")
        assert read_mark(directory / "phone") in these
    marked_export(directory, 99_999, layout)
    left = {path.name for path in directory.with_name("export-versions").iterdir() if path.is_dir()}
    assert left == {path.name for path in versions_of(directory)}


def test_exports_killed_at_any_moment_leave_a_whole_one(tmp_path: Path) -> None:
    killed_at_any_moment(tmp_path / "export", 3, "delta")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["full", "delta"])
def test_thirty_killed_exports_leave_a_whole_one(tmp_path: Path, layout: str) -> None:
    killed_at_any_moment(tmp_path / "export", 15, layout)


def test_a_full_disk_leaves_the_old_export(tmp_path: Path) -> None:
    directory = tmp_path / "export"
    marked_export(directory, 1)
    before = digests(directory)
    for most_bytes in (400, 2000):
        process = start_exporter(directory, range(5, 6), most_bytes=most_bytes)
        process.join(60)
        assert process.exitcode == errno.EFBIG
        assert digests(directory) == before
        assert not [path for path in (tmp_path / "export-versions").iterdir() if path.name.endswith(".tmp")]
    assert read_mark(directory / "server") == 1


def test_files_are_durable_before_the_name_and_the_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    real_fsync, real_rename, real_replace = os.fsync, Path.rename, Path.replace

    def fsync(handle: int) -> None:
        done.append(("fsync", str(Path(f"/proc/self/fd/{handle}").readlink())))
        real_fsync(handle)

    def rename(self: Path, target: Path) -> Path:
        done.append(("rename", str(self)))
        return real_rename(self, target)

    def replace(self: Path, target: Path) -> Path:
        done.append(("rename", str(self)))
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(Path, "replace", replace)
    marked_export(tmp_path / "export", 1)
    draft, versions = tmp_path / "export-versions" / "000001-step-1.tmp", tmp_path / "export-versions"
    published, linked = done.index(("rename", str(draft))), done.index(("rename", str(tmp_path / "export.tmp")))
    early = {path for what, path in done[:published] if what == "fsync"}
    files = {str(draft / p.relative_to(versions / "000001-step-1")) for p in (versions / "000001-step-1").rglob("*")}
    assert len(files) > 20
    assert files | {str(draft)} <= early
    assert published < done.index(("fsync", str(versions)), published) < linked
    assert done[-1] == ("fsync", str(tmp_path))
