"""The doctor: each repair is offered for the fault it is for; a healthy machine has no problem."""

import json
import os
import socket
from pathlib import Path

import pytest

from medscale import doctor

#: a healthy CPU installation
CPU = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0+cpu", "fbgemm-gpu-cpu": "1.8.0"}
CUDA = {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"}


def test_this_machine_has_no_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directories = [f"--{name}-dir={tmp_path / name}" for name in ("data", "runs", "graphs")]
    assert doctor.main(["--json", *directories]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert {
        "torch",
        "torchrec",
        "ray",
        "duckdb",
        "Ray",
        "memory",
        "GPU",
        "runs",
    } <= checks.keys()
    assert checks["FBGEMM look-up"] == {
        "name": "FBGEMM look-up", "status": "ok", "found": "rows are read and updated", "repair": "",
    }  # fmt: skip
    assert checks["data root"]["status"] == "warning"
    assert "--data-dir" in checks["data root"]["repair"]
    assert list(tmp_path.iterdir()) == [], "the doctor leaves nothing behind"


def test_table_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([f"--data-dir={tmp_path}", f"--runs-dir={tmp_path}", f"--graphs-dir={tmp_path}"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("medscale doctor", "how to repair", "one FBGEMM build"))


def test_problem_gives_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(doctor.BOUNDS_CHECK, "1")
    monkeypatch.setenv("COLUMNS", "250")
    assert doctor.main([f"--{name}-dir={tmp_path}" for name in ("data", "runs", "graphs")]) == 9
    assert "unset FBGEMM_TBE_BOUNDS_CHECK_MODE" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10), "problem"), ((3, 11), "ok"), ((3, 12), "ok"), ((3, 13), "problem")]
)
def test_python(version: tuple[int, int], status: str) -> None:
    assert doctor.check_python(version).status == status


@pytest.mark.parametrize(
    ("versions", "status"),
    [
        (CPU, "ok"),
        (CUDA, "ok"),
        ({"torch": "2.11.1", "torchrec": "1.6.0", "fbgemm-gpu": "1.6.0"}, "ok"),
        (CPU | {"torch": "2.11.0+cpu"}, "problem"),
        (CPU | {"fbgemm-gpu-cpu": "1.6.0"}, "problem"),
        ({"torch": "2.13.0"}, "problem"),
        ({"torch": "2.12.0", "torchrec": "1.7.0", "fbgemm-gpu": "1.7.0"}, "warning"),
    ],
)
def test_matching_versions(versions: dict[str, str], status: str) -> None:
    check = doctor.check_pair(versions)
    assert check.status == status
    assert bool(check.repair) == (status != "ok")


@pytest.mark.parametrize(
    ("versions", "status"),
    [
        (CPU, "ok"),
        (CUDA, "ok"),
        (CPU | {"fbgemm-gpu": "1.9.0"}, "problem"),
        (CUDA | {"torch": "2.13.0+cpu"}, "problem"),
        ({"torch": "2.13.0+cpu", "fbgemm-gpu": "1.8.0+cpu"}, "ok"),
        ({"torch": "2.13.0+cpu"}, "problem"),
    ],
)
def test_one_build(versions: dict[str, str], status: str) -> None:
    assert doctor.check_builds(versions).status == status


def test_missing_library() -> None:
    checks = {check.name: check for check in doctor.check_libraries(CPU)}
    assert checks["torch"].status == "ok"
    assert checks["duckdb"].status == "problem"
    assert "tools/setup.sh" in checks["duckdb"].repair


def test_a_check_that_raises_is_a_problem() -> None:
    def broken() -> doctor.Check:
        raise ImportError("undefined symbol: _ZN3c10\nsecond line")

    check = doctor._guarded("FBGEMM look-up", broken)
    assert (check.status, check.found) == ("problem", "ImportError: undefined symbol: _ZN3c10")


def test_ray_is_never_a_problem(tmp_path: Path) -> None:
    place = {"RAY_TMPDIR": str(tmp_path)}
    assert "ray start --head" in doctor.check_ray(place).found
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        for asked in (address, f"ray://{address}", f"http://{address}"):
            assert "answers" in doctor.check_ray({"RAY_ADDRESS": asked}).found
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(address + "\n")
        assert "answers" in doctor.check_ray(place).found
        assert "answers" in doctor.check_ray(place | {"RAY_ADDRESS": "auto"}).found
    assert "is gone" in doctor.check_ray(place).found
    for asked in (address, "nonsense", "a:b:c", "host:99999999"):
        assert doctor.check_ray({"RAY_ADDRESS": asked}).status == "warning"


def test_directories(tmp_path: Path) -> None:
    assert doctor.check_readable("data root", tmp_path).status == "ok"
    assert "will be made" in doctor.check_writable("runs", tmp_path / "a" / "b").found
    file = tmp_path / "file"
    file.touch()
    assert doctor.check_writable("runs", file / "runs").status == "problem"
    assert doctor.check_writable("runs", Path("/proc/runs")).status == "problem"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write anything")
def test_forbidden_directories(tmp_path: Path) -> None:
    tmp_path.chmod(0o000)
    try:
        assert doctor.check_readable("data root", tmp_path).status == "problem"
        assert doctor.check_writable("runs", tmp_path).status == "problem"
    finally:
        tmp_path.chmod(0o700)
