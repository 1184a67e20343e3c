"""A run grows out of another: old vectors stay bit for bit, new ones are learned, and the lineage is told."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import children
import numpy as np
import pytest
import torch
from test_trainer import assert_same_end
from test_workers import in_group
from toy import toy_job

from medscale import export as export_command
from medscale import train as train_command
from medscale.checkpoint import Tables, newest_checkpoint, open_tables
from medscale.config import Job
from medscale.distributed import process_group
from medscale.errors import CheckpointError, ConfigError, GraphError
from medscale.export import export_run
from medscale.extend import extended_job
from medscale.graph.known_triples import KnownTriples
from medscale.graph.reader import Graph, open_graph
from medscale.jobfile import dump_job, load_job
from medscale.plan import size_of
from medscale.prepare import prepare
from medscale.ranking import rank_all
from medscale.runtime import Tier
from medscale.train import train
from medscale.trainer import Trainer, train_worker
from medscale.workers import Workers

CPU = torch.device("cpu")
Triple = tuple[str, str, str]

#: what the ring gains: entities, a relation before all others in the alphabet, and a triple of old names
NEW = [(f"n{i}", "step1", f"e{i:03d}") for i in range(5)] + [(f"e{i:03d}", "above", f"n{i % 5}") for i in range(10, 30)]
OLD_NAMES = [("e000", "step1", "e050")]


def write(path: Path, triples: Sequence[Triple]) -> None:
    path.write_text("".join("\t".join(triple) + "\n" for triple in triples), encoding="utf-8")


def quick(scorer: str, **changes: Any) -> Job:
    changes["train"] = {"epochs": 2} | changes.get("train", {})
    changes["checkpoint"] = {"every_steps": 100} | changes.get("checkpoint", {})
    return toy_job(scorer, name="ring", runtime={"threads": 1} | changes.pop("runtime", {}), **changes)


JOBS = {
    "softmax": quick(
        "complex", model={"reciprocal": True}, optimizer={"kind": "adagrad"},
        loss={"regularizer": "n3", "regularizer_weights": (0.05,)},
    ),
    "chunks": quick("rotate", med={"weights": "learnable", "weights_lr": 0.01}),
    "plain-torch": quick(
        "simple", loss={"kind": "bce", "regularizer": "l2", "regularizer_weights": (0.05,)},
        negatives={"kind": "per_positive"}, optimizer={"kind": "adagrad"}, model={"reciprocal": True},
        runtime={"kernels": "torch"},
    ),
}  # fmt: skip

PARENTS = {name: dataclasses.replace(job, name=name) for name, job in JOBS.items()}
#: (workers, placement): what names of runs end in
WORKERS = {(1, "auto"): "alone", (2, "table_wise"): "blocks", (2, "row_wise"): "rows"}


@dataclasses.dataclass(frozen=True)
class Place:
    """A directory with raw files, graphs and runs."""

    root: Path
    #: by what the names of their runs end in
    jobs: dict[str, list[Job]] = dataclasses.field(default_factory=dict)

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def where(self) -> dict[str, Path]:
        return {"runs_dir": self.runs, "graphs_dir": self.root / "graphs", "data_root": self.root}

    def prepared(self, job: Job) -> Graph:
        return prepare(job, data_root=self.root, graphs_root=self.root / "graphs")

    def options(self, job: Job) -> list[str]:
        (self.root / "job.yaml").write_text(dump_job(job))
        directories = [("--data-dir", "."), ("--runs-dir", "runs"), ("--graphs-dir", "graphs")]
        return [str(self.root / "job.yaml"), *(word for key, d in directories for word in (key, str(self.root / d)))]


def place_of(root: Path, toy_graph: Graph) -> Place:
    root.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid", "test"):
        shutil.copy(Path(str(toy_graph.directory)).parent / f"{split}.tsv", root)
    write(root / "new.tsv", NEW + OLD_NAMES)
    return Place(root)


def trained_parent(place: Place, job: Job) -> None:
    """Train a few steps, and commit them with zeros of both signs and a row of zeros among the numbers."""
    graph = place.prepared(job)
    with process_group(CPU):
        trainer = Trainer(job, graph, place.runs / job.name, CPU)
        trainer.initialise()
        for step in range(4):
            trainer.train_step(trainer.batches.batch(step))
        rows = [weight for _, _, weight in trainer.table._local_weights()] + [trainer.relations.data]
        for weight in rows:
            weight[::2, ::3], weight[1] = -0.0, 0.0
        trainer.save()


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy().view(np.int32)


def tables_of(run: Path) -> Tables:
    return open_tables(newest_checkpoint(run))


def relations_of_first(tables: Tables, number: int) -> torch.Tensor:
    """Return the rows of the first relations, and of their inverses, spelled out."""
    layout, table = tables.layout, tables.relation_table
    inverses = [table[layout.num_relations : layout.num_relations + number]] if layout.reciprocal else []
    return torch.cat([table[:number], *inverses])


def grow(workers: Workers, jobs: list[Job], place: Place) -> list[str]:
    return [
        train_worker(
            job, open_graph(place.root / "graphs" / job.graph_name), place.runs / job.name, CPU, workers, "auto"
        )[0].name
        for job in jobs
    ]


@pytest.fixture(scope="module")
def frozen(toy_graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Runs of all kinds of jobs, and their growth: by one worker, and by two with whole blocks and with spread rows."""
    place = place_of(tmp_path_factory.mktemp("frozen"), toy_graph)
    for name, job in PARENTS.items():
        trained_parent(place, job)
        for (size, placement), suffix in WORKERS.items():
            grown = extended_job(job, ["new.tsv"], name=f"{name}-{suffix}", **place.where)
            place.prepared(grown)
            runtime = dataclasses.replace(grown.runtime, workers=size, placement=placement)
            place.jobs.setdefault(suffix, []).append(dataclasses.replace(grown, runtime=runtime))
    for (size, _), suffix in WORKERS.items():
        assert in_group(size, place.root, grow, place.jobs[suffix], place) == [["FINISHED"] * len(PARENTS)] * size
    return place


