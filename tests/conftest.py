"""What tests share: where real data lies."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are declared: before anything imports triton

if process := os.environ.get("PYTEST_XDIST_WORKER"):
    # Ray's clusters are found by a file: those of another process are not to be joined. Sockets need a short path.
    os.environ["RAY_TMPDIR"] = f"/tmp/{process}-{os.getuid()}"
    Path(os.environ["RAY_TMPDIR"]).mkdir(exist_ok=True)

from toy import write_toy_graph

from medscale.graph.reader import Graph

#: files whose tests wait for processes and clusters: begun first, or one of them ends long after all others
_LONG = (
    "test_launch", "test_extend", "test_workers", "test_ray_actors", "test_split", "test_reproduce", "test_export",
    "test_search", "test_predict", "test_cluster", "test_trainer", "test_checkpoint",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first; `--no-loadscope-reorder` keeps the order."""
    places = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(_LONG)))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small tensors are fastest on one thread, and a busy machine does not stall it."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The root of real data sets; tests that need one skip loudly where it is absent."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    root = Path(os.environ.get("MEDSCALE_DATA_DIR", default))
    if not (root / "umls" / "train.tsv").is_file():
        pytest.skip(f"no data sets under {root}: set MEDSCALE_DATA_DIR to a folder that holds umls/, FB15k-237/, ...")
    return root


@pytest.fixture(scope="session")
def toy_graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """A small prepared graph on disk."""
    return write_toy_graph(tmp_path_factory.mktemp("toy"))
