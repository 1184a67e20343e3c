"""Cutting tables into tiers: exact columns, equal bytes, and a reader that never sees half an export."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from small_tables import SCORERS, UNIT_COLUMNS, export, model_facts, small_tables

from medscale.errors import ConfigError, ExportError, RunLockedError
from medscale.runtime import Tier
from medscale.split import write_export
from medscale.storage import run_lock

TIERS = {"server": 12, "phone": 3, "pc": 5}


def digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def shards(directory: Path) -> np.ndarray:
    files = sorted(directory.glob("entities-*.safetensors"))
    return np.concatenate([safetensors.numpy.load_file(path)["vectors"] for path in files])


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
        assert shards(directory).tobytes() == crop.tobytes()
        table = pq.read_table(directory / "entities.parquet", page_checksum_verification=True)
        assert table.schema.types == [pa.int64(), pa.string(), pa.list_(pa.float32(), columns)]
        vectors = np.concatenate([chunk.flatten().to_numpy() for chunk in table["vector"].chunks])
        assert vectors.tobytes() == crop.tobytes()
        assert table["id"].to_pylist() == list(range(103))
        assert table["name"].to_pylist() == [f"e{i}" for i in range(103)]


@pytest.mark.parametrize("scorer", ["rotate", "complex", "pairre"])
@pytest.mark.parametrize("reciprocal", [False, True])
def test_relations_are_as_trained_or_turned_into_cos_and_sin(tmp_path: Path, scorer: str, reciprocal: bool) -> None:
    facts = model_facts(scorer, reciprocal=reciprocal)
    tables = small_tables(facts, 5, 4)
    export(tmp_path / "export", facts, tables, TIERS)
    rows = safetensors.numpy.load_file(tmp_path / "export" / "pc" / "relations.safetensors")["vectors"]
    table = pq.read_table(tmp_path / "export" / "pc" / "relations.parquet", page_checksum_verification=True)
    number = 8 if reciprocal else 4
    assert rows.shape == (number, 10)
    if scorer == "rotate":
        phases = tables.relation_rows[:, :5].astype(np.float64)
        assert np.array_equal(rows[:, 0::2], np.cos(phases).astype(np.float32))
        assert np.array_equal(rows[:, 1::2], np.sin(phases).astype(np.float32))
    else:
        assert rows.tobytes() == tables.relation_rows[:, :10].tobytes()
    assert table["id"].to_pylist() == [0, 1, 2, 3] * (number // 4)
    assert table["name"].to_pylist() == ["r0", "r1", "r2", "r3"] * (number // 4)
    assert table["inverse"].to_pylist() == [i >= 4 for i in range(number)]
    assert np.array_equal(np.stack(table["vector"].to_numpy()), rows)


def test_exporting_again_gives_the_same_bytes(tmp_path: Path) -> None:
    facts = model_facts("rotate", reciprocal=True)
    for run in ("a", "b"):
        export(tmp_path / run / "export", facts, small_tables(facts, 90, 3), TIERS, shard_rows=40)
    first = digests((tmp_path / "a" / "export").resolve())
    assert len(first) == 3 * 8
    assert digests((tmp_path / "b" / "export").resolve()) == first
    export(tmp_path / "a" / "export", facts, small_tables(facts, 90, 3), TIERS, shard_rows=40)
    assert digests((tmp_path / "a" / "export").resolve()) == first


def test_rows_stream_in_bounded_portions(tmp_path: Path) -> None:
    facts = model_facts()
    whole, portions = small_tables(facts, 1000, 3), small_tables(facts, 1000, 3)
    export(tmp_path / "whole" / "export", facts, whole, TIERS, shard_rows=300)
    export(tmp_path / "portions" / "export", facts, portions, TIERS, shard_rows=300, chunk_bytes=1000)
    assert whole.largest_read == 300 * 12 * 4  # never across a shard
    assert portions.largest_read <= 1000
    for name in TIERS:
        one, other = (shards(tmp_path / run / "export" / name) for run in ("whole", "portions"))
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
    )  # fmt: skip
    tier = Tier.open(tmp_path / "export" / "t")
    assert [tier.entity_name(i) for i in range(7)] == names
    assert [tier.entity_id(name) for name in names] == list(range(7))


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
    path = tmp_path / "export" / "server" / "entities.parquet"
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


# What a reader sees


def marked_export(directory: Path, mark: int) -> None:
    """Export a model all of whose columns, and whose step, are `mark`."""
    facts = model_facts("distmult", step=mark)
    tables = small_tables(facts, 60, 2)
    tables.entities[:] = mark
    tables.relation_rows[:] = mark
    export(directory, facts, tables, {"phone": 3, "server": 12}, shard_rows=25)


def read_mark(tier: Path) -> int:
    """Open a tier with every check and return the one mark that all of it carries."""
    opened = Tier.open(tier)
    mark = opened.facts["step"]
    assert np.unique(opened.vectors(np.arange(60))).tolist() == [mark]
    assert opened.score_tails(0, 0) == pytest.approx(np.full(60, opened.dim * mark**3))
    return int(mark)


def test_a_polling_reader_sees_the_old_export_or_the_new(tmp_path: Path) -> None:
    marked_export(tmp_path / "export", 1)
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
    for mark in range(2, 16):
        marked_export(tmp_path / "export", mark)
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures, failures[0]
    assert len(set(seen)) > 3
    assert read_mark(tmp_path / "export" / "phone") == 15
    versions = [path.name for path in (tmp_path / "export-versions").iterdir() if path.is_dir()]
    assert versions == ["000015-step-15"]


EXPORTER = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_split import marked_export
{setup}
for mark in range({first}, {first} + 3):
    marked_export(Path({directory!r}), mark)
"""


