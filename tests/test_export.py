"""`medscale export`: a checkpoint of a real graph becomes tiers, or one clear sentence."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from medscale.checkpoint import layout_facts, open_tables, save
from medscale.config import Job
from medscale.errors import ConfigError
from medscale.export import main, parse_tiers
from medscale.jobfile import dump_job, load_job
from medscale.model.layout import layout_of
from medscale.prepare import prepare
from medscale.runtime import Tier
from medscale.runtime.shards import map_tensors

JOB = """
name: little
graph:
  train: [umls/train.tsv]
  valid: [umls/valid.tsv]
  test: [umls/test.tsv]
model:
  scorer: rotate
  dims: [3, 6, 12]
  tiers: {phone: 3, server: 12}
train:
  epochs: 1
"""


class Run:
    """A job with its graph and a checkpoint of random tables, as training would have committed it."""

    def __init__(self, root: Path, data_dir: Path, text: str = JOB) -> None:
        self.root = root
        root.mkdir(exist_ok=True)
        self.job_file = root / "job.yaml"
        self.job_file.write_text(text)
        self.job: Job = load_job(self.job_file)
        self.graph = prepare(self.job, data_root=data_dir, graphs_root=root / "graphs")

    def commit(self, step: int, graph_sha256: str | None = None, first: Path | None = None) -> Path:
        """Commit a step; its first rows are those of another checkpoint, if one is given."""
        layout = layout_of(self.job.model, self.graph.num_entities, self.graph.num_relations)
        draw = torch.Generator().manual_seed(step)
        entities = {b.name: torch.randn(layout.num_entities, b.width, generator=draw) for b in layout.blocks}
        relations = torch.randn(layout.num_relation_rows, layout.num_relation_columns, generator=draw)
        if first is not None:
            old = open_tables(first)
            for block, rows in zip(layout.blocks, old.rows().blocks, strict=True):
                entities[block.name][: len(rows)] = rows
            relations[: len(old.relation_table)] = old.relation_table
        facts = {
            "step": step, "graph_sha256": graph_sha256 or self.graph.sha256, **layout_facts(layout, "l1"),
        }  # fmt: skip
        return save(
            self.root / "runs" / self.job.name, {"entities": entities, "dense": {"relations": relations}}, facts
        )

    def export(self, *arguments: str, path: Path | None = None) -> int:
        folders = ["--runs-dir", str(self.root / "runs"), "--graphs-dir", str(self.root / "graphs")]
        return main([str(path or self.job_file), *folders, *arguments])

    def tier(self, name: str) -> Tier:
        return Tier.open(self.root / "runs" / "little" / "export" / name)


@pytest.fixture
def run(tmp_path: Path, data_dir: Path) -> Run:
    return Run(tmp_path, data_dir)


def test_a_checkpoint_becomes_tiers_with_the_graphs_names(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    step = run.commit(7)
    assert run.export() == 0
    printed = capsys.readouterr().out
    assert "phone" in printed
    assert "server" in printed
    tables = open_tables(step)
    rows = tables.entity_columns(0, run.graph.num_entities, 24)
    for name, columns in (("phone", 6), ("server", 24)):
        tier = run.tier(name)
        assert np.array_equal(tier.vectors(np.arange(run.graph.num_entities)), rows[:, :columns])
        assert (tier.facts["run"], tier.facts["step"], tier.facts["graph"]) == ("little", 7, "little")
        assert tier.facts["graph_sha256"] == run.graph.sha256
    names = run.graph.entity_names().to_pylist()
    assert [tier.entity_name(i) for i in range(len(names))] == names
    assert [tier.relation_id(name) for name in run.graph.relation_names().to_pylist()] == list(range(46))


def test_the_newest_step_is_cut_or_the_one_asked_for(run: Run) -> None:
    for step in (7, 9):
        run.commit(step)
    assert run.export() == 0
    assert run.tier("phone").facts["step"] == 9
    assert run.export("--step", "7", "--tiers", "watch=6") == 0
    assert run.tier("watch").facts["step"] == 7
    assert sorted(p.name for p in (run.root / "runs" / "little" / "export").iterdir()) == ["watch"]


def bytes_of(directory: Path) -> dict[str, bytes]:
    found = {p.relative_to(directory).as_posix(): p for p in directory.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in sorted(found.items()) if ".verified" not in name}


def test_a_run_directory_names_its_job(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.commit(7)
    directory = run.root / "runs" / "little"
    assert run.export(path=directory) == 2
    assert "holds no job.yaml" in capsys.readouterr().err
    (directory / "job.yaml").write_text(dump_job(run.job))
    elsewhere = directory.rename(run.root / "moved")
    assert run.export(path=elsewhere) == 0
    assert Tier.open(elsewhere / "export" / "phone").facts["step"] == 7


def test_options_are_for_the_jobs_keys(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.commit(7)
    out = run.root / "shipped"
    form = ("--layout", "delta", "--precision", "int8", "--sharding", "hash", "--shard-rows", "50")
    assert run.export("--out", str(out), "--tiers", "phone=3,pc=6,server=12", *form) == 0
    printed = capsys.readouterr().out
    assert "delta" in printed
    assert "MB/s" in printed
    assert printed.splitlines()[-1] == str(out)
    assert not (run.root / "runs" / "little" / "export").exists()
    tier = Tier.open(out / "server")
    facts = {key: tier.facts[key] for key in ("layout", "precision", "sharding", "shard_rows", "num_shards", "cuts")}
    assert facts == {
        "layout": "delta", "precision": "int8", "sharding": "hash", "shard_rows": 50, "num_shards": 3,
        "cuts": [3, 6, 12],
    }  # fmt: skip
    rows = open_tables(run.root / "runs/little/checkpoints/step-000000007").entity_columns(0, 135, 24)
    names = run.graph.entity_names().to_pylist()
    found = tier.vectors(names)
    assert np.abs(found - rows).max() <= np.abs(rows).max() / 254 * 1.01


@pytest.mark.slow
def test_tasks_of_ray_write_the_same_bytes(run: Run) -> None:
    run.commit(7)
    form = ("--layout", "delta", "--precision", "int8", "--shard-rows", "20")
    for sharding in ("range", "hash"):
        one, two = run.root / f"one-{sharding}", run.root / f"two-{sharding}"
        assert run.export("--out", str(one), "--sharding", sharding, *form) == 0
        if not ray.is_initialized():
            ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
        assert run.export("--out", str(two), "--sharding", sharding, "--tasks", "2", *form) == 0
        assert bytes_of(one.resolve()) == bytes_of(two.resolve())
    ray.shutdown()


def test_rollback_returns_to_the_export_before(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.export("--rollback") == 8
    assert "not a published export" in capsys.readouterr().err
    for step in (7, 9):
        run.commit(step)
        assert run.export() == 0
    assert run.tier("phone").facts["step"] == 9
    capsys.readouterr()
    assert run.export("--rollback") == 0
    assert "is the export of step 7 again" in capsys.readouterr().out
    assert run.tier("phone").facts["step"] == 7
    assert run.export("--rollback") == 8
    assert "no version before" in capsys.readouterr().err


def test_entities_that_joined_go_onto_the_export_of_the_run_before(
    run: Run, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names after all others, so that old ids stay: `train --extend` keeps them wherever the names belong."""
    parent = run.commit(7)
    assert run.export("--shard-rows", "50", "--precision", "int8") == 0
    shipped = run.root / "runs/little/export"
    data = tmp_path / "more" / "umls"
    data.mkdir(parents=True)
    for split in ("train", "valid", "test"):
        (data / f"{split}.tsv").write_bytes((data_dir / "umls" / f"{split}.tsv").read_bytes())
    relation = run.graph.relation_names()[0].as_py()
    with (data / "train.tsv").open("a") as file:
        file.writelines(f"zzz{i}\t{relation}\tzzz{i + 1}\n" for i in range(5))
    child = Run(tmp_path / "child", tmp_path / "more", JOB.replace("name: little", "name: grown"))
    assert child.graph.num_entities == 135 + 6
    child.commit(3, first=parent)
    assert child.export("--onto", str(shipped)) == 0
    assert "rows" in capsys.readouterr().out
    assert child.export("--out", str(tmp_path / "whole"), "--precision", "int8", "--shard-rows", "50") == 0
    for name in ("phone", "server"):
        rows = child.root / "runs/grown/export" / name
        joined, old = Tier.open(shipped / name).upgrade(rows), Tier.open(shipped / name)
        assert joined.num_entities == old.num_entities + 6 == 141
        # A whole export of the larger run has the same numbers.
        assert np.array_equal(
            joined.vectors(np.arange(141)), Tier.open(tmp_path / "whole" / name).vectors(np.arange(141))
        )
        assert joined.entity_id("zzz4") == 139
    child.commit(4)
    assert child.export("--onto", str(shipped), "--step", "4") == 8
    assert "old rows have moved" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        child.export("--onto", str(shipped), "--precision", "int8")
    assert "--precision is that of the export that --onto names" in capsys.readouterr().err


def test_types_of_entities_are_shipped(tmp_path: Path) -> None:
    """Of an entity's types the first by name counts; an entity may have none."""
    (tmp_path / "data").mkdir()
    triples = "\n".join(f"e{i}\tr\te{(i + 1) % 9}" for i in range(9)) + "\n"
    (tmp_path / "data" / "t.tsv").write_text(triples)
    (tmp_path / "data" / "types.tsv").write_text("e1\tuser\ne2\tuser\ne2\tcity\ne5\tcity\n")
    text = JOB.replace("umls/train.tsv", "t.tsv").replace("umls/valid.tsv", "t.tsv").replace("umls/test.tsv", "t.tsv")
    typed = "  entity_types: types.tsv\n  columns: [head, relation, tail]\nmodel:"
    run = Run(tmp_path, tmp_path / "data", text.replace("model:", typed))
    assert run.graph.first_types() is not None
    run.commit(7)
    assert run.export("--shard-rows", "4") == 0
    tier = run.tier("server")
    assert tier.facts["entity_types"] == ["city", "user"]
    codes = [
        code
        for number in range(3)
        for code in map_tensors(run.root / f"runs/little/export/server/names-{number:05d}-of-00003.safetensors")[
            "entity_type"
        ].tolist()
    ]
    expected = {"e1": 1, "e2": 0, "e5": 0}
    assert codes == [expected.get(name, -1) for name in run.graph.entity_names().to_pylist()]


