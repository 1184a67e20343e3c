"""Whether a tier's bytes are those of its manifest, asked always, never, or once for files that stay as they are.

`once` keeps a note beside the files, `.verified`: the SHA-256 of the manifest, and size, time of change and inode of
each file that was read. A file is read again where any of them differs. The note is a matter of speed: where it cannot
be written, or is damaged, everything is read. It is no protection against whoever may write to the directory, and
neither is the manifest.
"""

import contextlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any, Literal, get_args

from medscale.errors import DamagedTierError, ExportError
from medscale.manifest import MANIFEST, VERIFIED, Manifest, parse_json, verify_files
from medscale.storage import sha256_of

__all__ = ["VERIFY", "Verify", "verify"]

Verify = Literal["once", "always", "never"]
VERIFY: tuple[Verify, ...] = get_args(Verify)

#: A file that was changed less than these seconds ago may change once more without its time telling: not remembered.
SETTLED_SECONDS = 2.0


def verify(directory: Path, manifest: Manifest, when: Verify, optional: frozenset[str] = frozenset()) -> None:
    """Compare the files with the manifest's hashes, as `when` says; those that are `optional` may be missing.

    Raises:
        ExportError: a file is missing, extra, of another size, or its bytes changed; names it. Or `when` is none of
            `VERIFY`.

    """
    if when not in VERIFY:
        raise ExportError(f"verify is {when!r}; allowed: {', '.join(VERIFY)}")
    if when == "always":
        verify_files(directory, manifest, DamagedTierError, optional=optional)
    elif when == "once":
        _verify_once(directory, manifest, optional)


def _verify_once(directory: Path, manifest: Manifest, optional: frozenset[str]) -> None:
    settled = time.time_ns() - int(SETTLED_SECONDS * 1e9)
    marks, manifest_sha256 = _marks(directory, manifest), sha256_of(directory / MANIFEST)
    known = _noted(directory / VERIFIED, manifest_sha256)
    unchanged = {name for name, mark in marks.items() if known.get(name) == mark}
    verify_files(directory, manifest, DamagedTierError, optional=optional, unchanged=unchanged)
    # Marks from before the files were read: what was changed meanwhile is read again next time.
    note = {name: mark for name, mark in marks.items() if mark[1] < settled}
    if note != known:
        _write(directory / VERIFIED, {"manifest": manifest_sha256, "files": note})


def _marks(directory: Path, manifest: Manifest) -> dict[str, list[int]]:
    """Return [bytes, mtime and ctime in ns, inode] of each file that is there; links are never remembered."""
    marks = {}
    for name in manifest.files:
        with contextlib.suppress(OSError):
            status = (directory / name).lstat()
            if not (directory / name).is_symlink():
                marks[name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return marks


def _noted(path: Path, manifest_sha256: str) -> dict[str, Any]:
    """Return the marks of an earlier verification of the same manifest."""
    with contextlib.suppress(OSError, ValueError):
        note = parse_json(path.read_text(encoding="utf-8"))
        if isinstance(note, dict) and note.get("manifest") == manifest_sha256 and isinstance(note.get("files"), dict):
            files: dict[str, Any] = note["files"]
            return files
    return {}


def _write(path: Path, note: dict[str, Any]) -> None:
    """Replace the note as a whole; do nothing where the directory is read-only, or gone."""
    draft = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    with contextlib.suppress(OSError):
        try:
            draft.write_text(json.dumps(note), encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
