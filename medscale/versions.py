"""Exports as they are published: a link that leads to one of the versions beside it, and moves in one step.

`export` is a link to one directory of `export-versions/`. A new version is written there, made durable, and takes the
link over by one rename, so a reader sees the old export or the new one. Some older versions are kept to return to.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from medscale.errors import ExportError
from medscale.manifest import read_manifest, verify_files
from medscale.runtime.files import TIER_FORMATS, TIER_KIND
from medscale.storage import (
    commit_directory,
    fsync_directory,
    retire_directory,
    run_lock,
    staging_directory,
    sweep_leftovers,
)

__all__ = ["publication", "roll_back", "versions_of"]

_VERSION = re.compile(r"(\d+)-step-(\d+)")


@contextlib.contextmanager
def publication(link: Path, step: int, keep: int) -> Iterator[Path]:
    """Yield an empty directory to fill; publish it as `link` when the block ends, and keep so many versions.

    Raises:
        ExportError: something that is no export is in the way.
        RunLockedError: another export is being written here.

    """
    if link.exists() and not link.is_symlink():
        raise ExportError(f"{link} was not made by an export: move it away, then export again")
    folder = _folder(link)
    with run_lock(folder):
        sweep_leftovers(folder)
        kept = versions_of(link)
        # Of all there ever were here, so that no reader takes a new version for one that it is just opening.
        number = max((_number(path) for path in _all(folder)), default=0) + 1
        final = folder / f"{number:06d}-step-{step}"
        with staging_directory(final) as draft:
            yield draft
            commit_directory(draft, final)
        # What is newer than the published version was returned from, or never published.
        _retire(path for path in _all(folder) if path not in (*kept, final))
        _point(link, final)
        _retire([*kept, final][:-keep])


def roll_back(link: Path) -> tuple[Path, int]:
    """Let `link` lead to the version that was published before; return that version, and its step.

    Raises:
        ExportError: there is none, or it is damaged; the link stays as it is.
        RunLockedError: another export is being written here.

    """
    if not link.is_symlink():
        raise ExportError(f"{link} is not a published export: there is nothing to roll back")
    with run_lock(_folder(link)):
        kept = versions_of(link)
        if len(kept) < 2:
            raise ExportError(f"{link} has no version before {link.resolve().name}: it stays as it is")
        previous = kept[-2]
        try:
            _verify(previous)
        except ExportError as damage:
            raise ExportError(
                f"{link} stays at {kept[-1].name}, since the version before it is damaged: {damage}"
            ) from None
        _point(link, previous)
    match = _VERSION.fullmatch(previous.name)
    assert match is not None
    return previous, int(match[2])


def versions_of(link: Path) -> list[Path]:
    """Return the versions that were published, oldest first; the last one is what `link` leads to."""
    current = link.resolve().name if link.is_symlink() else ""
    return [
        path for path in _all(_folder(link)) if _VERSION.fullmatch(current) and _number(path) <= _number(Path(current))
    ]


def _verify(version: Path) -> None:
    tiers = sorted(path for path in version.iterdir() if path.is_dir())
    if not tiers:
        raise ExportError(f"{version} holds no tiers")
    for tier in tiers:
        verify_files(tier, read_manifest(tier, TIER_KIND, TIER_FORMATS, ExportError), ExportError)


def _folder(link: Path) -> Path:
    return link.with_name(f"{link.name}-versions")


def _all(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if _VERSION.fullmatch(path.name) and path.is_dir()), key=_number)


def _number(version: Path) -> int:
    return int(version.name.partition("-")[0])


def _point(link: Path, version: Path) -> None:
    """Make `link` lead to `version`, in one step for whoever looks."""
    draft = link.with_name(f"{link.name}.tmp")
    draft.unlink(missing_ok=True)
    draft.symlink_to(version.relative_to(link.parent), target_is_directory=True)
    draft.replace(link)
    fsync_directory(link.parent)


def _retire(versions: Iterable[Path]) -> None:
    for path in versions:
        # The export stands whatever happens here; the next one tries again.
        with contextlib.suppress(OSError):
            retire_directory(path)
