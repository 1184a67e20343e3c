"""`medscale export`: a checkpoint of a real graph becomes tiers, or one clear sentence."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from medscale.checkpoint import layout_facts, open_tables, save
from medscale.config import Job
from medscale.errors import ConfigError
from medscale.export import main, parse_tiers
from medscale.jobfile import load_job
from medscale.model.layout import layout_of
from medscale.prepare import prepare
from medscale.runtime import Tier

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

    def __init__(self, root: Path, data_dir: Path) -> None:
        self.root = root
        self.job_file = root / "job.yaml"
        self.job_file.write_text(JOB)
        self.job: Job = load_job(self.job_file)
        self.graph = prepare(self.job, data_root=data_dir, graphs_root=root / "graphs")

    def commit(self, step: int, graph_sha256: str | None = None) -> Path:
        layout = layout_of(self.job.model, self.graph.num_entities, self.graph.num_relations)
        draw = torch.Generator().manual_seed(step)
        entities = {b.name: torch.randn(layout.num_entities, b.width, generator=draw) for b in layout.blocks}
        relations = torch.randn(layout.num_relation_rows, layout.num_relation_columns, generator=draw)
        facts = {
            "step": step, "graph_sha256": graph_sha256 or self.graph.sha256, **layout_facts(layout, "l1"),
        }  # fmt: skip
        return save(self.root / "runs" / "little", {"entities": entities, "dense": {"relations": relations}}, facts)

    def export(self, *arguments: str) -> int:
        folders = ["--runs-dir", str(self.root / "runs"), "--graphs-dir", str(self.root / "graphs")]
        return main([str(self.job_file), *folders, *arguments])

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