def start_exporter(directory: Path, first: int, setup: str = "", fault: str = "") -> subprocess.Popen[str]:
    program = EXPORTER.format(tests=str(Path(__file__).parent), setup=setup, first=first, directory=str(directory))
    environment = os.environ | {"MEDSCALE_FAULT": fault}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("fault", "survivor"),
    [
        ("after-shard:5", 1), ("after-shard:17", 5),
        ("before-manifest:2", 1), ("before-rename:1", 1), ("after-rename:1", 1), ("during-retire:1", 5),
    ],
)  # fmt: skip
def test_a_killed_export_leaves_a_whole_one(tmp_path: Path, fault: str, survivor: int) -> None:
    directory = tmp_path / "export"
    marked_export(directory, 1)
    process = start_exporter(directory, 5, fault=fault)
    while process.poll() is None:
        assert read_mark(directory / "phone") in (1, 5, 6, 7)
        assert read_mark(directory / "server") in (1, 5, 6, 7)
        time.sleep(0.005)  # leaves the exporter some of the machine
    assert process.returncode == -signal.SIGKILL, process.stderr and process.stderr.read()
    assert read_mark(directory / "phone") == read_mark(directory / "server") == survivor
    marked_export(directory, 9)
    assert read_mark(directory / "server") == 9
    left = sorted(path.name for path in (tmp_path / "export-versions").iterdir())
    assert len(left) == 2, left  # the current version and the lock
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "export-versions"]


def test_exports_killed_at_any_moment_leave_a_whole_one(tmp_path: Path) -> None:
    directory, draw = tmp_path / "export", random.Random(0)
    marked_export(directory, 1)
    for round_number in range(3):
        process = start_exporter(directory, 10 * round_number + 10)
        while process.poll() is None:
            mark = read_mark(directory / "phone")
            if mark >= 10 * round_number + 10 or draw.random() < 0.01:
                process.kill()
        process.wait()
        assert read_mark(directory / "phone") == read_mark(directory / "server")


def test_a_full_disk_leaves_the_old_export(tmp_path: Path) -> None:
    directory = tmp_path / "export"
    marked_export(directory, 1)
    before = digests(directory)
    for limit in (700, 3500):
        setup = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
        process = start_exporter(directory, 5, setup=setup)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "File too large" in errors
        assert digests(directory) == before
        assert not [path for path in (tmp_path / "export-versions").iterdir() if path.name.endswith(".tmp")]
    assert read_mark(directory / "server") == 1
