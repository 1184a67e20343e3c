"""Checks of this machine and its libraries, each with how to repair it: `python -m medscale.doctor`."""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from rich.markup import escape
from rich.table import Table

from medscale.errors import UnsupportedError
from medscale.location import Location, RemotePath
from medscale.logs import console
from medscale.options import add_directories, run_command

__all__ = ["Check", "check_all", "main"]

Status = Literal["ok", "warning", "problem"]

SETUP = "set up again: rm -r .venv, then source tools/setup.sh"
#: what must be there, beside torch, torchrec and FBGEMM
LIBRARIES = ("numpy", "pyarrow", "ray", "duckdb", "PyYAML", "rich", "tensorboard")
#: releases of FBGEMM and torchrec, and the torch that each was built for and tried with
PAIRS = {"1.8": "2.13", "1.6": "2.11"}
BOUNDS_CHECK = "FBGEMM_TBE_BOUNDS_CHECK_MODE"
RAY_HOW = "not needed for one process; start a cluster with: ray start --head"
GIB = 1 << 30


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    #: what was found
    found: str
    #: how to repair it; empty where there is nothing to do
    repair: str = ""


def check_all(data_dir: Path, runs_dir: Path, graphs_dir: Location) -> list[Check]:
    """Run every check; none raises, whatever is missing or broken, and none starts a service."""
    versions = installed_versions()
    return [
        check_python(sys.version_info[:2]),
        *check_libraries(versions),
        check_pair(versions),
        check_builds(versions),
        _guarded("CPU", check_cpu),
        _guarded("memory", check_memory),
        _guarded("GPU", check_gpu),
        check_bounds_variable(os.environ),
        _guarded("FBGEMM look-up", check_lookup),
        _guarded("CPU kernels", check_kernels),
        _guarded("Ray", lambda: check_ray(os.environ)),
        check_readable("data root", data_dir),
        check_writable("graphs", graphs_dir),
        check_writable("runs", runs_dir),
    ]


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """Run a check that calls into libraries; whatever they raise is its finding."""
    try:
        return check()
    except Exception as cause:
        return Check(name, "problem", f"{type(cause).__name__}: {cause}".splitlines()[0], SETUP)


def installed_versions() -> dict[str, str]:
    """Return the version of every installed distribution, by its name in lower case with dashes."""
    found = ((d.metadata["Name"], d.version) for d in importlib.metadata.distributions())
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found if name}


def check_python(version: tuple[int, ...]) -> Check:
    """Check the interpreter's version against the one medscale is made for."""
    found = ".".join(map(str, version))
    if (3, 11) <= version < (3, 13):
        return Check("python", "ok", found)
    return Check("python", "problem", found, "medscale needs Python 3.11 or 3.12: MEDSCALE_PYTHON=python3.11")


def check_libraries(versions: Mapping[str, str]) -> Iterator[Check]:
    """Yield one check per library that must be there."""
    for name in ("torch", "torchrec", *LIBRARIES):
        version = versions.get(name.lower())
        yield Check(name, "ok", version) if version else Check(name, "problem", "not installed", SETUP)


def check_pair(versions: Mapping[str, str]) -> Check:
    """Check that torch, torchrec and FBGEMM come from releases that were made for each other."""
    fbgemm = versions.get("fbgemm-gpu-cpu") or versions.get("fbgemm-gpu")
    found = {"torch": versions.get("torch"), "torchrec": versions.get("torchrec"), "fbgemm": fbgemm}
    text = ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())
    releases = {name: _release(version) for name, version in found.items() if version}
    if len(releases) < len(found) or releases["torchrec"] != releases["fbgemm"]:
        return Check("versions that match", "problem", text, f"torchrec and FBGEMM must be equal; {SETUP}")
    made_for = PAIRS.get(releases["fbgemm"])
    if made_for is None:
        known = "; ".join(f"FBGEMM and torchrec {a} with torch {b}" for a, b in PAIRS.items())
        return Check("versions that match", "warning", text, f"not tried; known to work: {known}")
    if made_for != releases["torch"]:
        needed = f"FBGEMM and torchrec {releases['fbgemm']} need torch {made_for}"
        return Check("versions that match", "problem", text, f"{needed}; {SETUP}")
    return Check("versions that match", "ok", text)


