"""Several workers: real groups of processes over gloo, compared with one worker on the same batches."""

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Collection
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from toy import toy_job

from medscale import trainer as trainer_module
from medscale.batches.corruption import CorruptionBatch
from medscale.checkpoint import committed_steps, open_tables
from medscale.config import Job
from medscale.distributed import process_group
from medscale.errors import MedscaleError, NonFiniteError
from medscale.graph.reader import Graph, open_graph
from medscale.trainer import Trainer, batches_of, train_worker
from medscale.workers import Workers

CPU = torch.device("cpu")


def in_group(
    size: int, directory: Path, function: Callable[..., Any], *arguments: Any, timeout_s: float = 60,
    lost: Collection[int] = (),
) -> list[Any]:  # fmt: skip
    """Run function(workers, *arguments) in a process per worker; return what each returns, by rank.

    Those of ranks `lost` are expected to say nothing, and are killed in the end.
    """
    # forked from a server that has imported everything once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["medscale.train"])
    pipes, processes = [], []
    store = directory / f"store-{len(list(directory.glob('store-*')))}"
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_member, args=(sender, rank, size, str(store), timeout_s, function, arguments))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    results = []
    for rank, receiver in enumerate(pipes):
        if rank in lost:
            continue
        assert receiver.poll(120), f"worker {rank} says nothing"
        kind, value = receiver.recv()
        assert kind == "result", f"worker {rank} failed:\n{value}"
        results.append(value)
    for rank, process in enumerate(processes):
        if rank in lost:
            process.kill()
        process.join(30)
    return results


def _member(
    sender: Any, rank: int, size: int, store: str, timeout_s: float, function: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(1)
    try:
        with process_group(CPU, Workers(rank, size), dist.FileStore(store, size), timeout_s) as workers:
            sender.send(("result", function(workers, *arguments)))
    except BaseException:
        sender.send(("failure", traceback.format_exc()))


def trained(workers: Workers, jobs: list[Job], graph_directory: Path, run_directory: Path, steps: int) -> list[Any]:
    """Train some steps of each job; return (tables, relations, scaling, hard losses), the whole of each."""
    graph, results = open_graph(graph_directory), []
    for job in jobs:
        trainer = Trainer(job, graph, run_directory, CPU, workers)
        trainer.initialise()
        terms = [trainer.train_step(trainer.batches.batch(step)) for step in range(steps)]
        rows = trainer.table.rows_to_rank().slice(0, graph.num_entities).clone()
        scaling = trainer.objective.scaling.values.detach()
        results.append([t.detach().numpy().copy() for t in (rows, trainer.relations.detach(), scaling, terms[-1].hard)])
    return results


def jobs_of_all_kinds() -> list[Job]:
    """One job per scorer, kind of negatives, and way of normalising; both losses."""
    learnable = {"weights": "learnable", "weights_lr": 0.01}
    paper = {"mutual": "both", "evolution": "previous", "form": "paper", "normalize": "batch", **learnable}
    torch_alone = {"kernels": "torch"}
    return [
        toy_job("transe", med=paper),
        toy_job("transe", med=paper, runtime=torch_alone),
        toy_job("rotate", med=learnable),
        toy_job("pairre", negatives={"kind": "per_positive"}),
        toy_job("simple", loss={"kind": "bce"}, negatives={"kind": "chunk"}),
        toy_job("distmult", loss={"kind": "bce"}, negatives={"kind": "in_batch"}, runtime=torch_alone),
        toy_job(
            "complex",
            model={"reciprocal": True},
            loss={"regularizer": "n3", "regularizer_weights": (0.05,)},
            optimizer={"tier_factors": (3.0, 1.0)},
        ),
        toy_job("complex", med={"evolution": "previous"}, runtime=torch_alone),
        toy_job("transe", loss={"kind": "softmax"}, negatives={"kind": "all"}),
    ]


@pytest.mark.parametrize(("size", "placement"), [(2, "table_wise"), (2, "row_wise"), (3, "table_wise")])
def test_workers_with_shares_of_a_batch_equal_one_with_the_whole(
    toy_graph: Graph, tmp_path: Path, size: int, placement: str
) -> None:
    """Three workers for two blocks: one holds no rows. After one step 1e-5."""
    jobs = jobs_of_all_kinds()
    many = [_with_workers(job, size, placement) for job in jobs]
    (alone,) = in_group(1, tmp_path, trained, jobs, toy_graph.directory, tmp_path / "one", 1)
    for results in in_group(size, tmp_path, trained, many, toy_graph.directory, tmp_path / "many", 1):
        for job, one, result in zip(jobs, alone, results, strict=True):
            for name, expected, found in zip(("entities", "relations", "scaling", "hard"), one, result, strict=True):
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=f"{job.model.scorer} {name}")


