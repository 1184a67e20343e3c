"""Ray, for real: a cluster of this machine's own, with tokens, jobs submitted to it as the README says."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from children import wait_for
from toy import toy_job, write_toy_graph

from medscale.checkpoint import committed_steps, open_tables
from medscale.errors import CheckpointError, UnsupportedError
from medscale.graph.reader import open_graph
from medscale.jobfile import dump_job, load_job
from medscale.launch import train_on_ray

BIN = Path(sys.executable).parent
TOKEN = "token-of-this-test"


def write_job(folder: Path, workers: int, name: str = "ring", often: int = 1, **runtime: int) -> Path:
    """Write a job of 120 steps that tells of its course, and saves, every `often` steps or a few more."""
    job = toy_job(
        "complex", name, train={"epochs": 10, "validate_every": 5, "log_every": often}, optimizer={"kind": "adagrad"},
        checkpoint={"every_steps": 3 * often},
        runtime={"workers": workers, "timeout_s": 20, "memory_gib": 4.0, **runtime},
    )  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(dump_job(job), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw triples in data/, and what one worker makes of them in alone/."""
    folder = tmp_path_factory.mktemp("ray")
    write_toy_graph(folder / "data")
    done = train(write_job(folder, 1), folder, "alone")
    assert done.returncode == 0, done.stderr
    return folder


def command(job: Path, folder: Path, runs: str) -> list[str]:
    directories = ["--data-dir", folder / "data", "--runs-dir", folder / runs, "--graphs-dir", folder / "graphs"]
    return ["python", "-m", "medscale.train", *map(str, (job, *directories))]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_ADDRESS": "local", **variables}


def train(job: Path, folder: Path, runs: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command(job, folder, runs)[1:]], env=environment(**variables), capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip


def table(run_directory: Path) -> np.ndarray:  # type: ignore[type-arg]
    return open_tables(committed_steps(run_directory)[-1]).rows().slice(0, 90).numpy()


