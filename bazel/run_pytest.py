"""Runs pytest on the package beside this folder, even where another one is installed."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
PATH = os.pathsep.join(map(str, (ROOT, ROOT / "bazel" / "site")))


def main() -> None:
    """Runs pytest with the arguments of the command."""
    if os.environ.get("PYTHONPATH") != PATH:
        # Also for the processes that tests start.
        os.environ["PYTHONPATH"] = PATH
        os.execv(sys.executable, [sys.executable, *sys.argv])
    import pytest

    import flashmoe_jax
    from flashmoe_jax import _ffi

    for module in (flashmoe_jax, _ffi.extension()):
        assert Path(module.__file__ or "").is_relative_to(ROOT), f"{module} is another one"
    sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
