"""Files that survive: atomic writes, fsync in the right order, names that stay inside, one writer a directory.

Commit order everywhere: write `NAME.tmp/*`, fsync each file, fsync the directory, rename, fsync the parent.
A crash leaves either nothing, or something whose name ends in `.tmp` or `.trash` and may be deleted.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, overload

from medscale.errors import MedscaleError, RunLockedError
from medscale.location import Location, RemotePath

__all__ = [
    "TMP",
    "commit_directory",
    "fault_point",
    "fsync_directory",
    "retire_directory",
    "run_lock",
    "safe_join",
    "sha256_of",
    "staging_directory",
    "sweep_leftovers",
    "write_atomic",
    "write_json",
]

#: what is not yet committed is named so
TMP = ".tmp"
TRASH = ".trash"

#: `.metadata` is the index that torch.distributed.checkpoint writes; no other name may be hidden
_SAFE_NAME = re.compile(r"\.metadata|[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")

#: Where tests may kill the process; `MEDSCALE_FAULT=point:count[:rank]` does it the count-th time a worker (that of
#: the rank, which launchers tell in `RANK`) passes the point.
FAULT_POINTS = ("after-shard", "before-manifest", "before-rename", "after-rename", "during-retire", "step")
_fault_counts: dict[str, int] = {}


def fault_point(point: str) -> None:
    """Kill this process (SIGKILL) where a test asked for it through `MEDSCALE_FAULT`; else do nothing."""
    assert point in FAULT_POINTS, point
    wanted = os.environ.get("MEDSCALE_FAULT")
    if not wanted:
        return
    name, count, rank, *_ = [*wanted.split(":"), "", ""]
    if name == point and rank in ("", os.environ.get("RANK", "0")):
        _fault_counts[point] = _fault_counts.get(point, 0) + 1
        if _fault_counts[point] == int(count or 1):
            os.kill(os.getpid(), 9)


@overload
def safe_join(root: Path, name: str) -> Path: ...
@overload
def safe_join(root: Location, name: str) -> Location: ...
def safe_join(root: Location, name: str) -> Location:
    """Join a name that came from a file to `root`; parts of `[A-Za-z0-9._-]`, no leading dot, nothing outside.

    Raises:
        MedscaleError: the name is absolute, hidden, too long, or leads out of `root`, links included.

    """
    parts = name.split("/")
    if not parts or not all(_SAFE_NAME.fullmatch(part) for part in parts) or len(parts) > 4:
        raise MedscaleError(f"{root}: refused file name {name!r} (allowed: letters, digits, '.', '_', '-')")
    if isinstance(root, RemotePath):
        return root / name  # object stores have no links
    path = root.joinpath(*parts)
    if not path.resolve().is_relative_to(root.resolve()):
        raise MedscaleError(f"{root}: refused file name {name!r}: it leads out of the directory")
    return path


def sha256_of(path: Location) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file as a whole: readers see the old bytes or the new, also after a power loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}{TMP}")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    fsync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: sorted where order has no meaning, one trailing newline, NaN refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


@contextlib.contextmanager
def staging_directory(final: Path) -> Iterator[Path]:
    """Yield an empty `final.tmp` to fill; remove it when the block fails. `commit_directory` publishes it."""
    draft = final.with_name(final.name + TMP)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def commit_directory(draft: Path, final: Path) -> None:
    """Make `draft` durable and give it its final name, which must not exist yet."""
    for path in sorted(draft.rglob("*")):
        if path.is_file():
            _fsync_file(path)
        elif path.is_dir():
            fsync_directory(path)
    fsync_directory(draft)
    fault_point("before-rename")
    draft.rename(final)
    fsync_directory(final.parent)
    fault_point("after-rename")


def retire_directory(path: Path) -> None:
    """Delete a directory so that a crash in between leaves only a `.trash`, never half a directory.

    Raises:
        OSError: it could not be deleted; callers decide whether that matters.

    """
    trash = path.with_name(path.name + TRASH)
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    fault_point("during-retire")
    shutil.rmtree(trash)


def sweep_leftovers(directory: Path) -> list[str]:
    """Remove what a crash left in `directory` (`*.tmp`, `*.trash`) and return the names."""
    if not directory.is_dir():
        return []
    leftovers = [p for p in sorted(directory.iterdir()) if p.name.endswith((TMP, TRASH)) and not p.is_symlink()]
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in leftovers]


@contextlib.contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Hold the one writer's lock of a directory; the kernel frees it however the process ends.

    Raises:
        RunLockedError: someone else holds it; names host, process and since when.

    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "writer.lock"
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            file.seek(0)
            holder = file.read().strip() or "a process that has not yet written its name"
            raise RunLockedError(
                f"{directory} is being written by {holder}; wait for it, stop it, or give this job another name"
            ) from None
        file.truncate(0)
        file.write(f"host {socket.gethostname()}, pid {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield
