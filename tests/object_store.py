"""A server that speaks S3, in a process of its own: what `s3://` URIs reach while tests run."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow.fs import S3FileSystem


@contextlib.contextmanager
def serving(log: Path) -> Iterator[str]:
    """Run the server and yield its URL; `log` gets a line for each request."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("w") as output:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 30
        while "Running on" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def use(patch: pytest.MonkeyPatch, url: str) -> None:
    """Let the environment name the server and its credentials, as it would those of a real one."""
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "toy-key",
        "AWS_SECRET_ACCESS_KEY": "toy-secret",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        patch.setenv(name, value)


def make_bucket(url: str, name: str) -> None:
    S3FileSystem(endpoint_override=url, allow_bucket_creation=True).create_dir(name)
