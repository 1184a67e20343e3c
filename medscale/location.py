"""Where files lie: at a local `Path`, or at a `RemotePath` on any filesystem that pyarrow reaches by a URI.

Credentials are the environment's, found by pyarrow as ever (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...). A URI's user
and query say how to reach the filesystem and may be secret, so no message shows them.
"""

import functools
import re
import shutil
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit

from medscale.errors import GraphError

__all__ = ["STREAMS", "Location", "RemotePath", "parse_location"]

#: bytes per request while a file is read or written from front to back: object stores bill and delay each request
CHUNK_BYTES = 8 << 20
#: files that are streamed at once: one stream waits for its store more than it moves
STREAMS = 8

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True, repr=False)
class RemotePath:
    """A file or directory that a URI names. Its methods mean what those of `Path` mean under the same names.

    It is nothing but text: the filesystem is reached at the first use in a process, and then kept. All methods but `/`
    raise OSError or ValueError where the filesystem cannot be reached or refuses.
    """

    #: scheme and authority, such as s3://bucket or hdfs://namenode:8020
    root: str
    #: names joined by "/", none in front
    key: str
    #: how to reach the filesystem, such as endpoint_override=localhost:9000&scheme=http; or ""
    query: str = ""

    def __truediv__(self, name: str) -> "RemotePath":
        return replace(self, key=f"{self.key}/{name}" if self.key else name)

    def __str__(self) -> str:
        """Return the URI without user and query, for messages."""
        scheme, _, authority = self.root.partition("://")
        return f"{scheme}://{authority.rpartition('@')[2]}/{self.key}"

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    @property
    def uri(self) -> str:
        """The whole URI, which `parse_location` takes; not for messages."""
        return f"{self.root}/{quote(self.key)}" + (f"?{self.query}" if self.query else "")

    @property
    def filesystem(self) -> Any:
        """The `pyarrow.fs.FileSystem`; one for all paths of a root, so that they share its connections."""
        return _connected(self.root, self.query)[0]

    @property
    def path(self) -> str:
        """What `filesystem` calls this path, such as bucket/graphs/toy."""
        top = _connected(self.root, self.query)[1]  # such as "bucket", or "/" on HDFS
        return f"{top.rstrip('/')}/{self.key}".rstrip("/") or "/"

    def resolve(self) -> "RemotePath":
        """Return it: a URI means the same in every directory of every process."""
        return self

    def open(self, mode: Literal["rb"]) -> BufferedReader:
        """Open the file to be read from front to back."""
        return BufferedReader(self.filesystem.open_input_stream(self.path, compression=None), CHUNK_BYTES)

    def read_bytes(self) -> bytes:
        """Return the file's bytes."""
        with self.open("rb") as file:
            return file.read()

    def is_file(self) -> bool:
        """Tell whether the file is there."""
        return bool(self.filesystem.get_file_info(self.path).is_file)

    def mkdir(self) -> None:
        """Make the directory where there is none; in an object store that writes an empty object that marks it."""
        self.filesystem.create_dir(self.path, recursive=True)

    def unlink(self) -> None:
        """Remove the file."""
        self.filesystem.delete_file(self.path)

    def upload(self, source: Path) -> None:
        """Write a local file's bytes here. An object store shows the file whole, or not at all."""
        with source.open("rb") as file, self.filesystem.open_output_stream(self.path, compression=None) as stream:
            shutil.copyfileobj(file, stream, CHUNK_BYTES)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file below this directory, by relative name; nothing where there is none."""
        from pyarrow.fs import FileSelector

        found = self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True, recursive=True))
        return {info.path[len(self.path) + 1 :]: info.size for info in found if info.is_file}


Location = Path | RemotePath


def parse_location(text: str) -> Location:
    """Return the place that a user names: a directory or a URI; file:// is a local path.

    Raises:
        GraphError: the URI holds a password, or names another host's files.

    """
    if not _URI.match(text):
        return Path(text)
    parts = urlsplit(text)
    user, _, host = parts.netloc.rpartition("@")
    if ":" in user:
        raise GraphError(
            f"a URI of {parts.scheme}://{host} holds a password, which others could see; leave it out and set the "
            "environment variables of that filesystem, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    key = unquote(parts.path)
    if parts.scheme == "file":
        if host not in ("", "localhost"):
            raise GraphError(f"file://{host}{key} lies on another host; write file:///PATH for a file of this one")
        return Path(key)
    return RemotePath(f"{parts.scheme}://{parts.netloc}", key.strip("/"), parts.query)


@functools.cache
def _connected(root: str, query: str) -> tuple[Any, str]:
    """Return a root's filesystem, and what that calls the root."""
    # Here, not above: exported tiers are read without pyarrow.
    from pyarrow.fs import FileSystem

    try:
        filesystem, top = FileSystem.from_uri(f"{root}/" + (f"?{query}" if query else ""))
    except (OSError, ValueError) as cause:
        # pyarrow repeats the URI that it was given.
        secret = re.compile("|".join(map(re.escape, filter(None, (f"{root}/?{query}", query, f"{root}/")))))
        raise OSError(secret.sub("the URI", str(cause).splitlines()[0])) from None
    return filesystem, top
