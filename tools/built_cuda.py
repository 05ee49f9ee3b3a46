"""A plugin of pytest: the CUDA module that `make cuda` built is that of the package."""

import sys

import _cuda  # type: ignore[import-not-found]

sys.modules["flashmoe_jax._cuda"] = _cuda
