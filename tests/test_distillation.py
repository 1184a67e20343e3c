"""Learning from another run's model: its columns lie beside the student's, and stay as they are or learn too."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from test_workers import in_group
from toy import toy_job

from medscale.baselines.distillation import METHODS, Method, assistant_dim, chain
from medscale.baselines.distillation import student as student_of
from medscale.checkpoint import Tables, newest_checkpoint, open_tables
from medscale.config import Job, conflicts
from medscale.distributed import process_group
from medscale.errors import CheckpointError
from medscale.evaluate import rank_tables
from medscale.graph.reader import Graph, open_graph
from medscale.jobfile import dump_job, parse_job
from medscale.loss.bce import logits_of
from medscale.model.layout import layout_of
from medscale.model.prefix import prefix_scan
from medscale.objective import Objective
from medscale.train import train
from medscale.trainer import Trainer, initial_scale, train_worker
from medscale.workers import Workers

CPU = torch.device("cpu")
TEACHER = toy_job("rotate", "teacher", model={"dims": (4, 12), "tiers": {"t": 12}})
STUDENT = toy_job(
    "rotate", "student", model={"dims": (3, 15), "tiers": {"phone": 3}, "damping": (0.0,)},
    med={"mutual_loss": "kl", "dynamic_weight": False}, loss={"margin_scaling": "linear", "temperature": "linear"},
    train={"watch_dim": 3},
)  # fmt: skip


def student(name: str = "student", **distill: object) -> Job:
    section = dataclasses.replace(STUDENT.distill, teacher="teacher", **distill)  # type: ignore[arg-type]
    return dataclasses.replace(STUDENT, name=name, distill=section)


def tables_of(run: Path) -> Tables:
    return open_tables(newest_checkpoint(run))


def columns_of(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return a run's entity and relation columns."""
    tables = tables_of(run)
    return tables.rows().slice(0, 90).numpy(), tables.relation_table.numpy()