@pytest.mark.parametrize("job", [toy_job("transe", model={"norm": "l2"}), toy_job("complex")], ids=["l2", "softmax"])
def test_a_hundred_steps_stay_within_a_thousandth(toy_graph: Graph, tmp_path: Path, job: Job) -> None:
    job = dataclasses.replace(job, train=dataclasses.replace(job.train, epochs=40))
    (alone,) = in_group(1, tmp_path, trained, [job], toy_graph.directory, tmp_path / "one", 100)
    two = [_with_workers(job, 2, "table_wise")]
    for results in in_group(2, tmp_path, trained, two, toy_graph.directory, tmp_path / "two", 100):
        for expected, found in zip(alone[0], results[0], strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def run(workers: Workers, job: Job, graph_directory: Path, run_directory: Path, fault: str | None) -> str:
    """Train a job to its end, as every worker does; return why it ended, or the error."""
    if fault is not None:
        os.environ["MEDSCALE_FAULT"] = fault
    try:
        return train_worker(job, open_graph(graph_directory), run_directory, CPU, workers, "auto")[0].name
    except MedscaleError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_workers(toy_graph: Graph, tmp_path: Path) -> None:
    """Two workers, one, two again, each an epoch: the same tables as one worker all the way, row-wise or not."""
    job = toy_job("complex", optimizer={"kind": "adagrad"}, train={"validate_every": 1})
    assert in_group(1, tmp_path, run, job, toy_graph.directory, tmp_path / "alone", None) == ["FINISHED"]
    for epochs, size, placement in ((1, 2, "table_wise"), (2, 1, "auto"), (3, 2, "row_wise"), (4, 3, "table_wise")):
        part = dataclasses.replace(job, train=dataclasses.replace(job.train, epochs=epochs))
        part = _with_workers(part, size, placement)
        outcomes = in_group(size, tmp_path, run, part, toy_graph.directory, tmp_path / "changing", None)
        assert outcomes == ["FINISHED"] * size
    one, other = (_newest(tmp_path / name) for name in ("alone", "changing"))
    np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-4)
    metrics = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("alone", "changing")
    ]
    losses = [{m["step"]: m["loss"] for m in records if m["kind"] == "train"} for records in metrics]
    assert losses[0].keys() == losses[1].keys(), "every step was trained once"
    np.testing.assert_allclose(list(losses[1].values()), list(losses[0].values()), rtol=1e-4)


def test_each_triple_is_trained_on_once_per_epoch_by_one_worker(toy_graph: Graph) -> None:
    job, seen = toy_job("transe"), []
    for rank in range(3):
        batches = batches_of(job, toy_graph, Workers(rank, 3))
        for step in range(batches.steps_per_epoch):
            batch = batches.batch(step)
            assert isinstance(batch, CorruptionBatch)
            for c in batch.corruptions:
                known, target = (batch.entities_U[ids].flatten() for ids in (c.known_XP, c.target_XP))
                heads, tails = (known, target) if c.side == "tail" else (target, known)
                seen += zip(heads.tolist(), c.relation_XP.flatten().tolist(), tails.tolist(), strict=True)
    assert sorted(seen) == sorted(map(tuple, toy_graph.triples("train").tolist()))


def broken(workers: Workers, job: Job, graph_directory: Path, run_directory: Path, rank: int, where: str) -> str:
    """Train two steps; before the third, break something on one worker."""
    trainer = Trainer(job, open_graph(graph_directory), run_directory, CPU, workers)
    trainer.initialise()
    for step in range(2):
        trainer.train_step(trainer.batches.batch(step))
    if workers.rank == rank:
        forward = trainer.objective.forward

        def break_it(batch: Any, rows: Any, *rest: Any, **wanted: bool) -> Any:
            terms = forward(batch, rows, *rest, **wanted)
            if where == "gradient":
                rows.gathered_UC[0, 0] = float("nan")
                return terms
            return dataclasses.replace(terms, total=terms.total * float("nan"), regularizer=terms.regularizer / 0)

        trainer.objective.forward = break_it  # type: ignore[method-assign]
    before = trainer.table.rows_to_rank().slice(0, 90).clone()
    try:
        trainer.train_step(trainer.batches.batch(2))
    except NonFiniteError as error:
        assert torch.equal(before, trainer.table.rows_to_rank().slice(0, 90)), "nothing may be updated"
        return str(error)
    return "it went on"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_broken_number_on_one_worker_stops_all_before_the_update(
    toy_graph: Graph, tmp_path: Path, rank: int, where: str
) -> None:
    job = _with_workers(toy_job("transe"), 2, "table_wise")
    for message in in_group(2, tmp_path, broken, job, toy_graph.directory, tmp_path / "run", rank, where):
        assert f"step 3, worker {rank} of 2" in message
        assert "regularizer" in message if where == "loss" else "entities" in message