def records(run_directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def require_same(folder: Path, runs: str) -> None:
    np.testing.assert_allclose(table(folder / runs / "ring"), table(folder / "alone" / "ring"), rtol=1e-3, atol=1e-3)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def head(
    folder: Path, variables: Mapping[str, str], host: str = "127.0.0.1", port: int = 0
) -> Iterator[tuple[str, int]]:
    """Run `ray start --head`; yield (the dashboard's address, the process)."""
    port, dashboard, agent = port or free_port(), free_port(), free_port()
    process = subprocess.Popen(
        [
            "ray", "start", "--head", "--block", "--num-cpus=2", f"--node-ip-address={host}", f"--port={port}",
            f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--disable-usage-stats",
            f"--dashboard-agent-listen-port={agent}",
        ],
        env=environment(**variables), stdout=(folder / "head.log").open("w"), stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while True:  # jobs are handed by the dashboard to the agent
            with (
                contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", dashboard), 1),
                socket.create_connection((host, agent), 1),
            ):  # fmt: skip
                break
            assert time.monotonic() < deadline, (folder / "head.log").read_text()
            assert process.poll() is None, (folder / "head.log").read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{dashboard}", process.pid
    finally:
        # Asked to end it would wait half a minute for its node to be empty.
        kill_with_descendants(process.pid)
        process.wait()


def submit(address: str, submission: list[str], *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Submit a command to the cluster whose dashboard is at `address`, named as users name it."""
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(
            ["ray", "job", "submit", *options, "--", *submission],
            env=environment(**variables, RAY_ADDRESS=address), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        # a cluster that has just begun does not know its own agent yet
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(1)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_job_submitted_to_a_cluster_ends_as_one_worker_would(folder: Path) -> None:
    """As the README has it, and not without the token."""
    job = write_job(folder, 2, often=60)
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with head(folder, variables) as (address, _):
        submission = command(job, folder, "submitted")
        refused = submit(address, submission, **{**variables, "RAY_AUTH_TOKEN": "another"})
        assert refused.returncode != 0
        assert "token" in refused.stdout + refused.stderr
        assert not (folder / "submitted").exists()
        done = submit(address, submission, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 workers with" in done.stdout + done.stderr
    require_same(folder, "submitted")
    one, other = (
        [r["mrr"] for r in records(folder / runs / "ring") if r["kind"] == "valid"] for runs in ("alone", "submitted")
    )
    assert [pytest.approx(mrr, abs=0.05) for mrr in one] == other, "they validate alike"
    assert (folder / "submitted" / "ring" / "export" / "phone" / "manifest.json").exists()
    run = [path.read_bytes() for path in (folder / "submitted").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in data for data in run), "the token stays out of what is kept"
    changed = replace(load_job(job), seed=7)
    with pytest.raises(CheckpointError, match="seed: 0 -> 7"):
        train_on_ray(changed, open_graph(folder / "graphs" / "ring"), folder / "submitted" / "ring", "auto")
    assert not ray.is_initialized(), "no cluster was started to find that out"


def descendants(pid: int) -> list[int]:
    """Return a process's children, and theirs."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            child, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == pid:
                found += [child, *descendants(child)]
    return found


def kill_with_descendants(pid: int) -> None:
    for member in [*descendants(pid), pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def own_address() -> str | None:
    """Return an address of this machine that others could reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # nothing is sent
        return str(probe.getsockname()[0])
    return None


@pytest.mark.slow
def test_a_cluster_that_others_reach_without_a_token_is_refused(folder: Path) -> None:
    host, port = own_address(), free_port()
    if host is None:
        pytest.skip("this machine has no address but its own loopback")
    open_door = {"RAY_AUTH_MODE": "disabled"}
    with head(folder, open_door, host, port):
        refused = train(write_job(folder, 2), folder, "open", **open_door, RAY_ADDRESS=f"{host}:{port}")
    assert refused.returncode == UnsupportedError.exit_code, refused.stderr
    assert host in refused.stderr
    assert "RAY_AUTH_MODE=token" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["step:50:1", "step:50:0", "after-shard:15"])
def test_a_worker_that_dies_is_replaced_and_the_run_ends_as_ever(folder: Path, fault: str) -> None:
    """The new workers count anew, so they die once more before the end."""
    runs = f"killed-{fault.replace(':', '-')}"
    done = train(write_job(folder, 2), folder, runs, MEDSCALE_FAULT=fault)
    assert done.returncode == 0, done.stderr
    assert "going on from step-" in done.stderr
    require_same(folder, runs)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_driver_is_submitted_again_and_a_signal_saves(folder: Path) -> None:
    job = write_job(folder, 2)
    log = folder / "signals" / "ring" / "metrics.jsonl"
    kill, terminate, interrupt = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
    for number, expected in ((kill, -kill), (terminate, 128 + terminate), (interrupt, 128 + interrupt)):
        before = log.read_text(encoding="utf-8").count('"train"') if log.exists() else 0
        process = subprocess.Popen(
            [sys.executable, *command(job, folder, "signals")[1:]], env=environment(), stderr=subprocess.PIPE, text=True
        )
        wait_for(log, f'"step": {before + 8},', seconds=150)
        process.send_signal(number)
        assert process.wait(60) == expected, process.communicate()[1]
        if number != signal.SIGKILL:
            last = max(int(line.split('"step": ')[1].split(",")[0]) for line in log.read_text().splitlines())
            assert committed_steps(folder / "signals" / "ring")[-1].name == f"step-{last:09d}", "nothing is lost"
        time.sleep(10)  # orphans of a killed driver end by themselves
    done = train(job, folder, "signals")
    assert done.returncode == 0, done.stderr
    require_same(folder, "signals")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_cluster_that_dies_whole_gets_the_job_again(folder: Path) -> None:
    """GCS, raylet, driver and workers are killed at once; a new cluster, and the very same submission."""
    job, variables = write_job(folder, 2), {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    log = folder / "headless" / "ring" / "metrics.jsonl"
    submission = command(job, folder, "headless")
    with head(folder, variables) as (address, pid):
        begun = submit(address, submission, "--no-wait", **variables)
        assert begun.returncode == 0, begun.stderr
        wait_for(log, '"step": 10,', seconds=150)
        kill_with_descendants(pid)
    # what was a child of those ends when it misses them
    time.sleep(10)
    with head(folder, variables) as (address, _):
        done = submit(address, submission, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on from step-" in done.stdout + done.stderr
    require_same(folder, "headless")


@pytest.mark.slow
def test_a_cluster_that_is_too_small_is_named(folder: Path) -> None:
    done = train(write_job(folder, 64, "wide"), folder, "wide")
    assert done.returncode == 7
    assert "64" in done.stderr
    assert "CPUs" in done.stderr
