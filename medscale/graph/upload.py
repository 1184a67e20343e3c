"""A graph, built on this machine, to where no directory can be renamed: its manifest goes last.

Nobody holds a lock there. Two processes that prepare one graph both write, and that is harmless: files are a pure
function of the source (and of the versions that write them), an object is replaced as a whole, and whoever comes
second writes the same bytes. Where sources or versions differ, files of one may stand under the manifest of the other;
its SHA-256 tells when the graph is next verified.
"""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from medscale.errors import GraphError
from medscale.graph.reader import Graph, open_graph
from medscale.graph.schema import ENTITIES, ENTITY_TYPES, GROWTH, RELATIONS, SPLITS
from medscale.location import STREAMS, RemotePath
from medscale.manifest import MANIFEST
from medscale.storage import fault_point

__all__ = ["require_room", "upload_graph"]

_PARTS = "|".join((ENTITIES, ENTITY_TYPES, *SPLITS, GROWTH))
_GRAPH_FILE = re.compile(rf"{re.escape(RELATIONS)}|{re.escape(MANIFEST)}|({_PARTS})/part-[0-9]+\.parquet")


def require_room(target: RemotePath) -> None:
    """Make the directory, and refuse one that holds anything but what an interrupted upload may have left.

    Raises:
        GraphError: the filesystem cannot be reached, cannot be written, or something else lies there.

    """
    with _graph_errors(target):
        target.mkdir()
        for name in sorted(target.sizes()):
            if not _GRAPH_FILE.fullmatch(name):
                raise GraphError(
                    f"{target / name} is no file of a graph; remove it, or change graph.name or --graphs-dir"
                )


def upload_graph(graph: Graph, target: RemotePath, advance: Callable[[int], None]) -> Graph:
    """Write a local graph's files to `target`, over what is there, and open it; `advance` is told the bytes.

    Raises:
        GraphError: the filesystem cannot be reached or written; or someone else changed files meanwhile.

    """
    assert isinstance(graph.directory, Path), "a graph is built on this machine"
    directory = graph.directory
    sizes = {name: (directory / name).stat().st_size for name in graph.files}
    with _graph_errors(target), ThreadPoolExecutor(STREAMS) as pool:
        for name in target.sizes().keys() - sizes.keys() - {MANIFEST}:
            (target / name).unlink()  # of an upload of other data, never completed
        for size, _ in zip(
            sizes.values(), pool.map(lambda name: (target / name).upload(directory / name), sizes), strict=True
        ):
            advance(size)
        found = target.sizes()
        found.pop(MANIFEST, None)
        if found != sizes:
            raise GraphError(f"{target} was written by someone else meanwhile; wait for them, then prepare it anew")
        fault_point("before-manifest")
        (target / MANIFEST).upload(directory / MANIFEST)
    return open_graph(target, verify=False)


@contextmanager
def _graph_errors(target: RemotePath) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as cause:
        raise GraphError(f"{target} cannot be written: {cause}") from None
