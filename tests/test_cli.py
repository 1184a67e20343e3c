"""The command line: verbs, help, exit codes, and one clear message instead of a traceback."""

import errno
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from medscale import cli, errors
from medscale.jobfile import dump_job
from medscale.options import job_parser, run_command, run_of

ROOT = Path(__file__).resolve().parents[1]
MEDSCALE = str(Path(sys.executable).with_name("medscale"))
each_verb = pytest.mark.parametrize("verb", cli.VERBS)


def run(*command: str, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)


def test_help_lists_every_verb_and_imports_no_torch() -> None:
    code = "import sys, medscale.cli as c; c.main(['--help']); sys.exit('torch' in sys.modules)"
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"^  {verb} ", done.stdout, re.MULTILINE) for verb in cli.VERBS)


@pytest.mark.parametrize(
    ("arguments", "code", "stream", "wanted"),
    [
        ([], 2, "stdout", "usage: medscale VERB"),
        (["--version"], 0, "stdout", "medscale 0"),
        (["tarin"], 2, "stderr", "'tarin' is not a verb; allowed: prepare"),
    ],
)
def test_console_script(arguments: list[str], code: int, stream: str, wanted: str) -> None:
    done = run(MEDSCALE, *arguments)
    assert done.returncode == code
    assert wanted in getattr(done, stream)


@each_verb
def test_help_of_each_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.util.find_spec(f"medscale.{verb}"), f"medscale.{verb} is listed and missing"
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: medscale {verb} ")
    own = ("TIER", "QUERIES", "--out") if verb == "predict" else ("--data-dir", "--runs-dir", "--graphs-dir")
    assert all(option in text for option in own)


def test_verb_is_its_module() -> None:
    by_script, by_module = (
        run(MEDSCALE, "doctor", "--help"),
        run(sys.executable, "-m", "medscale.doctor", "--help"),
    )
    assert by_script.returncode == by_module.returncode == 0
    assert by_script.stdout == by_module.stdout


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb not in ("doctor", "predict")])
def test_a_wrong_job_ends_each_verb_with_all_its_problems(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(
        "name: wrong\nseed: -1\ngraph: {train: [a.tsv]}\nmodel: {scorer: transe, dims: [2], tiers: {a: 3}}\n"
    )
    directories = [f"--{name}-dir={tmp_path / name}" for name in ("data", "runs", "graphs")]
    assert cli.main([verb, str(path), *directories]) == errors.ConfigError.exit_code
    message = capsys.readouterr().err
    for line in (
        f"{path}:1: train: is missing",
        f"{path}:2: seed: -1 is too small",
        f"{path}:4: model.tiers.a: 3 is not",
    ):
        assert line in message
    assert list(tmp_path.iterdir()) == [path]


def failing(error: BaseException) -> Callable[[], int]:
    def body() -> int:
        raise error

    return body


@pytest.mark.parametrize("error", errors.MedscaleError.__subclasses__(), ids=lambda error: error.__name__)
def test_typed_errors_end_with_their_own_code(
    error: type[errors.MedscaleError], capsys: pytest.CaptureFixture[str]
) -> None:
    instance = errors.ConfigError(["toy.yaml:1: x"]) if error is errors.ConfigError else error("toy.yaml:1: x")
    assert run_command(failing(instance)) == error.exit_code
    assert capsys.readouterr().err == "medscale: toy.yaml:1: x\n"


def test_exit_codes_are_distinct() -> None:
    codes = [error.exit_code for error in (errors.MedscaleError, *errors.MedscaleError.__subclasses__())]
    assert len(set(codes)) == len(codes)


def test_other_endings(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: None) == 0
    assert run_command(lambda: 143) == 143
    assert run_command(failing(KeyboardInterrupt())) == 130
    assert run_command(failing(OSError(errno.ENOSPC, "No space left", "/tmp/x"))) == 1
    assert "medscale: /tmp/x: the disk is full (No space left)\n" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        run_command(failing(ZeroDivisionError()))
    with pytest.raises(OSError, match="unforeseen"):
        run_command(failing(OSError(errno.EIO, "unforeseen")))


def test_reader_that_leaves_ends_quietly() -> None:
    code = (
        "import sys; from medscale.options import run_command\n"
        "def body():\n    for i in range(10**6): print(i)\n"
        "sys.exit(run_command(body))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 141


def test_directories_default_to_the_variable_and_to_plain_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDSCALE_DATA_DIR", raising=False)
    plain = job_parser("train", "x").parse_args(["a.yaml"])
    assert (plain.job, plain.data_dir) == (Path("a.yaml"), Path("data"))
    assert (plain.runs_dir, plain.graphs_dir) == (Path("runs"), Path("graphs"))
    monkeypatch.setenv("MEDSCALE_DATA_DIR", "/somewhere")
    assert job_parser("train", "x").parse_args(["a.yaml"]).data_dir == Path("/somewhere")
    assert job_parser("train", "x").parse_args(["a.yaml", "--data-dir", "b"]).data_dir == Path("b")


def test_a_run_is_named_by_its_job_or_by_its_directory(tmp_path: Path) -> None:
    job, directory = run_of(ROOT / "jobs" / "umls.yaml", tmp_path)
    assert (job.name, directory) == ("umls", tmp_path / "umls")
    elsewhere = tmp_path / "copied" / "under another name"
    elsewhere.mkdir(parents=True)
    with pytest.raises(errors.ConfigError, match=r"under another name: holds no job.yaml; allowed: a job file, or"):
        run_of(elsewhere, tmp_path)
    (elsewhere / "job.yaml").write_text(dump_job(job))
    assert run_of(elsewhere, tmp_path) == (job, elsewhere)
    with pytest.raises(errors.ConfigError, match="cannot be read"):
        run_of(tmp_path / "nowhere.yaml", tmp_path)