@pytest.fixture(scope="module")
def runs(toy_graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a teacher, and students of it: of one that stays as it is, and of one that learns."""
    directory = tmp_path_factory.mktemp("runs")
    for job in (TEACHER, student(), student("dual", learns_after=10)):
        train(job, toy_graph, directory / job.name)
    return directory


def test_the_teacher_keeps_every_bit_and_the_student_moves(runs: Path, toy_graph: Graph) -> None:
    (teacher, teacher_relations), (both, relations) = columns_of(runs / "teacher"), columns_of(runs / "student")
    np.testing.assert_array_equal(both[:, 6:].view(np.int32), teacher.view(np.int32))
    np.testing.assert_array_equal(relations[:, 3:].view(np.int32), teacher_relations.view(np.int32))
    with process_group(CPU):
        drawn = Trainer(student(), toy_graph, runs / "drawn", CPU)
        drawn.initialise()
    assert (both[:, :6] != drawn.table.all_rows().slice(0, 90)[:, :6].numpy()).all()
    assert (relations[:, :3] != drawn.relations.data[:, :3].numpy()).all()
    lesson = tables_of(runs / "student").facts["lineage"]
    assert (lesson["teacher"], lesson["dim"], lesson["step"]) == (
        "teacher",
        12,
        tables_of(runs / "teacher").facts["step"],
    )


def test_the_last_level_ranks_as_the_teacher_does(runs: Path, toy_graph: Graph) -> None:
    triples = toy_graph.triples("test")
    taught = rank_tables(student(), toy_graph, tables_of(runs / "student"), triples, "test")
    alone = rank_tables(TEACHER, toy_graph, tables_of(runs / "teacher"), triples, "test")
    np.testing.assert_array_equal(taught.of("both")[1], alone.of("both")[1])


@pytest.mark.parametrize(
    ("scorer", "norm"), [("transe", "l1"), ("transe", "l2"), ("rotate", "l1"), ("pairre", "l1"), ("simple", "l1")]
)
@pytest.mark.parametrize(
    ("dims", "dim", "growth"), [((4, 12), 4, "sqrt"), ((4, 12), 12, "sqrt"), ((3, 15), 3, "linear")]
)
def test_a_teachers_logits_are_those_of_its_own_run(
    scorer: str, norm: str, dims: tuple[int, ...], dim: int, growth: str, toy_graph: Graph, tmp_path: Path
) -> None:
    """Also where it is a prefix, or was a student: its columns are smaller there than those of a model of its own."""

    def job_of(name: str, dims: tuple[int, ...], **loss: object) -> Job:
        return toy_job(
            scorer, name, model={"norm": norm, "dims": dims, "tiers": {"t": dims[-1]}}, negatives={"kind": "chunk"},
            loss={"kind": "bce", "margin": 6.0, **loss},
        )  # fmt: skip

    def logits(job: Job, rows: torch.Tensor, relations: torch.Tensor) -> torch.Tensor:
        layout = layout_of(job.model, toy_graph.num_entities, toy_graph.num_relations)
        scan, ids = (
            prefix_scan(layout.scorer, layout.dims, layout.damping, dtype=torch.float64),
            torch.from_numpy(toy_graph.triples("test")),
        )
        relation_PC = relations[ids[:, 1]].double()
        scale = None if layout.scorer.scale is None else layout.scorer.scale(relation_PC, "tail")
        query = layout.scorer.query(rows[ids[:, 0]].double(), relation_PC, "tail")
        of = logits_of(job.loss, layout.dims, is_distance=layout.scorer.is_distance, device=CPU)
        return of(scan.pair_scores(query, rows[ids[:, 2]].double(), scale))

    teacher = job_of("teacher", dims, margin_scaling=growth, temperature="linear" if growth == "linear" else "sqrt")
    train(teacher, toy_graph, tmp_path / "teacher")
    tables = tables_of(tmp_path / "teacher")
    own = logits(teacher, tables.rows().slice(0, 90), tables.relation_table)[dims.index(dim)]
    job = student_of("dualde", job_of("direct", (2,)), "pupil", "teacher", dim, stage_steps=5)
    with process_group(CPU):
        trainer = Trainer(job, toy_graph, tmp_path / "pupil", CPU)
        trainer.initialise()
        trainer.seat(tables)
        seated = logits(job, trainer.table.all_rows().slice(0, 90), trainer.relations.data)[-1]
    torch.testing.assert_close(seated, own, rtol=1e-5, atol=1e-5)
    assert own.std() > 0.05


def test_a_teacher_may_learn_too(runs: Path) -> None:
    (teacher, teacher_relations), (both, relations) = columns_of(runs / "teacher"), columns_of(runs / "dual")
    assert (both[:, 6:] != teacher).any(1).all()
    assert (relations[:, 3:] != teacher_relations).any(1).all()


def test_a_teacher_begins_to_learn_after_some_steps(toy_graph: Graph, runs: Path, tmp_path: Path) -> None:
    teacher, _ = columns_of(runs / "teacher")
    with process_group(CPU):
        trainer = Trainer(student("late", learns_after=2), toy_graph, tmp_path / "late", CPU)
        trainer.initialise()
        trainer.seat(tables_of(runs / "teacher"))
        for step in range(3):
            assert torch.equal(trainer.table.all_rows().slice(0, 90)[:, 6:], torch.from_numpy(teacher))
            trainer.train_step(trainer.batches.batch(step))
        moved = trainer.table.all_rows().slice(0, 90)[:, 6:] - torch.from_numpy(teacher)
        assert 0 < moved.abs().max() < 0.05, "at the pace that it had come to, not at that of its first step"


def test_students_scores_do_not_depend_on_the_teachers_columns(toy_graph: Graph, tmp_path: Path, runs: Path) -> None:
    job = student("alone")
    with process_group(CPU):
        trainer = Trainer(job, toy_graph, tmp_path / "alone", CPU)
        batch = trainer.batches.batch(0)
    rows = torch.randn(len(batch.entities_U), 30)
    relations = torch.randn(toy_graph.num_relations, 15)
    losses = []
    for teacher in (0.0, 5.0):
        rows[:, 6:] += teacher
        relations[:, 3:] += teacher
        objective = Objective(job, trainer.layout, CPU)
        losses.append(objective(batch, objective.rows(rows), relations, 0))
    assert losses[0].hard[0] == losses[1].hard[0]
    assert losses[0].hard[1] != losses[1].hard[1]
    assert losses[0].mutual[0] != losses[1].mutual[0]


def taught(workers: Workers, jobs: list[Job], graph: Path, runs: Path) -> list[str]:
    return [train_worker(job, open_graph(graph), runs / job.name, CPU, workers, "auto")[0].name for job in jobs]


@pytest.mark.slow
def test_two_workers_seat_the_same_teacher(runs: Path, toy_graph: Graph) -> None:
    jobs = [
        dataclasses.replace(
            student(f"{placement}_{learns_after}", learns_after=learns_after),
            runtime=dataclasses.replace(STUDENT.runtime, workers=2, placement=placement),
        )
        for placement in ("table_wise", "row_wise")
        for learns_after in (None, 10)
    ]
    teacher, teacher_relations = columns_of(runs / "teacher")
    assert in_group(2, runs, taught, jobs, Path(str(toy_graph.directory)), runs) == [["FINISHED"] * 4] * 2
    for job in jobs:
        both, relations = columns_of(runs / job.name)
        if job.distill.learns_after is None:
            np.testing.assert_array_equal(both[:, 6:], teacher)
            np.testing.assert_array_equal(relations[:, 3:], teacher_relations)
        alone, _ = columns_of(runs / ("student" if job.distill.learns_after is None else "dual"))
        np.testing.assert_allclose(both, alone, rtol=0, atol=1e-3)


def test_a_student_goes_on_where_it_stopped(runs: Path, toy_graph: Graph) -> None:
    half = dataclasses.replace(student("halves"), train=dataclasses.replace(STUDENT.train, epochs=2))
    train(half, toy_graph, runs / "halves")
    train(student("halves"), toy_graph, runs / "halves")
    for once, twice in zip(columns_of(runs / "student"), columns_of(runs / "halves"), strict=True):
        np.testing.assert_array_equal(once, twice)


@pytest.mark.parametrize(
    ("changes", "distill", "message"),
    [
        ({"dims": (3, 14)}, {}, "the last level has 11 units, and the teacher 12"),
        ({}, {"dim": 4}, "the last level has 12 units, and the teacher 4"),
        ({}, {"dim": 5}, r"distill.dim: 5 is none of its dims \[4, 12\]"),
        ({"scorer": "transe"}, {}, "model.scorer: rotate -> transe"),
        ({"reciprocal": True}, {}, "model.reciprocal: False -> True"),
    ],
)
def test_a_teacher_of_another_kind_is_refused(
    runs: Path, toy_graph: Graph, changes: dict[str, object], distill: dict[str, int], message: str
) -> None:
    job = student("refused", **distill)
    job = dataclasses.replace(job, model=dataclasses.replace(job.model, **changes))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=f"cannot teach refused: .*{message}"):
        train(job, toy_graph, runs / "refused")


def test_a_missing_teacher_is_named(toy_graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="teacher"):
        train(student(), toy_graph, tmp_path / "student")


def test_jobs_that_cannot_distil_say_why() -> None:
    def wrong(job: Job) -> str:
        return "; ".join(f"{key}: {what}" for key, what in conflicts(job))

    assert not wrong(student())
    job = student()
    assert "must end in 0" in wrong(dataclasses.replace(job, model=dataclasses.replace(job.model, damping=(1.0,))))
    assert "teaches by mutual learning" in wrong(
        dataclasses.replace(job, med=dataclasses.replace(job.med, mutual="off"))
    )
    assert "is the job's own name" in wrong(dataclasses.replace(job, name="teacher"))
    distill = dataclasses.replace(job.distill, teacher=None, dim=3)
    assert "needs distill.teacher" in wrong(dataclasses.replace(job, distill=distill))
    evaluated = dataclasses.replace(job.med, labels="evaluated", weights="learnable")
    assert "med.labels" in wrong(dataclasses.replace(job, med=evaluated))


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_jobs_whose_student_is_the_direct_model(method: Method, toy_graph: Graph) -> None:
    direct = toy_job("transe", "direct", model={"dims": (3,), "tiers": {"t": 3}}, loss={"margin": 7.0})
    job = student_of(method, direct, "student", "teacher", 12, stage_steps=9)
    assert parse_job(dump_job(job), "job") == job
    assert (job.model.dims, job.distill.teacher, job.train.watch_dim) == ((3, 15), "teacher", 3)
    assert [job.keeps_teacher(step) for step in (0, 8, 9)] == [True, True, method != "dualde"]
    assert job.med.mutual_weight == 1 + job.negatives.number, "soft labels of a positive and its negatives are summed"
    layout = layout_of(job.model, toy_graph.num_entities, toy_graph.num_relations)
    logits = logits_of(job.loss, layout.dims, is_distance=True, device=CPU)
    # z = 7 - distance in its own units; the largest model's own margin and units
    torch.testing.assert_close(logits.margins * logits.temperatures, torch.tensor([7.0, 7.0]))
    assert initial_scale(job) * logits.temperatures[0].item() == pytest.approx(initial_scale(direct))


def test_chains_halve_and_assistants_lie_between() -> None:
    assert chain(10, 640) == (640, 320, 160, 80, 40, 20, 10)
    assert chain(100, 640) == (640, 320, 160, 100)
    assert chain(10, 20) == (20, 10)
    assert assistant_dim({10: 0.1, 40: 0.2, 160: 0.23, 640: 0.24}, 10, 640) == 40
    assert assistant_dim({10: 0.0, 40: 0.25, 160: 0.75, 640: 1.0}, 10, 640) == 40, "of equally near ones the smaller"
