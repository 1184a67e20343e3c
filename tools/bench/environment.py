"""What a figure depends on beside the code."""

import contextlib
import datetime
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

__all__ = ["environment"]

LIBRARIES = ("torch", "torchrec", "fbgemm-gpu", "numpy", "pyarrow", "medscale")


def environment(command: str, cores: int, others: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return date, processor, versions of the libraries (and `others`) that are installed, and the command."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": models[0] if models else platform.processor(),
        "cores": cores,
        "versions": {"python": platform.python_version(), **_versions((*LIBRARIES, *others))},
        "command": command,
    }


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
