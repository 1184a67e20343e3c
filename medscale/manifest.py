"""What a directory holds, as JSON: name, bytes and SHA-256 of every file, and facts about the whole.

A directory counts only once its `manifest.json` is there, written last; nothing in it is read before its
bytes are checked against the manifest (DCP and Parquet load flipped bits silently).
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medscale.errors import MedscaleError
from medscale.location import STREAMS, Location
from medscale.storage import fault_point, safe_join, sha256_of, write_json

__all__ = ["MANIFEST", "VERIFIED", "Manifest", "parse_json", "read_manifest", "verify_files", "write_manifest"]

MANIFEST = "manifest.json"
#: how the names of files begin in which readers note that they have verified a directory
VERIFIED = ".verified"


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


def parse_json(text: str) -> Any:
    """Return the value of a JSON text that a program wrote: no key twice in an object, no NaN or Infinity.

    Raises:
        ValueError: not such JSON, or nested beyond any use.

    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it has the key {twice!r} twice")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def write_manifest(
    directory: Path, kind: str, format_version: int, facts: Mapping[str, Any], known: Mapping[str, str] | None = None
) -> Manifest:
    """Write the manifest of all files under `directory`, the last file to appear there.

    `known` holds the SHA-256 of files that were hashed while they were written; the others are read for it.
    """
    known = known or {}
    files = {
        name: {"bytes": size, "sha256": known.get(name) or sha256_of(directory / name)}
        for name, size in sorted(_sizes(directory).items())
        if name != MANIFEST and not name.startswith(VERIFIED)
    }
    manifest = Manifest(kind, format_version, facts, files)
    fault_point("before-manifest")
    content = {"kind": kind, "format": format_version, "facts": dict(facts), "files": files}
    write_json(directory / MANIFEST, content | {"seal": _seal(content)})
    return manifest


def read_manifest(
    directory: Location, kind: str, format_version: int | Collection[int], error: type[MedscaleError]
) -> Manifest:
    """Read and check the shape of a directory's manifest; file contents are `verify_files`' business.

    `format_version` is the one, or all, that the caller reads.

    Raises:
        error: missing, not JSON, another kind, a newer format, or names that lead outside.

    """
    path = directory / MANIFEST
    try:
        if isinstance(path, Path) and path.is_symlink():
            raise ValueError("it is a link; a manifest lies in the directory that it describes")
        raw = parse_json(path.read_bytes().decode())
    except FileNotFoundError:
        raise error(f"{directory} holds no {MANIFEST}: it was never completed, or is not a {kind}") from None
    except (OSError, ValueError) as cause:
        raise error(f"{path} cannot be read: {cause}") from None
    if not isinstance(raw, dict) or raw.get("kind") != kind:
        found = raw.get("kind") if isinstance(raw, dict) else type(raw).__name__
        raise error(f"{path} describes a {found!r}, not a {kind}")
    formats = (format_version,) if isinstance(format_version, int) else tuple(format_version)
    # A bool equals 0 or 1, and is no version.
    if type(raw.get("format")) is not int or raw["format"] not in formats:
        raise error(
            f"{path} has format {raw.get('format')!r}; this medscale reads {kind} format "
            f"{' and '.join(map(str, formats))}. "
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
    if raw.pop("seal", None) != _seal(raw):
        raise error(f"{path} is damaged: its text is not what was sealed when it was written")
    return Manifest(kind, raw["format"], facts, files)


def _seal(content: Mapping[str, Any]) -> str:
    """Return a hash of a manifest's values, so that a flipped bit in a fact is seen like one in a file."""
    values = json.loads(json.dumps(content))  # as a reader will see them: keys are strings, tuples are lists
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def verify_files(
    directory: Location,
    manifest: Manifest,
    error: type[MedscaleError],
    *,
    optional: Collection[str] = (),
    unchanged: Collection[str] = (),
) -> None:
    """Check that exactly the manifest's files are there, with their bytes and SHA-256.

    Files that are `optional` may be missing, and those that are `unchanged` are not read. What a reader noted in
    files whose names begin with `VERIFIED` does not count.

    Raises:
        error: a file is missing, extra, of another size, or its bytes changed; names it.

    """
    try:
        present = _sizes(directory)
    except (OSError, ValueError) as cause:
        raise error(f"{directory} cannot be listed: {cause}") from None
    extra = sorted(
        name for name in present.keys() - manifest.files.keys() - {MANIFEST} if not name.startswith(VERIFIED)
    )
    if extra:
        raise error(f"{directory / extra[0]} is not in the manifest: someone added it; remove it to go on")
    for name, entry in manifest.files.items():
        if name not in present and name not in optional:
            raise error(f"{directory / name} is missing")
        if present.get(name, entry["bytes"]) != entry["bytes"]:
            raise error(f"{directory / name} has {present[name]} bytes, its manifest says {entry['bytes']}")
    read = [name for name in manifest.files if name in present and name not in unchanged]
    paths = [safe_join(directory, name) for name in read]
    for path, name, found in zip(paths, read, _hashes(paths, error), strict=True):
        if found != manifest.files[name]["sha256"]:
            raise error(f"{path} is damaged: its SHA-256 is not the manifest's")


def _sizes(directory: Location) -> dict[str, int]:
    """Return the bytes of every file below a directory, by relative name."""
    if isinstance(directory, Path):
        return {p.relative_to(directory).as_posix(): p.stat().st_size for p in directory.rglob("*") if p.is_file()}
    return directory.sizes()


def _hashes(paths: Sequence[Location], error: type[MedscaleError]) -> Iterator[str]:
    """Yield the SHA-256 of each file; several are read at once, remote ones more than there are cores."""

    def hash_of(path: Location) -> str:
        try:
            return sha256_of(path)
        except (OSError, ValueError) as cause:
            raise error(f"{path} cannot be read: {cause}") from None

    local = all(isinstance(path, Path) for path in paths)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if local else STREAMS) as pool:
        yield from pool.map(hash_of, paths)