@pytest.mark.slow
def test_a_checkpoint_larger_than_memory_would_be_cut_in_portions(run: Run) -> None:
    """Of tables of 64 MB, only portions are in memory, whatever the number of threads."""
    layout = layout_of(run.job.model, 700_000, 2)
    generator = torch.Generator().manual_seed(0)
    entities = {b.name: torch.randn(700_000, b.width, generator=generator) for b in layout.blocks}
    state = {"entities": entities, "dense": {"relations": torch.randn(2, layout.num_relation_columns)}}
    directory = save(run.root / "large", state, {"step": 1, **layout_facts(layout, "l1")})
    program = f"""
import resource, sys
from pathlib import Path
import pyarrow as pa
from medscale.checkpoint import open_tables
from medscale.config import ExportSection
from medscale.split import ModelFacts, write_export
tables = open_tables(Path({str(directory)!r}))
names = pa.array([str(i) for i in range(700_000)])
facts = ModelFacts(run="r", step=1, graph="g", graph_sha256="0", scorer="rotate", norm="l1", damping=(1.0, 1.0),
    dims=(3, 6, 12), reciprocal=False)
def export(rows, place):
    write_export(tables, names.slice(0, rows), pa.array(["a", "b"]), facts, {{"phone": 3, "server": 12}}, Path(place),
        ExportSection(shard_rows=100_000), chunk_bytes=1 << 20, threads=2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small = export(100_000, {str(run.root / "small")!r})
print(export(700_000, {str(run.root / "all")!r}) - small)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(ended.stdout) < 45, "MiB; the tables have 64"


def nothing(run: Run) -> None:
    pass


def damage(run: Run) -> None:
    for path in run.commit(7).rglob("*.distcp"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def other_graph(run: Run) -> None:
    run.commit(7, graph_sha256="0" * 64)


def in_the_way(run: Run) -> None:
    run.commit(7)
    (run.root / "runs" / "little" / "export").mkdir()


@pytest.mark.parametrize(
    ("prepare_run", "arguments", "code", "message"),
    [
        (nothing, (), 4, "no committed checkpoint"),
        (damage, (), 4, "damaged"),
        (other_graph, (), 8, "is not the graph"),
        (in_the_way, (), 8, "move it away"),
        (lambda run: run.commit(7), ("--tiers", "phone=4,tv=99"), 2, "tier tv: dim 99 is not one of"),
        (lambda run: run.commit(7), ("--step", "8"), 4, "no step 8"),
        (lambda run: run.commit(7), ("--onto", "nowhere"), 8, "nowhere is no export"),
        (lambda run: run.commit(7), ("--layout", "delta", "--tiers", "a=3,b=3"), 2, "delta needs tiers of different"),
    ],
)
def test_what_cannot_be_exported_ends_in_one_sentence(
    run: Run, capsys: pytest.CaptureFixture[str],
    prepare_run: Callable[[Run], object], arguments: tuple[str, ...], code: int, message: str,
) -> None:  # fmt: skip
    prepare_run(run)
    assert run.export(*arguments) == code
    assert message in capsys.readouterr().err


NOT_TIERS = ["", "phone", "phone=", "=3", "phone=0", "phone=-1", "phone=1.5", "a/b=3", "../x=3", "phone=3,"]
NOT_TIERS += ["phone=3,phone=6", "phone =3", "phone=3 ", "phone=9999999999"]


@pytest.mark.parametrize("text", NOT_TIERS)
def test_tiers_on_the_command_line_are_strict(text: str) -> None:
    with pytest.raises(ConfigError, match="--tiers"):
        parse_tiers(text)


def test_tiers_on_the_command_line() -> None:
    assert parse_tiers("phone=10,pc-2=100") == {"phone": 10, "pc-2": 100}


def test_help_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "--tiers" in capsys.readouterr().out
