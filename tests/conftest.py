"""Eight virtual CPU devices for every test, and the meshes made of them."""

import os
from pathlib import Path
from typing import Protocol

import pytest

NUM_DEVICES = 8

# Compiling small programs well takes most of the time of these tests. The operator's own code is
# compiled before; what XLA makes of the rest is as users have it in `make test-smoke`, and on GPUs.
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_AS_USERS = os.environ.get("FLASHMOE_TESTS_AS_USERS") == "1" or Path("/dev/nvidiactl").exists()

# JAX reads this when its backend starts, so it must be set before any test module imports JAX.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} {'' if _AS_USERS else _QUICK} "
    f"--xla_force_host_platform_device_count={NUM_DEVICES}"
)

import jax  # noqa: E402
from jax.sharding import AxisType, Mesh  # noqa: E402


class MeshMaker(Protocol):
    """Makes a mesh of the first devices."""

    def __call__(self, axis_type: AxisType = AxisType.Auto, **sizes: int) -> Mesh:
        """The mesh whose axes have these names and sizes, major first."""


@pytest.fixture(scope="session")
def make_mesh() -> MeshMaker:
    def make(axis_type: AxisType = AxisType.Auto, **sizes: int) -> Mesh:
        shape = tuple(sizes.values())
        count = 1
        for size in shape:
            count *= size
        return jax.make_mesh(
            shape, tuple(sizes), (axis_type,) * len(shape), devices=jax.devices()[:count]
        )

    return make