@pytest.mark.parametrize("suffix", list(WORKERS.values()))
@pytest.mark.parametrize("name", list(PARENTS))
def test_frozen_rows_keep_every_bit_and_new_ones_move(frozen: Place, name: str, suffix: str) -> None:
    before, after = tables_of(frozen.runs / name), tables_of(frozen.runs / f"{name}-{suffix}")
    num_entities, num_relations = before.layout.num_entities, before.layout.num_relations
    assert (after.layout.num_entities, after.layout.num_relations) == (num_entities + 5, num_relations + 1)
    for old, new in zip(before.rows().blocks, after.rows().blocks, strict=True):
        np.testing.assert_array_equal(bits(old), bits(new[:num_entities]))
    np.testing.assert_array_equal(
        bits(relations_of_first(before, num_relations)), bits(relations_of_first(after, num_relations))
    )
    (job,) = (job for job in frozen.jobs[suffix] if job.name == f"{name}-{suffix}")
    job = dataclasses.replace(job, runtime=dataclasses.replace(job.runtime, workers=1))
    with process_group(CPU):
        drawn = Trainer(job, open_graph(frozen.root / "graphs" / job.graph_name), frozen.root / "drawn", CPU)
        drawn.initialise()
    assert (after.rows().slice(num_entities, num_entities + 5) != drawn.table.all_rows().slice(90, 95)).any(1).all()
    inverse = [num_relations, 2 * num_relations + 1][: 1 + after.layout.reciprocal]
    assert (after.relation_table[inverse] != drawn.relations.data[inverse]).any(1).all()


