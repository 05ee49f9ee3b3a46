"""The custom call of the CUDA kernel, a JAX primitive of its own.

It is one because part of what the kernel is told is known only when a program is lowered: which
processes are in an expert group, and what tells a call from the others of the program.
"""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from flashmoe_jax import runtime
from flashmoe_jax.custom_call import ACTIVATIONS, refuse_vmap
from flashmoe_jax.local_call import LocalCall

_TARGET = "flashmoe_forward"


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """What is known of a call when it is traced.

    Attributes:
        call: The call.
        exact: Products of float32 have its precision, not that of TF32.
        deadline_seconds: Of every wait.
        routes: The kernel routes; else the caller does.
    """

    call: LocalCall
    exact: bool
    deadline_seconds: float
    routes: bool

    def attributes(self) -> dict[str, Any]:
        """Those of the custom call; their types are those of the C++ CallAttributes."""
        config = self.call.config
        router = config.router
        capacity = self.call.capacity
        return {
            "num_pes": np.int64(self.call.num_pes),
            "num_experts": np.int64(config.num_experts),
            "experts_per_token": np.int64(config.experts_per_token),
            "capacity": np.int64(-1 if capacity is None else capacity),
            "max_rows": np.int64(self.call.max_rows),
            "exact": np.bool_(self.exact),
            "activation": np.int64(ACTIVATIONS.index(config.activation)),
            "deadline_seconds": np.float64(self.deadline_seconds),
            "check_weights": np.bool_(self.call.check_routing),
            "routes": np.bool_(self.routes),
            "softmax": np.bool_(router.score == "softmax"),
            "renormalize": np.bool_(router.renormalize),
            "scaling_factor": np.float64(router.scaling_factor),
            "num_groups": np.int64(router.num_groups),
            "groups_per_token": np.int64(router.groups_per_token),
        }


def call_kernel(
    kernel: KernelCall, results: tuple[Any, ...], *operands: jax.Array
) -> list[jax.Array]:
    """Calls the kernel, once for all PEs, so never under `vmap`.

    Args:
        kernel: What it computes.
        results: Types of the results, see `custom_call.result`.
        *operands: In the order of the C++ enum Operand (kernels/cuda/ffi_handlers.cc).
    """
    bind = functools.partial(_forward.bind, kernel=kernel, results=results)
    made: list[jax.Array] = refuse_vmap(bind)(*operands)
    return made


_forward = Primitive(_TARGET)
_forward.multiple_results = True


@_forward.def_impl
def _execute(*operands: jax.Array, **parameters: Any) -> Any:
    with jax.disable_jit(False):
        return jax.jit(functools.partial(_forward.bind, **parameters))(*operands)


@_forward.def_abstract_eval
def _types(*_: Any, kernel: KernelCall, results: tuple[Any, ...]) -> tuple[Any, ...]:
    return results


def _lower(
    context: mlir.LoweringRuleContext, *operands: Any, kernel: KernelCall, results: tuple[Any, ...]
) -> Any:
    groups = np.zeros((0,), np.int32)
    if kernel.call.axis is not None and kernel.call.num_pes > 1:
        # Inside a shard_map, which is where calls with an axis are, this is its mesh.
        mesh = context.module_context.axis_context.mesh  # type: ignore[union-attr]
        groups = runtime.process_groups(mesh, kernel.call.axis).reshape(-1)
    lowering = jax.ffi.ffi_lowering(_TARGET)
    return lowering(
        context, *operands, **kernel.attributes(), groups=groups, tag=_tag(context.module_context)
    )


# JAX lowers equal operations of a program once, and the calls that come of it would have one tag.
# Where tags matter, `LocalCall.site` makes calls unequal that were traced apart.
mlir.register_lowering(_forward, _lower, platform="cuda", cacheable=False)


def _tag(module: mlir.ModuleContext) -> np.int64:
    """A number that no other call most likely has, the same in every process.

    All processes lower the same programs, each in the same order: it is made of the name of the
    program and of the call's place in it.
    """
    name = mlir.ir.StringAttr(module.module.operation.attributes["sym_name"]).value
    return np.int64(zlib.crc32(f"{name} {module.new_channel()}".encode()))
