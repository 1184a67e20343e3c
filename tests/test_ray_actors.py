"""Readers and evaluators as processes of a real Ray cluster: what they bring is what one process would find."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import object_store
import pytest
import ray
from partitions import NUM_TRIPLES, write_partitioned_graph
from toy import toy_job

from medscale.batches.partitions import Feed, PartitionReader
from medscale.checkpoint import committed_directory, committed_steps, step_of
from medscale.config import Job
from medscale.errors import CheckpointError, GraphError
from medscale.evaluators import RayEvaluators, start_evaluators
from medscale.graph.reader import Graph
from medscale.graph.schema import PART_ROWS
from medscale.graph.upload import upload_graph
from medscale.launch import train_on_ray
from medscale.location import RemotePath, parse_location
from medscale.readers import feed_of, start_readers
from medscale.train import train
from medscale.validation import count_committed

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that speaks S3, and an environment that names it."""
    log = tmp_path_factory.mktemp("s3") / "requests.log"
    with object_store.serving(log) as url, pytest.MonkeyPatch.context() as patch:
        object_store.use(patch, url)
        yield url


@pytest.fixture(scope="module", autouse=True)
def _cluster(store: str) -> Iterator[None]:
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, logging_level="warning", log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return write_partitioned_graph(tmp_path_factory.mktemp("partitioned") / "graph")


def job_with(**runtime: Any) -> Job:
    return toy_job("transe", runtime={"threads": 1, **runtime})


@contextlib.contextmanager
def readers_of(job: Job, graph: Graph) -> Iterator[list[Any]]:
    readers = start_readers(job, graph)
    yield readers
    for reader in readers:
        ray.kill(reader)


@pytest.mark.parametrize(
    "number", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_readers_bring_what_a_worker_alone_reads(graph: Graph, number: int) -> None:
    job, alone = job_with(readers=number), Feed.of(PartitionReader(graph, 0))
    with readers_of(job, graph) as readers:
        # two workers; the second one goes on from the middle of an epoch
        for start in (0, 1_500_000):
            feed = feed_of(readers, job, graph)
            for first in range(start, NUM_TRIPLES, 250_000):
                last = min(first + 250_000, NUM_TRIPLES)
                np.testing.assert_array_equal(feed.triples(1, first, last), alone.triples(1, first, last))
        assert sum(feed.described()["reader_triples"].values()) <= 2 * NUM_TRIPLES, "a partition was read twice"


def test_readers_scan_partitions_in_an_object_store(graph: Graph, store: str) -> None:
    object_store.make_bucket(store, "partitions")
    target = parse_location("s3://partitions/graph")
    assert isinstance(target, RemotePath)
    remote, alone = upload_graph(graph, target, lambda size: None), Feed.of(PartitionReader(graph, 0))
    job = job_with(readers=2)
    with readers_of(job, remote) as readers:
        feed = feed_of(readers, job, remote)
        for first in range(0, NUM_TRIPLES - 99, 300_000):
            np.testing.assert_array_equal(feed.triples(0, first, first + 99), alone.triples(0, first, first + 99))


def test_a_reader_that_dies_is_replaced(graph: Graph) -> None:
    job, alone = job_with(readers=1), Feed.of(PartitionReader(graph, 0))
    with readers_of(job, graph) as readers:
        feed = feed_of(readers, job, graph)
        np.testing.assert_array_equal(feed.triples(0, 0, 100), alone.triples(0, 0, 100))
        ray.kill(readers[0], no_restart=False)
        for first in range(500_000, NUM_TRIPLES, 500_000):
            np.testing.assert_array_equal(feed.triples(0, first, first + 99), alone.triples(0, first, first + 99))


def test_readers_wait_for_a_slow_trainer(graph: Graph) -> None:
    job = job_with(readers=2)
    with readers_of(job, graph) as readers:
        feed = feed_of(readers, job, graph)
        for first in range(100_000, 105_000, 1000):
            feed.triples(0, first, first + 1000)
            time.sleep(0.3)
        read = feed.described()["reader_triples"]
        assert len(read) == 2
        assert sum(read.values()) <= 3 * PART_ROWS, "the partition in use, and one ahead for each reader"


def test_a_damaged_file_is_named_with_its_row_group(tmp_path: Path) -> None:
    damaged = write_partitioned_graph(tmp_path / "graph")
    path = tmp_path / "graph" / "train" / "part-00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    job = job_with(readers=2)
    with readers_of(job, damaged) as readers:
        feed = feed_of(readers, job, damaged)
        with pytest.raises(GraphError, match=r"part-00001\.parquet: row group [34] .*damaged"):
            [feed.triples(0, first, first + 10) for first in range(0, NUM_TRIPLES, 500_000)]


def test_evaluators_count_what_one_process_counts(toy_graph: Graph, tmp_path: Path) -> None:
    job = job_with(evaluators=2)
    train(dataclasses.replace(job, runtime=toy_job().runtime), toy_graph, tmp_path)
    step = step_of(committed_steps(tmp_path)[-1])
    actors = start_evaluators(job, toy_graph, tmp_path)
    evaluators = RayEvaluators(actors)
    evaluators.begin(step)
    np.testing.assert_array_equal(evaluators.counted(), count_committed(job, toy_graph, tmp_path, step))
    state = next(path for path in (committed_directory(tmp_path, step) / "state").iterdir() if path.suffix == ".distcp")
    state.write_bytes(state.read_bytes()[:-1])
    again = RayEvaluators(actors)
    again.begin(step)
    with pytest.raises(CheckpointError, match=state.name):
        again.counted()
    for actor in actors:
        ray.kill(actor)


@pytest.mark.slow
def test_a_run_with_readers_and_evaluators_equals_one_process(toy_graph: Graph, tmp_path: Path) -> None:
    """Two workers, readers and evaluators; the result counts three steps late in both runs."""
    changes: dict[str, Any] = {
        "train": {"epochs": 6, "validate_every": 1, "validation_lag": 3, "patience": 3},
        "optimizer": {"kind": "adagrad"},
    }  # fmt: skip
    alone = toy_job("transe", **changes, runtime={"threads": 1})
    many = toy_job(
        "transe", **changes, runtime={"threads": 1, "workers": 2, "readers": 2, "evaluators": 2, "memory_gib": 4.0}
    )
    outcome, _ = train(alone, toy_graph, tmp_path / "alone")
    assert train_on_ray(many, toy_graph, tmp_path / "many", "auto")[0] is outcome
    lines = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("alone", "many")
    }
    one, two = ([r for r in lines[name] if r["kind"] == "valid"] for name in ("alone", "many"))
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for left, right in zip(one, two, strict=True):
        assert left["mrr"] == pytest.approx(right["mrr"], abs=0.05)
    assert committed_steps(tmp_path / "alone")[-1].name == committed_steps(tmp_path / "many")[-1].name
    told = [r for r in lines["many"] if r["kind"] == "train"][-1]
    assert set(told["memory_mib"]) == set(told["batch_wait_s"]) == {"0", "1"}
    assert all(0 < mib < 1 for mib in told["sent_mib"].values())
    assert 0 < told["all_to_all_ms"]["0"] <= told["together_ms"]["0"]
    assert sum(told["reader_triples"].values()) >= toy_graph.num_triples["train"] * 6
