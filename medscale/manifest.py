"""What a directory holds, as JSON: name, bytes and SHA-256 of every file, and facts about the whole.

A directory counts only once its `manifest.json` is there, written last; nothing in it is read before its
bytes are checked against the manifest (DCP and Parquet load flipped bits silently).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medscale.errors import MedscaleError
from medscale.storage import fault_point, safe_join, sha256_of, write_json

__all__ = ["MANIFEST", "Manifest", "read_manifest", "verify_files", "write_manifest"]

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """A directory's facts, and for every file its bytes and SHA-256."""

    #: what the directory is: "graph", "checkpoint", "tier", ...
    kind: str
    #: version of that kind's format
    format: int
    #: anything JSON
    facts: Mapping[str, Any]
    #: by relative name: {"bytes": int, "sha256": str}
    files: Mapping[str, Mapping[str, Any]]


def write_manifest(directory: Path, kind: str, format_version: int, facts: Mapping[str, Any]) -> Manifest:
    """Hash every file under `directory` and write its manifest, the last file to appear there."""
    names = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    files = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": sha256_of(directory / name)}
        for name in names
        if name != MANIFEST
    }
    manifest = Manifest(kind, format_version, facts, files)
    fault_point("before-manifest")
    write_json(
        directory / MANIFEST,
        {"kind": kind, "format": format_version, **{"facts": dict(facts)}, "files": files},
    )
    return manifest


def read_manifest(
    directory: Path, kind: str, format_version: int, error: type[MedscaleError]
) -> Manifest:
    """Read and check the shape of a directory's manifest; file contents are `verify_files`' business.

    Raises:
        error: missing, not JSON, another kind, a newer format, or names that lead outside.

    """
    path = directory / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{directory} holds no {MANIFEST}: it was never completed, or is not a {kind}") from None
    except (OSError, ValueError) as cause:
        raise error(f"{path} cannot be read: {cause}") from None
    if not isinstance(raw, dict) or raw.get("kind") != kind:
        found = raw.get("kind") if isinstance(raw, dict) else type(raw).__name__
        raise error(f"{path} describes a {found!r}, not a {kind}")
    if raw.get("format") != format_version:
        raise error(
            f"{path} has format {raw.get('format')!r}; this medscale reads {kind} format {format_version}. "
            "Use the medscale that wrote it, or write it anew"
        )
    facts, files = raw.get("facts"), raw.get("files")
    if not isinstance(facts, dict) or not isinstance(files, dict):
        raise error(f"{path} is damaged: 'facts' or 'files' is missing")
    for name, entry in files.items():
        well_formed = isinstance(entry, dict) and isinstance(entry.get("bytes"), int)
        if not well_formed or not isinstance(entry.get("sha256"), str):
            raise error(f"{path} is damaged: the entry of {name!r} lacks bytes or sha256")
        try:
            safe_join(directory, name)
        except MedscaleError as cause:
            raise error(f"{path}: {cause}") from None
    return Manifest(kind, format_version, facts, files)


def verify_files(directory: Path, manifest: Manifest, error: type[MedscaleError]) -> None:
    """Check that exactly the manifest's files are there, with their bytes and SHA-256.

    Raises:
        error: a file is missing, extra, of another size, or its bytes changed; names it.

    """
    present = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
    extra = sorted(present - set(manifest.files) - {MANIFEST})
    if extra:
        raise error(f"{directory / extra[0]} is not in the manifest: someone added it; remove it to go on")
    for name, entry in manifest.files.items():
        path = safe_join(directory, name)
        if name not in present:
            raise error(f"{path} is missing")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise error(f"{path} has {size} bytes, its manifest says {entry['bytes']}")
        if sha256_of(path) != entry["sha256"]:
            raise error(f"{path} is damaged: its SHA-256 is not the manifest's")