def _release(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def check_builds(versions: Mapping[str, str]) -> Check:
    """Check that one build of FBGEMM is installed, and that torch is of the same kind."""
    name = "one FBGEMM build"
    cpu, named = versions.get("fbgemm-gpu-cpu"), versions.get("fbgemm-gpu")
    if cpu is None and named is None:
        return Check(name, "problem", "not installed", SETUP)
    # PyTorch's own index has the CPU build as fbgemm-gpu ...+cpu; elsewhere that name is our empty one.
    is_cuda = named is not None and not named.endswith("+cpu")
    if cpu is not None and is_cuda:
        found = f"fbgemm-gpu {named} and fbgemm-gpu-cpu {cpu}"
        return Check(name, "problem", found, f"they own the same folder and break each other; {SETUP}")
    if is_cuda and versions.get("torch", "").endswith("+cpu"):
        return Check(name, "problem", "FBGEMM for CUDA, torch for CPU", SETUP)
    return Check(name, "ok", "CUDA" if is_cuda else "CPU")


def check_cpu() -> Check:
    """Report the threads that this process may use."""
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    limit = _cgroup_number("cpu.max")
    found = f"{usable} threads usable of {present}"
    return Check("CPU", "ok", f"{found}, limited to {limit:g} by the container" if limit else found)


def check_memory() -> Check:
    """Report the memory that is free, and the container's limit."""
    meminfo = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii")))
    total, free = (int(meminfo[key]) * 1024 for key in ("MemTotal", "MemAvailable"))
    limit = _cgroup_number("memory.max")
    found = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    found += f", limited to {limit / GIB:.1f} by the container" if limit else ""
    if min(free, limit or free) < 2 * GIB:
        return Check("memory", "warning", found, "small graphs only; `medscale plan JOB` says what a job needs")
    return Check("memory", "ok", found)


def _cgroup_number(name: str) -> float | None:
    """Return a limit of the control group (version 2) in bytes or CPUs; None where there is none."""
    try:
        first, *period = (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").split()
    except OSError:
        return None
    return None if first == "max" else float(first) / float(period[0] if period else 1)


def check_gpu() -> Check:
    """List the GPUs that torch can use; tell when there are some that it cannot."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        properties = [torch.cuda.get_device_properties(i) for i in range(count)]
        found = ", ".join(f"{p.name} ({p.total_memory / GIB:.0f} GiB)" for p in properties)
        return Check("GPU", "ok", found)
    if _nvidia_gpus():
        found = f"there is one, but torch {torch.__version__} cannot use it"
        return Check("GPU", "warning", found, f"for the CUDA builds: {SETUP}; see also nvidia-smi")
    return Check("GPU", "ok", "none: jobs run on the CPU")


def _nvidia_gpus() -> list[str]:
    """Return a line per GPU that the driver knows, as tools/setup.sh asks for them."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def check_bounds_variable(environment: Mapping[str, str]) -> Check:
    """Check that nothing overrides the bounds check, without which a wrong id trains row 0."""
    value = environment.get(BOUNDS_CHECK)
    if value is None:
        return Check("bounds check", "ok", "not overridden")
    return Check("bounds check", "problem", f"{BOUNDS_CHECK}={value}", f"unset {BOUNDS_CHECK}")


def check_lookup() -> Check:
    """Look rows up in a tiny fused FBGEMM table on the CPU, update them, and compare."""
    import torch
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(4, 8, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.5,
    )
    weights = table.split_embedding_weights()[0]
    weights.copy_(torch.arange(32.0).view(4, 8))
    before = weights.clone()
    rows = table(torch.tensor([2, 0]), torch.tensor([0, 1, 2]))
    right = bool(torch.equal(rows, before[[2, 0]]))
    rows.sum().backward()
    moved = (weights != before).any(1).tolist()
    if right and moved == [True, False, True, False]:
        return Check("FBGEMM look-up", "ok", "rows are read and updated")
    return Check("FBGEMM look-up", "problem", f"wrong rows (read {right}, moved {moved})", SETUP)


def check_kernels() -> Check:
    """Compile the CPU kernels, or find them compiled, and add two rows with them."""
    import torch

    from medscale.model.kernels.cpu_pairs import add_rows

    repair = "install g++, or name a C++ compiler in CXX; without one: runtime.kernels: torch, which is slower"
    rows = torch.zeros(2, 3)
    try:
        add_rows(torch.ones(3, 3), torch.tensor([0, 1, 1]), rows)
    except UnsupportedError as error:
        return Check("CPU kernels", "problem", str(error).splitlines()[0], repair)
    if rows.tolist() == [[1.0] * 3, [2.0] * 3]:
        return Check("CPU kernels", "ok", "compiled for this processor")
    return Check("CPU kernels", "problem", f"wrong sums {rows.tolist()}", repair)


def check_ray(environment: Mapping[str, str]) -> Check:
    """Say whether a Ray cluster answers; none is fine, since one process needs none."""
    asked = environment.get("RAY_ADDRESS", "")
    recorded = Path(environment.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    address = asked if asked not in ("", "auto", "local") else _first_line(recorded)
    if not address:
        return Check("Ray", "ok", f"no cluster found; {RAY_HOW}")
    if _answers(address):
        return Check("Ray", "ok", f"a cluster answers at {address}")
    if asked:
        return Check("Ray", "warning", f"RAY_ADDRESS={asked} does not answer", f"unset it, or: {RAY_HOW}")
    return Check("Ray", "ok", f"the last cluster ({address}) is gone; {RAY_HOW}")


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _answers(address: str, timeout: float = 0.5) -> bool:
    """Whether something accepts connections at `host:port`, `ray://host:port` or `http://host:port`."""
    parts = urlsplit(address if "//" in address else f"//{address}")
    try:
        if not parts.hostname or not parts.port:
            return False
        with socket.create_connection((parts.hostname, parts.port), timeout):
            return True
    except (OSError, ValueError):
        return False


def check_readable(name: str, directory: Path) -> Check:
    """Check that raw files could be read from a directory."""
    if not directory.is_dir():
        repair = "name it with --data-dir or MEDSCALE_DATA_DIR; jobs with a generated graph need none"
        return Check(name, "warning", f"{directory} is not a directory", repair)
    if not os.access(directory, os.R_OK | os.X_OK):
        return Check(name, "problem", f"{directory} cannot be read", f"chmod u+rx {directory}")
    return Check(name, "ok", f"{directory} ({sum(1 for _ in directory.iterdir())} entries)")


def check_writable(name: str, directory: Location) -> Check:
    """Check, by writing, that a directory or the nearest one above it takes files; tell the free space.

    One behind a URI is listed, and made where it is not there; a read-only one is enough to train on its graphs.
    """
    if isinstance(directory, RemotePath):
        return _check_remote(name, directory)
    existing = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".medscale-doctor-") as file:
            file.write(b"x")
            file.flush()
    except OSError as cause:
        repair = f"name another with --{name}-dir, or make {existing} writable"
        return Check(name, "problem", f"{existing}: {cause.strerror}", repair)
    free = shutil.disk_usage(existing).free
    made = "" if existing == directory.absolute() else " (will be made)"
    found = f"{directory}{made}, {free / GIB:.1f} GiB free"
    if free < GIB:
        return Check(name, "warning", found, "make room; `medscale plan JOB` says what a job will write")
    return Check(name, "ok", found)


def _check_remote(name: str, directory: RemotePath) -> Check:
    try:
        directory.sizes()
    except (OSError, ValueError) as cause:
        repair = f"name another with --{name}-dir, or set the environment that reaches it (AWS_ACCESS_KEY_ID, ...)"
        return Check(name, "problem", f"{directory} cannot be reached: {cause}", repair)
    try:
        directory.mkdir()
    except (OSError, ValueError) as cause:
        return Check(name, "warning", f"{directory} is read-only: {cause}", "graphs can be read, not prepared there")
    return Check(name, "ok", f"{directory}, can be written")


def _table(checks: Sequence[Check]) -> Table:
    table = Table(title="medscale doctor", show_lines=False)
    for heading in ("check", "status", "found", "how to repair"):
        table.add_column(heading, overflow="fold")
    colours = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    for check in checks:
        status = f"[{colours[check.status]}]{check.status}[/]"
        table.add_row(check.name, status, escape(check.found), escape(check.repair))
    return table


def _run(arguments: argparse.Namespace) -> int:
    checks = check_all(arguments.data_dir, arguments.runs_dir, arguments.graphs_dir)
    if arguments.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        console().print(_table(checks))
    problems = sum(check.status == "problem" for check in checks)
    if problems:
        raise UnsupportedError(f"{problems} of {len(checks)} checks found a problem")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 where no check found a problem."""
    parser = argparse.ArgumentParser(
        prog="medscale doctor",
        description="Check this machine and its libraries, and say how to repair what is wrong. "
        "Ends with 0 where nothing is a problem; warnings are none.",
    )
    parser.add_argument("--json", action="store_true", help="print the checks as JSON instead of a table")
    add_directories(parser)
    arguments = parser.parse_args(argv)
    return run_command(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())
