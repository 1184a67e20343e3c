"""Graphs behind a URI: prepared to an S3 server, read back equal, damage named, secrets never shown."""

import contextlib
import dataclasses
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import object_store
import pytest
from toy import toy_job

from medscale import doctor
from medscale.config import ExtendSection, GraphSection, Job, SyntheticSection
from medscale.errors import GraphError
from medscale.graph.known_triples import KnownTriples
from medscale.graph.reader import Graph, graph_exists, open_graph
from medscale.graph.schema import open_parquet
from medscale.graph.upload import upload_graph
from medscale.jobfile import dump_job
from medscale.location import RemotePath, parse_location
from medscale.options import job_parser
from medscale.plan import size_of
from medscale.prepare import main, prepare
from medscale.train import train


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s3") / "requests.log"


@pytest.fixture(scope="module")
def server(log: Path) -> Iterator[str]:
    """A server, and an environment that names it."""
    with object_store.serving(log) as url, pytest.MonkeyPatch.context() as patch:
        object_store.use(patch, url)
        yield url


@pytest.fixture
def graphs(server: str, request: pytest.FixtureRequest) -> RemotePath:
    """An empty place for graphs, in a bucket of the test's own."""
    bucket = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:50].strip("-")
    object_store.make_bucket(server, bucket)
    location = parse_location(f"s3://{bucket}/some/graphs")
    assert isinstance(location, RemotePath)
    return location


@pytest.fixture
def job() -> Job:
    return toy_job(name="ring")


@pytest.fixture(scope="module")
def data_root(toy_graph: Graph) -> Path:
    """The raw files of the toy graph."""
    assert isinstance(toy_graph.directory, Path)
    return toy_graph.directory.parent


def test_a_graph_grows_behind_a_uri_into_the_same_bytes(graphs: RemotePath, data_root: Path, tmp_path: Path) -> None:
    (tmp_path / "new.tsv").write_text("new\tstep1\te000\ne001\tbesides\tnew\n")
    job = toy_job(name="ring", train={"validate_every": 0})
    grown = dataclasses.replace(job, name="grown", extend=ExtendSection(run="ring", triples=("new.tsv",)))
    found = []
    for place in (graphs, tmp_path / "graphs"):
        prepare(job, data_root=data_root, graphs_root=place)
        found.append(prepare(grown, data_root=tmp_path, graphs_root=place))
    assert found[0].sha256 == found[1].sha256
    assert open_graph(graphs / "grown").lineage == found[1].lineage