@pytest.mark.parametrize("name", ["softmax", "chunks"])
def test_a_relation_alone_may_be_new_and_the_optimizer_another(toy_graph: Graph, tmp_path: Path, name: str) -> None:
    place = place_of(tmp_path, toy_graph)
    write(tmp_path / "new.tsv", [(f"e{i:03d}", "besides", f"e{i + 3:03d}") for i in range(40)])
    trained_parent(place, PARENTS[name])
    other = {"adagrad": "rowwise_adagrad", "rowwise_adagrad": "adagrad"}[PARENTS[name].optimizer.kind]
    job = dataclasses.replace(PARENTS[name], optimizer=dataclasses.replace(PARENTS[name].optimizer, kind=other))
    job = extended_job(job, ["new.tsv"], **place.where)
    train(job, place.prepared(job), place.runs / job.name)
    before, after = tables_of(place.runs / name), tables_of(place.runs / job.name)
    np.testing.assert_array_equal(bits(before.rows().slice(0, 90)), bits(after.rows().slice(0, 90)))
    np.testing.assert_array_equal(bits(relations_of_first(before, 4)), bits(relations_of_first(after, 4)))


def test_trained_rows_go_on_from_the_parent_with_its_state(toy_graph: Graph, tmp_path: Path) -> None:
    """All triples are trained on; before the first step rows and Adagrad's sums are the parent's."""
    place = place_of(tmp_path, toy_graph)
    base = dataclasses.replace(JOBS["softmax"], extend=dataclasses.replace(JOBS["softmax"].extend, rows="trained"))
    trained_parent(place, base)
    job = extended_job(base, ["new.tsv"], **place.where)
    graph, run = place.prepared(job), place.runs / job.name
    assert job.train == base.train
    assert job.trained_split == "train"
    with process_group(CPU):
        parent = Trainer(base, place.prepared(base), place.runs / "ring", CPU)
        parent.resume(tables_of(place.runs / "ring").checkpoint)
        trainer = Trainer(job, graph, run, CPU)
        trainer.initialise()
        trainer.grow(tables_of(place.runs / "ring").checkpoint)
        for part in ("entities", "fused"):
            old, new = parent._state()[part], trainer._state()[part]
            for name in old:
                (a,), (b,) = old[name].local_shards(), new[name].local_shards()
                np.testing.assert_array_equal(bits(a.tensor), bits(b.tensor[: len(a.tensor)]))
        rows = [*range(4), *range(5, 9)]
        np.testing.assert_array_equal(bits(parent.relations), bits(trainer.relations[rows]))
        sums = [t.optimizers.dense_state()["sum"] for t in (parent, trainer)]
        np.testing.assert_array_equal(bits(sums[0]), bits(sums[1][rows]))
        assert not sums[1][[4, 9]].any()
        before = trainer.table.all_rows().slice(0, 95).clone()
        for step in range(trainer.batches.steps_per_epoch):
            trainer.train_step(trainer.batches.batch(step))
        assert (trainer.table.all_rows().slice(0, 95) != before).any(1).all()


def test_killed_and_started_again_ends_bit_for_bit_the_same(toy_graph: Graph, tmp_path: Path) -> None:
    """Before the first checkpoint, and inside a later one."""
    place = place_of(tmp_path, toy_graph)
    base = quick("transe", checkpoint={"every_steps": 2}, train={"batch_size": 50}, optimizer={"kind": "adagrad"})
    trained_parent(place, base)
    job = extended_job(base, ["new.tsv"], name="straight", **place.where)
    graph = place.prepared(job)
    assert children.run_to_end(job, graph.directory, place.runs / "straight") == 0
    for fault in ("step:1", "before-rename:2"):
        again = place.runs / fault.replace(":", "-")
        assert children.run_to_end(job, graph.directory, again, fault) == children.KILLED
        assert children.run_to_end(job, graph.directory, again) == 0
        assert_same_end(place.runs / "straight", again)


# The command


