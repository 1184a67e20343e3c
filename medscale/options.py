"""What every command shares: its job and directories on the command line, and how it ends."""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from medscale.errors import ConfigError, GraphError, MedscaleError
from medscale.location import Location, parse_location

if TYPE_CHECKING:
    from medscale.config import Job

__all__ = ["add_directories", "job_parser", "run_command", "run_of"]

#: what the machine, not medscale, refuses: reported in one sentence, without a traceback
_MACHINE_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this machine allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "access is denied",
    errno.EPERM: "it is not permitted",
}


def job_parser(verb: str, description: str, *, or_run: bool = False) -> argparse.ArgumentParser:
    """Return the parser of a verb that takes a job file: `JOB` and the directories; the verb adds its own.

    The parsed arguments hold `job`, `data_dir` and `runs_dir`, each a `Path`, and `graphs_dir`, a `Location`. With
    `or_run`, `job` may also be the directory of a run: `run_of` takes both.
    """
    parser = argparse.ArgumentParser(
        prog=f"medscale {verb}",
        description=description,
        epilog="Job files are explained in jobs/README.md.",
    )
    metavar, words = "JOB", "the job file, such as jobs/quickstart.yaml"
    if or_run:
        metavar, words = "JOB_OR_RUN", f"{words}, or the directory of a run, such as runs/quickstart"
    parser.add_argument("job", metavar=metavar, type=Path, help=words)
    add_directories(parser)
    return parser


def run_of(path: Path, runs_dir: Path) -> tuple["Job", Path]:
    """Return the job and the run directory that a command line names: by a job file, or by the run directory itself.

    Raises:
        ConfigError: the job file is wrong, or a directory holds none.

    """
    from medscale.jobfile import load_job  # `doctor` shares this module, and runs where YAML is missing

    if not path.is_dir():
        job = load_job(path)
        return job, runs_dir / job.name
    if not (path / "job.yaml").is_file():
        raise ConfigError([f"{path}: holds no job.yaml; allowed: a job file, or the directory of a run"])
    return load_job(path / "job.yaml"), path


def add_directories(parser: argparse.ArgumentParser) -> None:
    """Add `--data-dir`, `--runs-dir` and `--graphs-dir` to a parser."""
    group = parser.add_argument_group("directories")
    group.add_argument(
        "--data-dir",
        type=_directory,
        default=Path(os.environ.get("MEDSCALE_DATA_DIR") or "data"),
        metavar="DIR",
        help="data root that the job's files are relative to (default: $MEDSCALE_DATA_DIR, else data)",
    )
    group.add_argument(
        "--runs-dir",
        type=_directory,
        default=Path("runs"),
        metavar="DIR",
        help="holds run directories (default: runs)",
    )
    group.add_argument(
        "--graphs-dir",
        type=_location,
        default=Path("graphs"),
        metavar="DIR|URI",
        help="holds prepared graphs: a directory, or the URI of one, such as s3://bucket/graphs (default: graphs)",
    )


def _location(text: str) -> Location:
    try:
        return parse_location(text)
    except GraphError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _directory(text: str) -> Path:
    location = _location(text)
    if isinstance(location, Path):
        return location
    raise argparse.ArgumentTypeError(
        f"{location} is no directory, and only --graphs-dir takes a URI: runs are committed by renaming, which object "
        "stores cannot do; name a directory that all nodes see"
    )


def run_command(function: Callable[[], int | None]) -> int:
    """Run a command's body and return the process's exit code.

    A `MedscaleError` becomes its message on stderr and its own code, Ctrl-C 130, a reader of our output that
    left (`| head`) 141, a full or forbidden disk 1. Anything else is a bug of ours and keeps its traceback.
    """
    try:
        return function() or 0
    except MedscaleError as error:
        print(_one_clear_message(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("medscale: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in _MACHINE_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"medscale: {where}{_MACHINE_ERRORS[error.errno]} ({error.strerror})", file=sys.stderr)
        return 1


def _one_clear_message(error: MedscaleError) -> str:
    lines = str(error).splitlines()
    if len(lines) < 2:
        return f"medscale: {error}"
    return "\n".join([f"medscale: {len(lines)} problems", *(f"  {line}" for line in lines)])
