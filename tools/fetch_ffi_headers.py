"""Fetches the XLA FFI headers that this project is built against and prints their folder.

They are those of the oldest supported jaxlib, which [build-system] of pyproject.toml pins, while a
development environment holds a newer one. So the pinned wheel is downloaded with pip and only its
headers are unpacked, once, into .cache/ffi-headers-VERSION.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import build_requirements

CACHE = Path(__file__).resolve().parent.parent / ".cache"


def fetch(jaxlib: str) -> Path:
    """Returns the include folder of the pinned jaxlib, downloaded if it is not there yet.

    Args:
      jaxlib: The pin, "jaxlib==VERSION".

    Raises:
      subprocess.CalledProcessError: pip could not download the wheel; it has said why on stderr.
    """
    target = CACHE / f"ffi-headers-{jaxlib.removeprefix('jaxlib==')}"
    if target.is_dir():
        return target / "include"
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", work, jaxlib], check=True, stdout=sys.stderr)
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            headers = [n for n in archive.namelist() if n.startswith("jaxlib/include/")]
            archive.extractall(work, headers)
        # Renamed as a whole, so that an interrupted run leaves nothing that looks complete.
        (Path(work) / "jaxlib").rename(target)
    return target / "include"


if __name__ == "__main__":
    pin, _ = build_requirements.read()
    try:
        print(fetch(pin))
    except subprocess.CalledProcessError:
        sys.exit(f"The headers of {pin} could not be downloaded; see pip's message above.")
