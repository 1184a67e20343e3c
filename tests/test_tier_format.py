"""The second format of tiers: test vectors, upgrades, parts, what is verified when, and what is refused."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tier_vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from tier_vectors import LATER, NAMES, TIERS, VECTORS, model_of
from tier_writer import Format, write_manifest, write_tiers

from medscale import manifest
from medscale.errors import ExportError, MissingShardError
from medscale.manifest import MANIFEST, VERIFIED
from medscale.runtime import Tier, needed_files
from medscale.runtime import precision as coded
from medscale.runtime.files import shard_of_name
from medscale.runtime.shards import map_tensors

EXPECTED = json.loads((VECTORS / "expected.json").read_text(encoding="utf-8"))
PACKAGE = Path(__file__).resolve().parents[1]


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    return Path(shutil.copytree(VECTORS, tmp_path / "vectors"))


def names_of(record: dict[str, Any]) -> str:
    return " + ".join([record["tier"], *record["upgrade"]])


def facts_of(directory: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["facts"]
    return facts


# Test vectors


@pytest.mark.parametrize("record", EXPECTED, ids=names_of)
def test_vectors_are_found(record: dict[str, Any], tmp_path: Path) -> None:
    root = Path(shutil.copytree(VECTORS / record["tier"].split("/")[0], tmp_path / record["tier"].split("/")[0])).parent
    tier = Tier.open(root / record["tier"])
    for delta in record["upgrade"]:
        tier = tier.upgrade(root / delta)
    for name, vector in record["vectors"].items():
        assert tier.vector(name).tolist() == vector == tier.vectors([name])[0].tolist()
    for head, relation, tail, score in record["scores"]:
        assert tier.score(head, relation, tail) == pytest.approx(score, rel=1e-6)
    tails, heads = record["top_k"], record["top_k_heads"]
    for asked, (names, scores) in (
        (tails, tier.top_k(tails["head"], tails["relation"], tails["k"])),
        (heads, tier.top_k_heads(heads["relation"], heads["tail"], heads["k"])),
    ):
        assert names == asked["names"]
        np.testing.assert_allclose(scores, asked["scores"], rtol=1e-6)


@pytest.mark.parametrize("case", tier_vectors.CASES)
def test_the_plain_writer_still_gives_their_bytes(case: str, tmp_path: Path) -> None:
    tier_vectors.write_case(tmp_path, case)
    kept = VECTORS / f"format2-{case}"
    files = sorted(p.relative_to(kept) for p in kept.rglob("*") if p.is_file() and not p.name.startswith(VERIFIED))
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert all((tmp_path / file).read_bytes() == (kept / file).read_bytes() for file in files)
    expected = [r for r in EXPECTED if r["tier"].startswith(f"format2-{case}/")]
    assert json.loads(json.dumps(tier_vectors.expected_of(case))) == expected


def test_format_1_is_what_was_expected_of_it() -> None:
    assert json.loads(json.dumps(tier_vectors.expected_of_format_1())) == EXPECTED[:2]


@pytest.mark.parametrize("precision", coded.PRECISIONS)
def test_codes_are_the_plain_writers(precision: coded.Precision) -> None:
    draw = np.random.default_rng(0)
    from tier_writer import decode, encode

    for columns in (1, 2, 7, 16):
        cut = (draw.normal(size=(40, columns)) * 10.0 ** draw.integers(-44, 4, size=(40, 1))).astype(np.float32)
        cut[0], cut[1] = 0, -0.0
        stored, scales = coded.encode(cut, precision)
        plain, plain_scales = encode(cut, precision)
        assert stored.tobytes() == plain.tobytes()
        assert (scales is None) == (plain_scales is None)
        both = None
        if scales is not None and plain_scales is not None:
            assert scales.tobytes() == plain_scales.tobytes()
            both = scales[:, None]
        found = coded.decode(stored, both, precision, [columns])
        assert found.tobytes() == decode(plain, plain_scales, precision, columns).tobytes()


def test_hashes_of_names_are_fnv_1a() -> None:
    # Published test vectors of FNV-1a with 64 bits.
    for text, value in (("", 0xCBF29CE484222325), ("a", 0xAF63DC4C8601EC8C), ("foobar", 0x85944171F73967E8)):
        assert shard_of_name(text, 1 << 64) == value


# Upgrades


@pytest.mark.parametrize("case", ["complex-delta-int8-hash", "transe-l2-delta-float32-hash", "simple-delta-int4-range"])
def test_a_chain_of_deltas_is_the_largest_tier(case: str, tmp_path: Path) -> None:
    model, how = model_of(case)[0], tier_vectors.CASES[case][2]
    whole = write_tiers(tmp_path / "full", model, TIERS, Format("full", how.precision, how.sharding, how.shard_rows))
    chain = write_tiers(tmp_path / "delta", model, TIERS, how)
    assert whole == chain
    full, delta = Tier.open(tmp_path / "full" / "server"), Tier.open(tmp_path / "delta" / "phone")
    for name in ("pc", "server"):
        delta = delta.upgrade(tmp_path / "delta" / name)
        assert delta.name == name
    everyone = np.arange(len(NAMES))
    assert delta.vectors(everyone).tobytes() == full.vectors(everyone).tobytes()
    assert delta.relations.tobytes() == full.relations.tobytes()
    for side in ("top_k", "top_k_heads"):
        ours, theirs = (
            getattr(tier, side)(*(("a", "likes") if side == "top_k" else ("likes", "a")), 9) for tier in (delta, full)
        )
        assert ours[0] == theirs[0]
        assert ours[1].tobytes() == theirs[1].tobytes()
    # A delta of a full export fits, too: payloads do not depend on layouts.
    mixed = Tier.open(tmp_path / "full" / "phone").upgrade(tmp_path / "delta" / "pc")
    assert mixed.vectors(everyone).tobytes() == full.vectors(everyone)[:, : mixed.columns].tobytes()


def test_upgrades_map_and_leave_the_smaller_tier_alone(vectors: Path) -> None:
    root = vectors / "format2-complex-delta-float16-range"
    phone = Tier.open(root / "phone")
    before = phone.vectors(np.arange(len(NAMES))).tobytes()
    larger = phone.upgrade(root / "pc")
    assert (phone.dim, larger.dim) == (2, 3)
    assert phone.vectors(np.arange(len(NAMES))).tobytes() == before
    assert larger.rows.sections[0].shards[0].pieces[0] is phone.rows.sections[0].shards[0].pieces[0]
    maps = Path("/proc/self/maps").read_text()
    assert str(root / "pc" / "entities-00000-of-00003.safetensors") in maps


def test_rows_that_joined_go_on_top(vectors: Path) -> None:
    root = vectors / "format2-complex-delta-int8-hash"
    server = Tier.open(root / "server")
    grown = server.upgrade(root / "rows" / "server")
    assert (server.num_entities, grown.num_entities) == (len(NAMES), len(NAMES) + len(LATER))
    assert [grown.entity_name(i) for i in range(grown.num_entities)] == [*NAMES, *LATER]
    assert [grown.entity_id(name) for name in [*NAMES, *LATER]] == list(range(grown.num_entities))
    assert grown.vectors(np.arange(len(NAMES))).tobytes() == server.vectors(np.arange(len(NAMES))).tobytes()
    kinds = [grown.entity_type(i) for i in range(grown.num_entities)]
    assert kinds == [(None, "thing", "日本")[i % 3] for i in range(grown.num_entities)]
    names, _ = grown.top_k("zz", "likes", 20, candidates="thing")
    assert sorted(grown.entity_id(name) for name in names) == [1, 4, 7, 10, 13]
    with pytest.raises(ExportError, match="unknown entity 'zz'"):
        server.entity_id("zz")
    with pytest.raises(ExportError, match=r"begins at entity 11, this tier has 14|base's payload"):
        grown.upgrade(root / "rows" / "server")
    with pytest.raises(ExportError, match="upgrade"):
        Tier.open(root / "rows" / "server")
    with pytest.raises(ExportError, match="put columns on first"):
        Tier.open(root / "phone").upgrade(root / "rows" / "phone").upgrade(root / "pc")


def test_rows_join_again_and_again(tmp_path: Path) -> None:
    model = model_of("distmult-full-int8-range")[1]
    everyone = np.arange(14)
    plain = Format(precision="int8", shard_rows=5)

    def part(start: int, stop: int) -> Any:
        changes = {"entities": model.entities[start:stop], "entity_names": model.entity_names[start:stop]}
        return type(model)(**{**vars(model), **changes, "types": model.types[start:stop]})

    payload = write_tiers(tmp_path / "a", part(0, 8), TIERS, plain)
    payload = write_tiers(tmp_path / "b", part(8, 9), TIERS, Format("rows", "int8", "range", 5, 8, payload))
    write_tiers(tmp_path / "c", part(9, 14), TIERS, Format("rows", "int8", "hash", 2, 9, payload))
    write_tiers(tmp_path / "all", model, TIERS, plain)
    tier = Tier.open(tmp_path / "a" / "server")
    with pytest.raises(ExportError, match="payload"):
        tier.upgrade(tmp_path / "c" / "server")
    tier = tier.upgrade(tmp_path / "b" / "server").upgrade(tmp_path / "c" / "server")
    whole = Tier.open(tmp_path / "all" / "server")
    assert tier.vectors(everyone).tobytes() == whole.vectors(everyone).tobytes()
    assert tier.top_k("a", "knows", 14)[0] == whole.top_k("a", "knows", 14)[0]
    assert tier.score_tails(3, 1).tolist() == whole.score_tails(3, 1).tolist()
    assert tier.neighbours("zz", 5, exclude=["b"])[0] == whole.neighbours("zz", 5, exclude=["b"])[0]


def test_deltas_that_do_not_fit_say_why(tmp_path: Path) -> None:
    model, delta = model_of("complex-delta-int8-hash")[0], Format("delta", "int8", "range", 4)
    write_tiers(tmp_path / "a", model, TIERS, delta)
    phone = Tier.open(tmp_path / "a" / "phone")

    def other(name: str, how: Format = delta, **changes: Any) -> Path:
        write_tiers(tmp_path / name, type(model)(**{**vars(model), **changes}), TIERS, how)
        return tmp_path / name / "pc"

    for path, reason in (
        (tmp_path / "a" / "server", "wrong order"),
        (tmp_path / "a" / "phone", "whole tier"),
        (other("run", run="another"), "another run"),
        (other("step", step=41), "another run"),
        (other("graph", graph_sha256="1" * 64), "another run"),
        (other("scorer", scorer="simple"), "another run"),
        (other("precision", Format("delta", "int4", "range", 4)), "precision int4"),
        (other("shards", Format("delta", "int8", "range", 5)), "shard_rows|payload"),
        (other("hash", Format("delta", "int8", "hash", 4)), "sharding|payload"),
        (other("retrained", entities=model.entities * 2), "payloads differ"),
        (other("fewer", entities=model.entities[:9], entity_names=NAMES[:9], types=model.types[:9]), "num_entities"),
        (tmp_path / "nowhere", "holds no manifest"),
    ):
        with pytest.raises(ExportError, match=reason):
            phone.upgrade(path)
    with pytest.raises(ExportError, match="wrong order"):
        phone.upgrade(tmp_path / "a" / "pc").upgrade(tmp_path / "a" / "pc")
    with pytest.raises(ExportError, match="format 1"):
        Tier.open(VECTORS / "format1" / "phone").upgrade(tmp_path / "a" / "pc")
    shutil.rmtree(tmp_path / "a" / "phone")
    with pytest.raises(ExportError, match="not beside it"):
        Tier.open(tmp_path / "a" / "pc")


# Parts


@pytest.mark.parametrize("sharding", ["range", "hash"])
@pytest.mark.parametrize("layout", ["full", "delta"])
def test_a_part_answers_for_what_is_there_and_names_what_is_not(tmp_path: Path, sharding: str, layout: str) -> None:
    model = model_of("complex-delta-int8-hash")[0]
    write_tiers(tmp_path / "all", model, TIERS, Format(layout, "int8", sharding, 3))
    whole = Tier.open(tmp_path / "all" / "pc")
    wanted = "b"
    for tier in ("phone", "pc"):
        source, part = tmp_path / "all" / tier, tmp_path / "part" / tier
        part.mkdir(parents=True)
        for file in (MANIFEST, "relations.safetensors", "index.safetensors"):
            if (source / file).is_file():
                shutil.copy(source / file, part / file)
        if sharding == "hash":
            assert needed_files(part, [wanted]) == needed_files(part, [whole.entity_id(wanted)])
        else:
            with pytest.raises(ExportError, match="ask by id"):
                needed_files(part, [wanted])
        for file in needed_files(part, [whole.entity_id(wanted)]):
            shutil.copy(source / file, part / file)
    with pytest.raises(ExportError, match="is missing"):
        Tier.open(tmp_path / "part" / "pc")
    tier = Tier.open(tmp_path / "part" / "pc", partial=True)
    assert tier.vector(wanted).tobytes() == whole.vector(wanted).tobytes()
    here = tier.shard_of(wanted)
    same = [name for name in NAMES if whole.shard_of(name) == here]
    assert tier.score(wanted, "likes", same).tolist() == whole.score(wanted, "likes", same).tolist()
    assert tier.top_k(wanted, "likes", 2, candidates=same)[0] == whole.top_k(wanted, "likes", 2, candidates=same)[0]
    for name in set(NAMES) - set(same):
        index = whole.entity_id(name)
        assert tier.shard_of(index) == whole.shard_of(name)
        with pytest.raises(MissingShardError) as caught:
            tier.vector(index)
        assert caught.value.file == whole.shard_of(name)
        assert caught.value.file in str(caught.value)
        with pytest.raises(MissingShardError) as caught:
            tier.entity_id(name)
        assert caught.value.file.startswith("names-")
    for scan in (lambda: tier.top_k(wanted, "likes", 2), lambda: tier.score_tails(wanted, "likes")):
        with pytest.raises(MissingShardError):
            scan()
    with pytest.raises(ExportError, match="unknown entity id 11"):
        needed_files(tmp_path / "part" / "pc", [11])


def test_without_the_index_names_still_lead_to_rows(tmp_path: Path) -> None:
    write_tiers(tmp_path, model_of("pairre-full-int4-hash")[0], {"server": 6}, Format("full", "int4", "hash", 3))
    whole = Tier.open(tmp_path / "server")
    lost = shard_of_name(NAMES[3], 4)
    for file in ("index.safetensors", f"entities-{lost:05d}-of-00004.safetensors"):
        (tmp_path / "server" / file).unlink()
    tier = Tier.open(tmp_path / "server", partial=True)
    for place, name in enumerate(NAMES):
        if shard_of_name(name, 4) == lost:
            with pytest.raises(MissingShardError, match=r"index\.safetensors"):
                tier.vector(place)
        else:
            assert tier.vector(name).tolist() == tier.vector(place).tolist() == whole.vector(place).tolist()
    with pytest.raises(ExportError, match="index"):
        needed_files(tmp_path / "server", [3])
    assert len(needed_files(tmp_path / "server", NAMES)) == 2 * len({shard_of_name(name, 4) for name in NAMES})


def test_changed_files_of_a_part_are_seen(tmp_path: Path) -> None:
    write_tiers(tmp_path, model_of("pairre-full-int4-hash")[0], {"server": 6}, Format("full", "int4", "range", 3))
    (tmp_path / "server" / "entities-00001-of-00004.safetensors").unlink()
    Tier.open(tmp_path / "server", partial=True)
    path = tmp_path / "server" / "entities-00002-of-00004.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ExportError, match="entities-00002"):
        Tier.open(tmp_path / "server", partial=True)


# What is verified when


@pytest.fixture
def settled(tmp_path: Path) -> Path:
    """Return a tier whose files have not changed for an hour."""
    write_tiers(tmp_path, model_of("distmult-full-int8-range")[0], {"server": 6}, Format("full", "int8", "range", 4))
    age(tmp_path / "server")
    return tmp_path / "server"


def age(directory: Path) -> None:
    for path in directory.iterdir():
        os.utime(path, (path.stat().st_mtime - 3600,) * 2)


def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that files whose SHA-256 is computed are added to."""
    read, plain = [], manifest.sha256_of
    monkeypatch.setattr(manifest, "sha256_of", lambda path: (read.append(path.name), plain(path))[1])
    return read