def hanging(workers: Workers, job: Job, graph_directory: Path, run_directory: Path, signal_number: int) -> str:
    """Train; worker 1 gets a signal after its third step."""

    def fault(point: str) -> None:
        if point == "step" and workers.rank == 1 and (run_directory / "checkpoints" / "step-000000003").exists():
            os.kill(os.getpid(), signal_number)

    trainer_module.fault_point = fault
    return run(workers, job, graph_directory, run_directory, None)


@pytest.mark.parametrize("signal_number", [pytest.param(signal.SIGSTOP, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_worker_that_hangs_or_dies_is_named(toy_graph: Graph, tmp_path: Path, signal_number: int) -> None:
    job = _with_workers(toy_job("transe"), 2, "table_wise")
    start = time.monotonic()
    arguments = (job, toy_graph.directory, tmp_path / "run", signal_number)
    (message,) = in_group(2, tmp_path, hanging, *arguments, timeout_s=8, lost=(1,))
    assert time.monotonic() - start < 30
    assert message.startswith("WorkerError")
    assert "worker 1 is silent" in message
    assert "after step" in message
    assert in_group(2, tmp_path, run, job, toy_graph.directory, tmp_path / "run", None) == ["FINISHED"] * 2


def signalled(workers: Workers, job: Job, graph_directory: Path, runs: Path, delays: list[float]) -> list[Any]:
    """Train once per delay, until one worker gets a SIGTERM; return (outcome, newest step, seconds from the signal)."""
    graph, ends = open_graph(graph_directory), []
    for trial, delay in enumerate(delays):
        sent = [0.0]

        def terminate(sent: list[float] = sent, delay: float = delay) -> None:
            while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
                time.sleep(0.01)  # it has not begun to train
            time.sleep(delay)
            sent[0] = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)

        if workers.rank == trial % workers.size:
            threading.Thread(target=terminate, daemon=True).start()
        directory = runs / f"trial-{trial}"
        outcome, _ = train_worker(job, graph, directory, CPU, workers, "auto")
        seconds = time.monotonic() - sent[0] if sent[0] else 0.0
        ends.append((outcome.name, committed_steps(directory)[-1].name, seconds))
    return ends


@pytest.mark.slow
def test_a_signal_to_one_worker_saves_the_same_step_on_all(toy_graph: Graph, tmp_path: Path) -> None:
    """Ten signals at random times; nothing that was trained is lost."""
    train = {"epochs": 2000, "validate_every": 0}
    job = _with_workers(toy_job("transe", train=train, checkpoint={"every_steps": 100_000}), 2, "table_wise")
    delays = np.random.default_rng(date.today().toordinal()).uniform(0.5, 3, 10).tolist()
    one, other = in_group(2, tmp_path, signalled, job, toy_graph.directory, tmp_path / "runs", delays)
    for trial, ((outcome, step, seconds), (same_outcome, same_step, _)) in enumerate(zip(one, other, strict=True)):
        assert outcome == same_outcome == "INTERRUPTED"
        assert step == same_step
        assert seconds < 10
        lines = (tmp_path / "runs" / f"trial-{trial}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert step == f"step-{json.loads(lines[-1])['step']:09d}", "every step that was trained is in the checkpoint"


def _newest(run_directory: Path) -> np.ndarray[Any, Any]:
    tables = open_tables(committed_steps(run_directory)[-1])
    rows: np.ndarray[Any, Any] = tables.rows().slice(0, tables.layout.num_entities).numpy()
    # However many workers wrote it, and however its tables lay on them, rows are read where they lie.
    number, columns = rows.shape
    assert np.array_equal(tables.entity_columns(7, number - 5, columns), rows[7:-5])
    assert np.array_equal(tables.entity_rows(np.arange(1, number, 3), columns - 1), rows[1::3, :-1])
    return rows


def _with_workers(job: Job, size: int, placement: str) -> Job:
    runtime = dataclasses.replace(job.runtime, workers=size, placement=placement)  # type: ignore[arg-type]
    return dataclasses.replace(job, runtime=runtime)