@pytest.fixture(scope="module")
def ring(toy_graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A whole run, by the command."""
    place = place_of(tmp_path_factory.mktemp("ring"), toy_graph)
    assert train_command.main(place.options(JOBS["softmax"])) == 0
    return place


@pytest.fixture
def grown(ring: Place, tmp_path: Path) -> Place:
    """A copy of it, and a run that grew out of it, by the command."""
    shutil.copytree(ring.root, tmp_path / "grown", symlinks=True)
    place = Place(tmp_path / "grown")
    assert train_command.main([*place.options(JOBS["softmax"]), "--extend", "new.tsv"]) == 0
    return place


def facts_of(place: Place, name: str) -> dict[str, Any]:
    return dict(tables_of(place.runs / name).facts)


def test_the_command_prepares_trains_evaluates_exports_and_tells_the_lineage(grown: Place) -> None:
    run, parent = grown.runs / "ring-extended-1", facts_of(grown, "ring")
    job = load_job(run / "job.yaml")
    assert (job.extend.run, job.extend.step, job.extend.rows) == ("ring", parent["step"], "frozen")
    assert job.extend.triples == ("new.tsv",)
    assert {r["split"] for r in json.loads((run / "evaluation.json").read_text())} == {"test"}
    summary = json.loads((run / "evaluation_summary.json").read_text())
    assert summary["triples_ranked"] == open_graph(grown.root / "graphs" / "ring").num_triples["test"]
    lineage = facts_of(grown, "ring-extended-1")["lineage"]
    assert lineage == {
        "run": "ring", "step": parent["step"], "rows": "frozen", "graph": "ring",
        "checkpoint_sha256": lineage["checkpoint_sha256"], "graph_sha256": parent["graph_sha256"],
        "num_entities": 90, "num_relations": 4, "files": lineage["files"], "lineage": None,
    }  # fmt: skip
    assert [file["file"] for file in lineage["files"]] == ["new.tsv"]
    old, new = (Tier.open(grown.runs / name / "export" / "server") for name in ("ring", "ring-extended-1"))
    np.testing.assert_array_equal(old.vector("e007").view(np.int32), new.vector("e007").view(np.int32))
    assert new.vector("n3").shape == old.vector("e007").shape
    trained = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {record["kind"] for record in trained} == {"train"}, "old triples cannot tell how good new rows are"


def test_devices_that_have_the_old_tiers_fetch_the_new_rows_alone(grown: Place) -> None:
    run, shipped = grown.runs / "ring-extended-1", grown.runs / "ring" / "export"
    where = ["--graphs-dir", str(grown.root / "graphs")]
    assert export_command.main([str(run), *where, "--onto", str(shipped), "--out", str(run / "joined")]) == 0
    for name in ("phone", "server"):
        upgraded, whole = Tier.open(shipped / name).upgrade(run / "joined" / name), Tier.open(run / "export" / name)
        assert (upgraded.num_entities, upgraded.num_relations) == (whole.num_entities, whole.num_relations) == (95, 5)
        np.testing.assert_array_equal(upgraded.vectors(np.arange(95)), whole.vectors(np.arange(95)))
        assert upgraded.top_k("e012", "above", 7)[0] == whole.top_k("e012", "above", 7)[0]
        assert upgraded.top_k_heads("step1", "e003", 7)[0] == whole.top_k_heads("step1", "e003", 7)[0]
    assert size_of_rows(run / "joined") < size_of_rows(run / "export") / 10


def size_of_rows(export: Path) -> int:
    return sum(path.stat().st_size for path in export.glob("*/entities-*.safetensors"))


def test_the_same_command_goes_on_with_the_same_run(grown: Place, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*grown.options(JOBS["softmax"]), "--extend", "new.tsv"]
    before = newest_checkpoint(grown.runs / "ring-extended-1")
    assert train_command.main(command) == 0
    assert "all epochs are done" in capsys.readouterr().err
    assert newest_checkpoint(grown.runs / "ring-extended-1") == before
    # Its own job is a job, and the files are no longer needed.
    (grown.root / "new.tsv").unlink()
    job = load_job(grown.runs / "ring-extended-1" / "job.yaml")
    assert train_command.main(grown.options(job)) == 0
    assert sorted(path.name for path in grown.runs.iterdir()) == ["ring", "ring-extended-1"]


def test_other_triples_make_another_run_or_are_refused_under_a_name(grown: Place) -> None:
    write(grown.root / "new.tsv", NEW[:3])
    base = JOBS["softmax"]
    assert extended_job(base, ["new.tsv"], **grown.where).name == "ring-extended-2"
    with pytest.raises(CheckpointError, match=r"ring-extended-1 is there already, and grew otherwise: by new\.tsv"):
        extended_job(base, ["new.tsv"], name="ring-extended-1", **grown.where)
    with pytest.raises(ConfigError, match="ring is the job's own name"):
        extended_job(base, ["new.tsv"], name="ring", **grown.where)


def test_frozen_or_not_cannot_change_on_the_way(grown: Place, capsys: pytest.CaptureFixture[str]) -> None:
    base = JOBS["softmax"]
    base = dataclasses.replace(base, extend=dataclasses.replace(base.extend, rows="trained"))
    assert train_command.main([*grown.options(base), "--extend", "new.tsv"]) == CheckpointError.exit_code
    assert "extend.rows: 'frozen' -> 'trained'" in capsys.readouterr().err


def test_a_run_that_grew_grows_again(grown: Place) -> None:
    write(grown.root / "more.tsv", [("o1", "above", "n3"), ("e001", "besides", "o1")])
    job = load_job(grown.runs / "ring-extended-1" / "job.yaml")
    assert train_command.main([*grown.options(job), "--extend", "more.tsv"]) == 0
    first, second = (tables_of(grown.runs / f"ring-extended-{k}") for k in (1, 2))
    np.testing.assert_array_equal(bits(first.rows().slice(0, 95)), bits(second.rows().slice(0, 95)))
    np.testing.assert_array_equal(bits(relations_of_first(first, 5)), bits(relations_of_first(second, 5)))
    assert second.facts["lineage"]["run"] == "ring-extended-1"
    assert second.facts["lineage"]["lineage"] == first.facts["lineage"]


def test_what_cannot_be_extended_is_refused_with_its_reason(ring: Place, capsys: pytest.CaptureFixture[str]) -> None:
    base = JOBS["softmax"]
    with pytest.raises(CheckpointError, match="train the job first"):
        extended_job(dataclasses.replace(base, name="nowhere"), ["new.tsv"], **ring.where)
    with pytest.raises(CheckpointError, match="has no step 77"):
        extended_job(base, ["new.tsv"], step=77, **ring.where)
    other = dataclasses.replace(base, model=dataclasses.replace(base.model, dims=(4, 8, 20), tiers={"a": 4, "b": 20}))
    with pytest.raises(CheckpointError, match=r"whose model is another: model\.dims: \[4, 8, 16\] -> \[4, 8, 20\]"):
        extended_job(other, ["new.tsv"], **ring.where)
    with pytest.raises(GraphError, match=r"extend\.triples: no file 'none\.tsv'"):
        extended_job(base, ["none.tsv"], **ring.where)
    with pytest.raises(ConfigError, match=r"name: '\.\./x' is no name"):
        extended_job(base, ["new.tsv"], name="../x", **ring.where)
    write(ring.root / "old-names.tsv", OLD_NAMES)
    before = sorted((ring.root / "graphs").iterdir())
    assert train_command.main([*ring.options(base), "--extend", "old-names.tsv"]) == GraphError.exit_code
    assert "use extend.rows: trained" in capsys.readouterr().err
    assert sorted((ring.root / "graphs").iterdir()) == before
    with pytest.raises(SystemExit):
        train_command.main([*ring.options(base), "--name", "x"])


def test_a_plan_counts_old_and_new(ring: Place) -> None:
    job = extended_job(JOBS["softmax"], ["new.tsv"], name="planned", **ring.where)
    size = size_of(job, ring.root / "graphs", ring.root)
    assert size.num_entities >= 95
    # All of the ring's triples are fewer than go with new ones at least.
    assert size.num_growth == size.num_train


# Quality


def held_out(data_dir: Path, names: int) -> Iterator[tuple[str, list[Triple], list[Triple]]]:
    """Yield (split, triples without some entities of UMLS, triples with them)."""
    read = {
        split: [tuple(line.split("\t")) for line in (data_dir / "umls" / f"{split}.tsv").read_text().splitlines()]
        for split in ("train", "valid", "test")
    }
    everyone = sorted({name for rows in read.values() for row in rows for name in (row[0], row[2])})
    out = set(np.random.default_rng(0).choice(everyone, names, replace=False))
    for split, rows in read.items():
        yield split, [r for r in rows if not out & {r[0], r[2]}], [r for r in rows if out & {r[0], r[2]}]


def mrr(
    graph: Graph, rows: Any, relations: torch.Tensor, layout: Any, triples: list[Triple], known: list[Triple]
) -> float:
    """Return the mean over sub-models of the MRR of triples, filtered by `known`."""
    entities = {name: i for i, name in enumerate(graph.entity_names().to_pylist())}
    labels = {name: i for i, name in enumerate(graph.relation_names().to_pylist())}

    def ids(rows: list[Triple]) -> np.ndarray:
        return np.array([(entities[h], labels[r], entities[t]) for h, r, t in rows])

    index = KnownTriples([ids(known)], num_entities=graph.num_entities, num_relations=graph.num_relations)
    return float((1 / rank_all(ids(triples), rows, relations, layout, index).of("both")).mean())


def test_held_out_entities_are_learned_and_the_others_untouched(data_dir: Path, tmp_path: Path) -> None:
    """UMLS without 13 of its 135 entities, which then come back."""
    new: dict[str, list[Triple]] = {}
    old: dict[str, list[Triple]] = {}
    for split, old[split], new[split] in held_out(data_dir, 13):
        write(tmp_path / f"{split}.tsv", old[split])
    write(tmp_path / "new.tsv", new["train"])
    base = load_job(Path(__file__).parents[1] / "jobs" / "umls.yaml")
    files = {split: (f"{split}.tsv",) for split in ("train", "valid", "test")}
    base = dataclasses.replace(
        base, graph=dataclasses.replace(base.graph, **files),
        train=dataclasses.replace(base.train, epochs=15, validate_every=0),
        runtime=dataclasses.replace(base.runtime, threads=1),
    )  # fmt: skip
    place = Place(tmp_path)
    train(base, place.prepared(base), place.runs / "umls")
    job = extended_job(base, ["new.tsv"], **place.where)
    graph, run = place.prepared(job), place.runs / job.name
    train(job, graph, run)
    before, after = tables_of(place.runs / "umls"), tables_of(run)
    np.testing.assert_array_equal(bits(before.rows().slice(0, 122)), bits(after.rows().slice(0, 122)))
    everything = [triple for rows in (*old.values(), *new.values()) for triple in rows]
    with process_group(CPU):
        trainer = Trainer(job, graph, tmp_path / "untrained", CPU)
        trainer.initialise()
        trainer.grow(before.checkpoint)
        untrained = mrr(
            graph, trainer.table.all_rows(), trainer.relations.data, trainer.layout, new["test"], everything
        )
    learned = mrr(graph, after.rows(), after.relation_table, after.layout, new["test"], everything)
    unchanged = mrr(graph, after.rows(), after.relation_table, after.layout, old["test"], everything)
    assert untrained < 0.2
    assert learned > 0.7
    assert unchanged > 0.7, "new rows stand where they do not belong"
    export_run(job, run, graphs_dir=tmp_path / "graphs")