def test_once_remembers_and_reads_what_changed(settled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = hashed(monkeypatch)
    files = sorted(path.name for path in settled.iterdir() if path.name != MANIFEST)
    Tier.open(settled)
    assert sorted(read) == files
    note = json.loads((settled / VERIFIED).read_text())
    assert sorted(note["files"]) == files
    read.clear()
    Tier.open(settled)
    Tier.open(settled, "never")
    assert read == []
    Tier.open(settled, "always")
    assert sorted(read) == files
    read.clear()
    (settled / "relations.safetensors").touch()
    Tier.open(settled)
    assert read == ["relations.safetensors"]
    shutil.copy2(settled / "relations.safetensors", settled.parent / "copy")
    (settled.parent / "copy").replace(settled / "relations.safetensors")  # another inode
    age(settled)
    read.clear()
    Tier.open(settled)
    assert "relations.safetensors" in read


def test_notes_of_readers_are_not_files_of_a_tier(settled: Path) -> None:
    Tier.open(settled)
    sealed = manifest.read_manifest(settled, "tier", [2], ExportError)
    again = manifest.write_manifest(settled, sealed.kind, sealed.format, sealed.facts)
    assert again == sealed


def test_what_was_just_written_is_not_remembered(settled: Path) -> None:
    (settled / "relations.safetensors").touch()
    Tier.open(settled)
    assert "relations.safetensors" not in json.loads((settled / VERIFIED).read_text())["files"]


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b"\xff", b'{"manifest": 3}', b'{"files": {}}', b"null"])
def test_a_damaged_note_costs_time_alone(settled: Path, note: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    (settled / VERIFIED).write_bytes(note)
    read = hashed(monkeypatch)
    Tier.open(settled)
    assert len(read) == len(list(settled.iterdir())) - 2


def test_a_note_of_another_manifest_counts_for_nothing(settled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Tier.open(settled)
    write_manifest(settled, facts_of(settled) | {"step": 99})
    read = hashed(monkeypatch)
    Tier.open(settled)
    assert len(read) == len(list(settled.iterdir())) - 2


def test_a_read_only_directory_is_verified_and_not_remembered(settled: Path) -> None:
    """In a process without rights to write, which root's own processes have."""
    settled.chmod(0o555)
    settled.parent.chmod(0o755)
    program = f"""
import mmap, os, sys  # mmap: the new user may not see where it lies
sys.path.insert(0, {str(PACKAGE)!r})
from medscale.runtime import Tier
if os.getuid() == 0: os.setuid(65534)
print(Tier.open({str(settled)!r}).dim)
"""
    for folder in settled.parents:
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
        if folder.name.startswith("pytest-of"):
            break
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "6", done.stderr
    assert not (settled / VERIFIED).exists()
    settled.chmod(0o755)


def test_other_words_for_verify_are_refused(settled: Path) -> None:
    for word in (True, "sometimes", None):
        with pytest.raises(ExportError, match="once, always, never"):
            Tier.open(settled, word)  # type: ignore[arg-type]


# Damage


DAMAGED = ["complex-delta-int8-hash/phone", "complex-delta-int8-hash/server", "simple-delta-int4-range/rows/pc"]


@pytest.mark.parametrize("tier", DAMAGED)
def test_every_file_damaged_missing_or_swapped_is_named(vectors: Path, tier: str) -> None:
    directory, draw = vectors / f"format2-{tier}", random.Random(0)
    base = vectors / f"format2-{tier.split('/')[0]}" / "pc"

    def open_it() -> Tier:
        return Tier.open(base).upgrade(directory) if "rows" in tier else Tier.open(directory)

    open_it()
    files = sorted(path for path in directory.iterdir() if not path.name.startswith(VERIFIED))
    for path in files:
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        for content in (bytes(damaged), whole[:-2], whole[: len(whole) // 2], b"", whole + b"\0", None):
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
            with pytest.raises(ExportError, match=path.name):
                open_it()
        path.write_bytes(whole)
    shards = [path for path in files if path.name.startswith("entities-")]
    for one, other in itertools.pairwise(shards):
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)
        with pytest.raises(ExportError, match="entities-"):
            open_it()
        one.write_bytes(first)
        other.write_bytes(second)
    (directory / "entities-00009-of-00003.safetensors").write_bytes(b"")
    with pytest.raises(ExportError, match="entities-00009"):
        open_it()


@pytest.mark.parametrize("tensor", ["norms", "scales"])
def test_damaged_norms_and_scales_are_caught_by_the_hash(vectors: Path, tensor: str) -> None:
    directory = vectors / "format2-distmult-full-int8-range" / "server"
    path = next(directory.glob("entities-*"))
    values = map_tensors(path)[tensor]
    data = path.read_bytes()
    place = data.index(values.tobytes())
    path.write_bytes(data[:place] + bytes(len(values.tobytes())) + data[place + len(values.tobytes()) :])
    with pytest.raises(ExportError, match=path.name):
        Tier.open(directory)


WRONG = [None, True, -1, 1.5, "x", [], {"a": 1}, 2**70, [-1], [[]]]


@pytest.mark.parametrize(
    "tier", ["complex-delta-int8-hash/server", "distmult-full-int8-range/rows/pc", "format1/phone"]
)
def test_facts_missing_or_of_another_type_are_refused(vectors: Path, tier: str) -> None:
    directory = vectors / (tier if tier.startswith("format1") else f"format2-{tier}")
    base = Tier.open(directory.parents[1] / "pc") if "rows" in tier else None
    facts, version = facts_of(directory), 1 if tier.startswith("format1") else 2
    free = {"run", "step", "graph", "graph_sha256"}
    for key, value in facts.items():
        for wrong in [..., *WRONG]:
            same_kind = type(wrong) is type(value) and (key in free or wrong == value)
            if same_kind or (key == "entity_types" and wrong == []):
                continue
            changed = {k: v for k, v in facts.items() if k != key} | ({} if wrong is ... else {key: wrong})
            write_manifest(directory, changed, version)
            with pytest.raises(ExportError):
                base.upgrade(directory) if base else Tier.open(directory)
    for key in facts:
        write_manifest(directory, {k: v for k, v in facts.items() if k != key}, version)
        with pytest.raises(ExportError, match=rf"manifest\.json.*{key}"):
            base.upgrade(directory) if base else Tier.open(directory)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_sealed_nonsense_gives_a_typed_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Facts, files and tensors changed at once by someone who can seal: a typed error, or a tier that answers."""
    cases = ["complex-delta-int8-hash/phone", "rotate-full-float16-hash/server", "pairre-full-int4-hash/pc"]
    case = data.draw(st.sampled_from(cases))
    directory = tmp_path_factory.mktemp("fuzz") / "tier"
    shutil.copytree(VECTORS / f"format2-{case}", directory)
    facts = facts_of(directory)
    for key in data.draw(st.lists(st.sampled_from(sorted(facts)), max_size=3)):
        numbers = st.integers(-3, 40) | st.integers(2**46, 2**72)
        facts[key] = data.draw(
            numbers | st.lists(numbers, max_size=4) | st.text(max_size=3) | st.none() | st.booleans() | st.floats()
            | st.sampled_from(["full", "delta", "rows", "int8", "int4", "float16", "float32", "hash", "transe"])
        )  # fmt: skip
    path = data.draw(st.sampled_from(sorted(p for p in directory.iterdir() if p.suffix == ".safetensors")))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        write_manifest(directory, facts)
        tier = Tier.open(directory, partial=data.draw(st.booleans()))
        for ask in (
            lambda: tier.top_k(1, 0, 3), lambda: tier.vectors([0, 10]), lambda: tier.entity_id("b"),
            lambda: tier.entity_name(4), lambda: tier.shard_of("é"), lambda: tier.entity_type(2),
        ):  # fmt: skip
            try:
                with np.errstate(all="ignore"):
                    ask()
            except ExportError:
                continue
    except ExportError as error:
        assert str(directory.parent) in str(error)  # noqa: PT017


def fuzz_headers(number: int, path: Path) -> None:
    """Change bytes of a file of each kind: a typed error that names it, or tensors within it."""
    draw = random.Random(number)
    tier = VECTORS / "format2-complex-delta-int8-hash" / "phone"
    files = [p.read_bytes() for p in sorted(tier.iterdir()) if p.suffix == ".safetensors"]
    tokens = [b"-1", b"9" * 30, b"1e3", b"null", b'"F16"', b'"I32"', b"[]", b"{", b"}", b",", b"\0", b"0", b'"U8"']
    for _ in range(number):
        content = bytearray(draw.choice(files))
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(min(len(content), 320)) if content else 0
            match draw.randrange(4):
                case 0:
                    content[place : place + 1] = bytes([draw.randrange(256)])
                case 1:
                    content[place : place + draw.randint(1, 4)] = draw.choice(tokens)
                case 2:
                    del content[place : place + draw.randint(1, 8)]
                case _:
                    del content[draw.randrange(len(content) + 1) :]
        path.write_bytes(content)
        try:
            tensors = map_tensors(path)
        except ExportError as error:
            assert str(path) in str(error)  # noqa: PT017
            continue
        assert sum(tensor.nbytes for tensor in tensors.values()) < len(content)
        assert all(tensor.tobytes() in bytes(content) for tensor in tensors.values())


def test_two_thousand_damaged_headers(tmp_path: Path) -> None:
    fuzz_headers(2_000, tmp_path / "x")


@pytest.mark.slow
def test_a_hundred_thousand_damaged_headers(tmp_path: Path) -> None:
    fuzz_headers(100_000, tmp_path / "x")


# Where there is nothing but numpy


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds numpy and safetensors alone, linked from this one: no network needed."""
    directory = tmp_path_factory.mktemp("bare")
    venv.create(directory, with_pip=False, symlinks=True)
    site = next(directory.glob("lib/python*/site-packages"))
    for module in ("numpy", "safetensors"):
        source = Path(__import__(module).__file__ or "").parent
        (site / source.name).symlink_to(source)
        libraries = source.with_name(f"{source.name}.libs")
        if libraries.is_dir():
            (site / libraries.name).symlink_to(libraries)
    (site / "medscale").symlink_to(PACKAGE / "medscale")
    return directory / "bin" / "python"


def test_the_runtime_needs_numpy_alone(bare_python: Path, vectors: Path) -> None:
    program = f"""
import importlib.util, sys
from medscale.runtime import Cascade, Tier, needed_files
for absent in ("torch", "pyarrow", "ray", "yaml", "rich", "pytest", "torchrec"):
    assert importlib.util.find_spec(absent) is None, absent
root = {str(vectors)!r}
tiers = [Tier.open(f"{{root}}/format2-complex-delta-int8-hash/{{name}}") for name in ("phone", "pc", "server")]
print(tiers[2].top_k("a", "likes", 3)[0] == Cascade(tiers).top_k("a", "likes", 3).names)
print(Tier.open(root + "/format1/server").neighbours("a", 2)[0], len(needed_files(root + "/format1/phone", [1])))
outside = {{m.split(".")[0] for m in sys.modules}} - set(sys.stdlib_module_names) - set(sys.builtin_module_names)
print(sorted(m for m in outside if not m.startswith("_")))
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([bare_python, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "True"
    assert lines[-1] in ("['medscale', 'numpy']", "['medscale', 'numpy', 'safetensors']")
