"""Tasks on a real Ray cluster of this machine's own: the same graph as in one process, and errors that arrive whole."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_ingest import fingerprint, in_pieces, many, tsv, write

from medscale import cluster as cluster_module
from medscale.cluster import HERE, Tasks, cluster
from medscale.config import GraphSection, SyntheticSection
from medscale.errors import GraphError, MedscaleError, UnsupportedError, WorkerError
from medscale.graph import ingest as ingest_module
from medscale.graph.ingest import ingest
from medscale.graph.reader import Graph
from medscale.graph.shuffle import HashRange, Shuffled, shuffle
from medscale.graph.spill import spilled
from medscale.graph.synthetic import write_raw
from medscale.logs import Advance


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "local")
        # Tasks import what this module defines.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        with cluster():
            yield


def build(root: Path, directory: Path, tasks: int, memory_mib: int = 128) -> Graph:
    section = GraphSection(
        train=("part-*.tsv",), valid_fraction=0.1, test_fraction=0.1, entity_types="kinds.csv", tasks=tasks,
        memory_mib=memory_mib,
    )  # fmt: skip
    return ingest(section, name="toy", seed=3, data_root=root, directory=directory)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("raw")
    in_pieces(root, many(6_000), 9)
    write(root / "kinds.csv", b"".join(b"e%d,kind,%s\n" % (i, b"odd" if i % 2 else b"even") for i in range(350)))
    return root


@pytest.fixture(scope="module")
def alone(raw: Path) -> Graph:
    return build(raw, raw / "alone", 1)


@pytest.mark.parametrize("tasks", [2, 3])
def test_any_number_of_tasks_builds_the_same_graph(raw: Path, alone: Graph, tmp_path: Path, tasks: int) -> None:
    graph = build(raw, tmp_path / "graphs" / "toy", tasks, memory_mib=1)
    assert fingerprint(graph) == fingerprint(alone)
    assert graph.sha256 == alone.sha256
    assert [path.name for path in (tmp_path / "graphs").iterdir()] == ["toy"]


def test_generated_files_are_the_same(tmp_path: Path) -> None:
    section = SyntheticSection(num_users=300, num_triples=5_000, part_triples=1_500)
    done: list[int] = []
    for tasks in (HERE, Tasks(3, tmp_path)):
        write_raw(section, 0, tmp_path / str(tasks.number), done.append, tasks)
    assert sum(done) == 10_000
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.parquet")} for name in "13"]
    assert files[0] == files[1]
    assert len(files[0]) == 4 + 9


def test_an_error_in_a_task_names_file_and_line(raw: Path, tmp_path: Path) -> None:
    in_pieces(tmp_path, many(6_000), 9)
    write(tmp_path / "kinds.csv", b"e1,kind\n")
    write(tmp_path / "part-05.tsv", tsv(many(20)) + b"a\tr\n")
    with pytest.raises(GraphError, match=r"part-05\.tsv:21: 2 fields where 3 are expected"):
        build(tmp_path, tmp_path / "graphs" / "toy", 2)
    assert list((tmp_path / "graphs").iterdir()) == []


def full_disk(path: Path, advance: Advance) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_an_error_of_the_machine_keeps_its_number(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        Tasks(2, tmp_path).run(full_disk, [Path("x")], lambda count: None)
    assert caught.value.errno == errno.ENOSPC


def sees_nothing(one: HashRange, advance: Advance) -> tuple[Shuffled, ...]:
    """As on a node that has another disk."""
    spilled(one.sources[0].with_name("elsewhere"))
    raise AssertionError


def test_a_node_that_does_not_see_the_files_is_an_error(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_module, "shuffle", sees_nothing)
    with pytest.raises(GraphError, match=r"a task does not see a file .*elsewhere.*; all nodes of the cluster must"):
        build(raw, tmp_path / "graphs" / "toy", 2)
    assert list((tmp_path / "graphs").iterdir()) == []


def dies_once(one: HashRange, advance: Advance) -> tuple[Shuffled, ...]:
    """Shuffle; the first process to come here is killed when it has written everything."""
    result = shuffle(one, advance)
    marker = one.sources[0].parents[3] / "died"
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return result


def dies_always(one: HashRange, advance: Advance) -> tuple[Shuffled, ...]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_killed_task_is_run_again(raw: Path, alone: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_module, "shuffle", dies_once)
    graph = build(raw, tmp_path / "graphs" / "toy", 2)
    assert (tmp_path / "died").exists()
    assert graph.sha256 == alone.sha256


@pytest.mark.slow
def test_a_task_that_dies_each_time_leaves_nothing(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_module, "shuffle", dies_always)
    monkeypatch.setattr(cluster_module, "MAX_RETRIES", 1)
    with pytest.raises(WorkerError, match=r"a task of Ray \(dies_always\) died 2 times"):
        build(raw, tmp_path / "graphs" / "toy", 2, memory_mib=1)
    assert list((tmp_path / "graphs").iterdir()) == []


def slow(started: Path, advance: Advance) -> None:
    """Fail where there is a file already; else make one, and go on for minutes."""
    if started.exists():
        raise MedscaleError("the second")
    started.touch()
    for _ in range(3_000):
        time.sleep(0.1)
        advance(1)


def test_an_error_ends_the_other_tasks(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(MedscaleError, match="the second"):
        Tasks(2, tmp_path).run(slow, [tmp_path / "started"] * 3, lambda count: None)
    assert time.monotonic() - begin < 60


def test_results_come_in_the_order_of_the_items(tmp_path: Path) -> None:
    done: list[int] = []
    assert Tasks(3, tmp_path).run(doubled, list(range(20)), done.append) == list(range(0, 40, 2))
    assert sum(done) == 20
    assert Tasks(3, tmp_path).run(doubled, [], done.append) == []


def doubled(number: int, advance: Advance) -> int:
    advance(1)
    return 2 * number


def test_one_task_does_without_ray(raw: Path, tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from medscale.config import GraphSection
from medscale.graph.ingest import ingest
section, directory = GraphSection(train=("part-*.tsv",)), Path({str(tmp_path / "toy")!r})
ingest(section, name="toy", seed=0, data_root=Path({str(raw)!r}), directory=directory)
assert "ray" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_address_of_a_cluster_that_was_killed_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert cluster_module._address() == "local", "there is none"
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        assert cluster_module._address() == address
    assert cluster_module._address() == "local", "nobody listens there any more"
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster_module._address() is None, "the environment's word counts"
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(UnsupportedError, match=r"RAY_ADDRESS=http://127\.0\.0\.1:8265 is for `ray job submit`"):
        cluster_module._address()
