"""A computation of a case, compiled and called."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import flashmoe_jax as fm
from benchmarks import inputs, traffic
from benchmarks.cases import Case, Semantics
from flashmoe_jax.params import partition_specs

EXPERT_AXIS = "expert"

Layer = Callable[[jax.Array, fm.MoEParams], jax.Array]


class Program(Protocol):
    """What an opponent does in one case."""

    def compile(self) -> None:
        """Traces and compiles."""

    def __call__(self) -> Any:
        """Computes, and returns when the results are there."""

    def results(self, outputs: Any) -> dict[str, np.ndarray]:
        """What a call returned, by the names of `oracle.expected`."""

    def xla_bytes(self) -> dict[str, int] | None:
        """Sizes that XLA reports for one device, by kind."""

    def moved_bytes(self) -> int | None:
        """Bytes that XLA's collectives move between devices."""


def config(case: Case, semantics: Semantics) -> fm.MoEConfig:
    """The configuration of a case's layer."""
    return fm.MoEConfig(
        num_experts=case.shape.num_experts,
        experts_per_token=case.shape.experts_per_token,
        hidden_size=case.shape.hidden,
        intermediate_size=case.shape.intermediate,
        gated=case.shape.gated,
        capacity_factor=None if semantics == "dropless" else case.capacity_factor,
    )


def mesh(num_pes: int) -> Mesh | None:
    """The mesh of so many PEs; None for one."""
    if num_pes == 1:
        return None
    devices = jax.devices()[:num_pes]
    return jax.make_mesh((num_pes,), (EXPERT_AXIS,), (AxisType.Auto,), devices=devices)


@functools.lru_cache(maxsize=4)
def operands(case: Case, num_pes: int) -> tuple[jax.Array, fm.MoEParams, jax.Array]:
    """x, parameters and cotangent on the devices of so many PEs."""
    given = inputs.inputs(case)
    p: Any = given.parameters  # NumPy arrays, where MoEParams has JAX's
    params = fm.MoEParams(router=p.router, selection_bias=None, gate=p.gate, up=p.up, down=p.down)
    values = given.x, params, given.cotangent
    here = mesh(num_pes)
    if here is None:
        return jax.device_put(values, SingleDeviceSharding(jax.devices()[0]))
    tokens = PartitionSpec(EXPERT_AXIS)
    specs = tokens, partition_specs(config(case, "dropless"), EXPERT_AXIS), tokens
    shardings = jax.tree.map(lambda spec: NamedSharding(here, spec), specs)
    return jax.device_put(values, shardings)


def clear() -> None:
    """Frees what is kept for the next case."""
    operands.cache_clear()
    inputs.clear()


class JaxProgram:
    """A layer in JAX, with its gradients if the case wants them.

    Args:
        case: The case.
        layer: y [N, H] from x [N, H] and the parameters.
        num_pes: Devices over which the operands are sharded.
    """

    def __init__(self, case: Case, layer: Layer, num_pes: int) -> None:
        def with_gradients(x: jax.Array, params: fm.MoEParams, dy: jax.Array) -> Any:
            y, pull_back = jax.vjp(layer, x, params)
            return y, *pull_back(dy)

        # The direction does not change the inputs, and kept operands serve both.
        key = dataclasses.replace(case, direction="forward", num_pes=1, opponents=())
        x, params, dy = operands(key, num_pes)
        self._arguments = (x, params, dy) if case.backward else (x, params)
        self._function = jax.jit(with_gradients if case.backward else layer)
        self._num_pes = num_pes
        self._compiled: Any = None

    def compile(self) -> None:
        """Traces and compiles."""
        self._compiled = self._function.lower(*self._arguments).compile()

    def __call__(self) -> Any:
        """Computes, and returns when the results are there."""
        return jax.block_until_ready(self._compiled(*self._arguments))

    def results(self, outputs: Any) -> dict[str, np.ndarray]:
        """What a call returned, by the names of `oracle.expected`."""
        if not isinstance(outputs, tuple):
            return {"y": np.asarray(outputs)}
        y, dx, gradients = outputs
        named = {"y": y, "d_x": dx}
        for name in ("router", "gate", "up", "down"):
            if getattr(gradients, name) is not None:
                named[f"d_{name}"] = getattr(gradients, name)
        return {name: np.asarray(value) for name, value in named.items()}

    def xla_bytes(self) -> dict[str, int] | None:
        """Sizes that XLA reports for one device, by kind."""
        analysis = self._compiled.memory_analysis()
        if analysis is None:
            return None
        return {
            kind: getattr(analysis, f"{kind}_size_in_bytes")
            for kind in ("argument", "output", "temp")
        }

    def moved_bytes(self) -> int | None:
        """Bytes that XLA's collectives move between devices."""
        if self._num_pes == 1:
            return None
        return traffic.collective_bytes(self._compiled.as_text(), self._num_pes)
