"""The CPU kernels' machine code: compiled when first needed, for the processor at hand, and kept.

Sources lie in `cpp/`. C++ rather than numba because it was 2.1x faster where it counts (64 sub-models: many short
loops), and says what it does with vectors; the price is a C++ compiler on the machine that trains.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medscale.errors import UnsupportedError
from medscale.logs import log
from medscale.model.kernels.levels import Levels

__all__ = ["LANES", "arguments", "function", "geometry_number", "library", "run_parts"]

#: candidates in a tile
LANES = 32

_SOURCES = Path(__file__).parent / "cpp"
#: floating point as written, but for products fused into sums; infinities and NaN keep their meaning
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-Wno-psabi", "-shared", "-fPIC",
)  # fmt: skip


def geometry_number(levels: Levels, *, scaled: bool) -> int:
    """Return a geometry's number in C++; only PairRE scales its candidates, and it is a distance l1."""
    assert levels.geometry == "l1" or not scaled, levels.geometry
    return 4 if scaled else ("l1", "l2", "modulus", "product").index(levels.geometry)


_REMEDY = (
    "install g++ (or name a compiler in CXX, and a folder for programs that can be written to in XDG_CACHE_HOME), or "
    "set runtime.kernels to torch, which is slower"
)


@functools.cache
def library() -> ctypes.CDLL:
    """Return the loaded kernels, compiling them first where that has not been done on this kind of machine.

    Raises:
        UnsupportedError: there is no C++ compiler, or it fails; names the way out.

    """
    sources = sorted(_SOURCES.iterdir())
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "g++"
    # Machine code for one processor may be illegal on another that shares the home directory.
    libc = " ".join(platform.libc_ver())
    facts = [compiler, *_FLAGS, _processor(), libc, *(source.read_text(encoding="utf-8") for source in sources)]
    name = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medscale"
    path = cache / f"kernels-{name}.so"
    if not path.exists():
        _compile(compiler, [str(source) for source in sources if source.suffix == ".cpp"], path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise UnsupportedError(f"the CPU kernels cannot be loaded: {error}; {_REMEDY}") from error


def _compile(compiler: str, sources: list[str], path: Path) -> None:
    if shutil.which(compiler) is None:
        raise UnsupportedError(f"the CPU kernels need a C++ compiler, and there is no {compiler}; {_REMEDY}")
    log("compiling the CPU kernels for this processor (some seconds, once)")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Under another name first: several processes may compile at once, and none may load half a file.
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            built = Path(scratch) / path.name
            done = subprocess.run([compiler, *_FLAGS, "-o", str(built), *sources], capture_output=True, text=True)
            if done.returncode:
                raise UnsupportedError(
                    f"{compiler} could not compile the CPU kernels; {_REMEDY}\n{done.stderr[-2000:]}"
                )
            built.replace(path)
    except OSError as error:
        raise UnsupportedError(f"the CPU kernels cannot be compiled into {path.parent}: {error}; {_REMEDY}") from error


def _processor() -> str:
    """Return what tells this kind of processor from others: its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def function(name: str, dtype: torch.dtype) -> Callable[..., Any]:
    """Return a kernel's function for tensors of a type."""
    loaded: Callable[..., Any] = getattr(
        library(), f"{name}_{ {torch.float32: 'float', torch.float64: 'double'}[dtype] }"
    )
    return loaded


def arguments(*values: Tensor | float | None) -> Any:
    """Return a C++ struct of these fields, by reference: whole numbers, floats, and contiguous CPU tensors' addresses.

    Fields stand in the order of the struct's. The tensors must outlive the calls that get it.
    """
    fields = [_field(value) for value in values]
    return ctypes.byref(_struct(tuple(type(field) for field in fields))(*fields))


@functools.cache
def _struct(kinds: tuple[type, ...]) -> type[ctypes.Structure]:
    return type("Arguments", (ctypes.Structure,), {"_fields_": [(f"_{i}", kind) for i, kind in enumerate(kinds)]})


def _field(value: Tensor | float | None) -> Any:
    if isinstance(value, Tensor):
        assert value.is_contiguous(), value.shape
        assert value.device.type == "cpu", value.device
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)


def run_parts(function: Callable[..., Any], count: int, *arguments: Any, multiple: int = 1) -> None:
    """Call a kernel for range(count), in parts on as many threads as torch uses; `cpp/parts.h` says how.

    Whole numbers among the arguments become int64. Parts begin at multiples of `multiple`.
    """
    numbers = (*arguments, count, multiple, torch.get_num_threads())
    function(*(ctypes.c_int64(value) if isinstance(value, int) else value for value in numbers))
