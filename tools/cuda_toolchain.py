"""Installs what compiles the CUDA kernels from PyPI, without a CUDA toolkit, and prints its folder.

Everything is pinned, in pyproject.toml: the same packages are the build requirements of a wheel
that is built with FLASHMOE_CUDA=1. Dependencies are not followed, since theirs have no versions.
The disassemblers, which only tools/check_machine_code.py needs, come along.
"""

import hashlib
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import build_requirements

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
# There is none of CUDA 13.0 on PyPI; newer ones read older code.
DISASSEMBLERS = ["nvidia-cuda-cuobjdump==13.2.86", "nvidia-cuda-nvdisasm==13.2.86"]


def bin_folder(toolchain: Path) -> Path:
    """Where nvcc, cuobjdump and their like are in a toolchain."""
    return toolchain / "nvidia" / "cu13" / "bin"


def install() -> Path:
    """Returns the folder of the toolchain, installed if it is not there yet.

    Raises:
        OSError: NVIDIA has no packages for this kind of machine.
        subprocess.CalledProcessError: pip failed; it has said why on stderr.
    """
    if (platform.system(), platform.machine()) not in {("Linux", "x86_64"), ("Linux", "aarch64")}:
        raise OSError(f"no CUDA on {platform.system()} {platform.machine()}; it needs Linux")
    pins = sorted([*build_requirements.read_cuda(), *DISASSEMBLERS])
    target = CACHE / f"cuda-toolchain-{hashlib.sha256(repr(pins).encode()).hexdigest()[:12]}"
    if target.is_dir():
        return target
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
        options = [
            "--no-deps",
            "--only-binary=:all:",
            "--no-compile",
            "--target",
            f"{work}/packages",
        ]
        subprocess.run([*pip, *options, *pins], check=True, stdout=sys.stderr)
        # Renamed as a whole, so that an interrupted run leaves nothing that looks complete.
        (Path(work) / "packages").rename(target)
    return target


if __name__ == "__main__":
    try:
        print(install())
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"The CUDA toolchain could not be installed: {error}")
