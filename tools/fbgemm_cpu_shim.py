"""Write an empty wheel `fbgemm-gpu==VERSION+cpu` that requires `fbgemm-gpu-cpu==VERSION`.

usage: python tools/fbgemm_cpu_shim.py VERSION DIRECTORY

torchrec requires `fbgemm-gpu` by name. On a machine without a GPU that name must lead to the CPU build,
which is published as `fbgemm-gpu-cpu`; both own the folder `fbgemm_gpu/`, so only one may be installed.
"""

import base64
import hashlib
import sys
import zipfile
from pathlib import Path


def write_shim(version: str, directory: Path) -> Path:
    """Write the wheel into `directory` and return its path."""
    info = f"fbgemm_gpu-{version}+cpu.dist-info"
    files = {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: fbgemm-gpu\n"
        f"Version: {version}+cpu\nSummary: names the CPU build of FBGEMM to packages that ask for the CUDA one\n"
        f"Requires-Dist: fbgemm-gpu-cpu=={version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: medscale\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},sha256={_digest(text)},{len(text)}\n" for name, text in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n"
    path = directory / f"fbgemm_gpu-{version}+cpu-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(write_shim(sys.argv[1], Path(sys.argv[2])))