def overwrite(path: RemotePath, change: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    with path.filesystem.open_output_stream(path.path) as stream:
        stream.write(bytes(data))


def test_a_graph_prepared_to_a_uri_is_the_local_one(
    graphs: RemotePath, job: Job, data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = prepare(job, data_root=data_root, graphs_root=tmp_path)
    remote = prepare(job, data_root=data_root, graphs_root=graphs)
    assert (remote.sha256, remote.facts, remote.files) == (local.sha256, local.facts, local.files)
    assert remote.directory == graphs / "ring"
    assert remote.directory.sizes() == {
        path.relative_to(local.directory).as_posix(): path.stat().st_size
        for path in Path(str(local.directory)).rglob("*")
        if path.is_file()
    }
    for split in ("train", "valid", "test"):
        assert np.array_equal(remote.triples(split), local.triples(split))
        assert [path.path.rpartition("/ring/")[2] for path in remote.parts(split)] == [f"{split}/part-00000.parquet"]
    assert remote.entity_names() == local.entity_names()
    assert remote.relation_names() == local.relation_names()
    assert remote.entity_types() is None
    assert len(KnownTriples.of_graph(remote)) == len(KnownTriples.of_graph(local))
    # The same command again opens it, verified, and does not need the raw files.
    assert prepare(job, data_root=tmp_path / "none", graphs_root=graphs) == remote
    assert f"graph ring: {graphs}/ring is there already" in capsys.readouterr().err
    assert size_of(job, graphs, tmp_path / "none").source == f"counted in {graphs}/ring"
    with pytest.raises(GraphError, match=r"graph\.valid_fraction is 0\.5, was 0\.0"):
        prepare(
            toy_job(name="ring", graph={"valid": (), "valid_fraction": 0.5}), data_root=data_root, graphs_root=graphs
        )
    assert not list(Path(tempfile.gettempdir()).glob("medscale-prepare-*/ring"))


def test_a_row_group_is_one_request(graphs: RemotePath, toy_graph: Graph, log: Path) -> None:
    graph = upload_graph(toy_graph, graphs / "toy", lambda size: None)
    (part,) = graph.parts("train")
    with open_parquet(part) as parquet:
        before = log.read_text().count("GET /")
        assert parquet.read_row_group(0).num_rows == 300
    assert log.read_text().count("GET /") == before + 1


def test_damage_is_named_with_file_and_row_group(graphs: RemotePath, toy_graph: Graph) -> None:
    directory = upload_graph(toy_graph, graphs / "toy", lambda size: None).directory
    part = directory / "train/part-00000.parquet"
    with open_parquet(part) as parquet:
        column = parquet.metadata.row_group(0).column(2)
    middle = column.data_page_offset + column.total_compressed_size // 2

    def flip(data: bytearray) -> None:
        data[middle] ^= 1

    overwrite(part, flip)
    with pytest.raises(GraphError, match=re.escape(f"{part} is damaged: its SHA-256 is not the manifest's")):
        open_graph(directory)
    with pytest.raises(GraphError, match=re.escape(f"{part}: row group 0 (from 0) is damaged, missing or")):
        open_graph(directory, verify=False).triples("train")
    overwrite(part, lambda data: data.pop())
    with pytest.raises(GraphError, match=rf"{re.escape(str(part))} has \d+ bytes, its manifest says"):
        open_graph(directory)
    part.unlink()
    with pytest.raises(GraphError, match=re.escape(f"{part} is missing")):
        open_graph(directory)
    with pytest.raises(GraphError, match=re.escape(f"{part} is damaged, missing or out of reach")):
        open_graph(directory, verify=False).triples("train")
    overwrite(directory / "manifest.json", flip)
    with pytest.raises(GraphError, match=re.escape(f"{directory}/manifest.json ")):
        open_graph(directory)
    (directory / "manifest.json").unlink()
    assert not graph_exists(directory)
    with pytest.raises(GraphError, match=r"holds no manifest\.json: it was never completed"):
        open_graph(directory)


def test_an_interrupted_upload_is_no_graph_and_is_repeated(
    graphs: RemotePath, job: Job, data_root: Path, tmp_path: Path
) -> None:
    job_file = tmp_path / "ring.yaml"
    job_file.write_text(dump_job(job))
    options = ["--data-dir", str(data_root), "--graphs-dir", graphs.uri]
    command = [sys.executable, "-m", "medscale.prepare", str(job_file), *options]
    # The first manifest is that of the local build; the process is killed before the second one, that of the upload.
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    variables = {**os.environ, "MEDSCALE_FAULT": "before-manifest:2", "TMPDIR": str(scratch)}
    assert subprocess.run(command, env=variables, capture_output=True, check=False).returncode == -9
    directory = graphs / "ring"
    assert "train/part-00000.parquet" in directory.sizes()
    assert not graph_exists(directory)
    # What an upload of other data left is removed; anything else is not ours to remove.
    (directory / "train/part-00001.parquet").upload(job_file)
    (directory / "notes.txt").upload(job_file)
    with pytest.raises(GraphError, match=r"ring/notes\.txt is no file of a graph; remove it"):
        prepare(job, data_root=data_root, graphs_root=graphs)
    (directory / "notes.txt").unlink()
    assert main([str(job_file), *options]) == 0
    assert "train/part-00001.parquet" not in directory.sizes()
    assert open_graph(directory).num_triples["train"] == 300


def test_who_finishes_second_opens_the_first_ones_graph(
    graphs: RemotePath, job: Job, data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = prepare(job, data_root=data_root, graphs_root=tmp_path)

    def meanwhile(title: str, total: int, unit: str) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Another preparer uploads while this one still builds."""
        assert title != "uploading"
        upload_graph(local, graphs / "ring", lambda size: None)
        return contextlib.nullcontext(lambda size: None)

    second = prepare(job, data_root=data_root, graphs_root=graphs, progress=meanwhile)
    assert second.sha256 == local.sha256
    assert f"{graphs}/ring is there already" in capsys.readouterr().err
    # One that saw no manifest before its own upload writes the same bytes again.
    assert upload_graph(local, graphs / "ring", lambda size: None) == second == open_graph(graphs / "ring")


def test_training_on_it_is_training_on_the_local_one(graphs: RemotePath, toy_graph: Graph, tmp_path: Path) -> None:
    remote = upload_graph(toy_graph, graphs / "toy", lambda size: None)
    job = toy_job(train={"epochs": 1})
    for name, graph in (("local", toy_graph), ("remote", remote)):
        train(job, graph, tmp_path / name)
    losses = [
        re.findall(r'"loss": [^,]+', (tmp_path / name / "metrics.jsonl").read_text()) for name in ("local", "remote")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12


def test_what_a_location_is() -> None:
    for text, path in [("graphs", "graphs"), ("/a b", "/a b"), ("file:///a%20b/c", "/a b/c")]:
        assert parse_location(text) == Path(path)
    place = parse_location("s3://me@bucket/a%20b/?region=eu-west-1&scheme=http")
    assert isinstance(place, RemotePath)
    child = place / "toy"
    assert child.uri == "s3://me@bucket/a%20b/toy?region=eu-west-1&scheme=http"
    assert parse_location(child.uri) == pickle.loads(pickle.dumps(child)) == child.resolve() == child
    assert str(child) == "s3://bucket/a b/toy"
    assert repr(child) == "RemotePath('s3://bucket/a b/toy')"
    top = parse_location("s3://bucket?region=eu-west-1")
    assert isinstance(top, RemotePath)
    assert [top.path, (top / "toy").path, child.path] == ["bucket", "bucket/toy", "bucket/a b/toy"]
    for text, message in [
        ("s3://key:hush@bucket/graphs", "holds a password"),
        ("file://elsewhere/graphs", "lies on another host"),
    ]:
        with pytest.raises(GraphError, match=message) as caught:
            parse_location(text)
        assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://nobody@bucket/graphs?hush=1",
        "nowhere://nobody@bucket/graphs?hush=1",
        "s3://nobody@bu cket/graphs?hush=1",
        "s3://bucket/graphs?endpoint_override=127.0.0.1:1&scheme=http&hush=1",
    ],
)
def test_no_message_shows_user_or_query(
    uri: str, server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_file = tmp_path / "ring.yaml"
    job_file.write_text(dump_job(toy_job(name="ring")))
    assert main([str(job_file), "--graphs-dir", uri]) == GraphError.exit_code
    shown = capsys.readouterr().err
    assert shown.startswith(f"medscale: {uri.partition('://')[0]}://")
    assert "graphs/ring cannot be reached" in shown
    assert "nobody@" not in shown
    assert "hush=" not in shown
    assert "endpoint_override" not in shown
    with pytest.raises(SystemExit):
        job_parser("prepare", "").parse_args([str(job_file), "--graphs-dir", "s3://key:hush@bucket/graphs"])
    shown = capsys.readouterr().err
    assert "holds a password" in shown
    assert "hush" not in shown


def test_a_store_that_cannot_be_reached_or_written(server: str, job: Job, data_root: Path) -> None:
    absent = parse_location("s3://no-such-bucket/graphs")
    with pytest.raises(GraphError, match="s3://no-such-bucket/graphs/ring cannot be written"):
        prepare(job, data_root=data_root, graphs_root=absent)
    assert doctor.check_writable("graphs", absent).status == "warning"
    gone = parse_location("s3://bucket/graphs?endpoint_override=127.0.0.1:1&scheme=http")
    with pytest.raises(GraphError, match="s3://bucket/graphs/ring cannot be reached") as caught:
        prepare(job, data_root=data_root, graphs_root=gone)
    assert "endpoint_override" not in str(caught.value)
    assert doctor.check_writable("graphs", parse_location("nowhere://bucket/graphs")).status == "problem"


def test_doctor_reaches_it(graphs: RemotePath) -> None:
    found = doctor.check_writable("graphs", graphs)
    assert (found.status, found.found) == ("ok", f"{graphs}, can be written")


def test_a_generated_graph_can_go_there_too(graphs: RemotePath) -> None:
    section = GraphSection(synthetic=SyntheticSection(num_users=50, num_triples=800), valid_fraction=0.1)
    job = dataclasses.replace(toy_job(), graph=section)
    graph = prepare(job, data_root=Path("none"), graphs_root=graphs)
    assert sum(graph.num_triples.values()) + sum(graph.facts["duplicates"].values()) == 800
    types = graph.entity_types()
    assert types is not None
    assert len(types) == graph.num_entities
