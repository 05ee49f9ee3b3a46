"""Who competes, by name: the operator, and what a JAX user would use instead of it.

All of them include the router, take the same sharded or unsharded arrays, and return the same
results. Those that are not the operator's own implementations are written as users write them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

import flashmoe_jax as fm
from benchmarks import torch_opponents
from benchmarks.cases import Case, Semantics
from benchmarks.program import EXPERT_AXIS, JaxProgram, Program, config, mesh
from flashmoe_jax import _ffi
from flashmoe_jax.params import partition_specs

Family = Literal["fused", "xla", "torch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opponent:
    """A way to compute a layer.

    Attributes:
        name: Its key in `OPPONENTS`.
        family: Whose it is.
        semantics: Which rows it keeps.
        one_device: It computes the whole batch on one device, whatever the number of PEs.
        build: Makes the program of a case.
        unavailable: Why it cannot compute a case here, or None.
        settle_seconds: Time after a call in which its threads still spin.
    """

    name: str
    family: Family
    semantics: Semantics
    one_device: bool = False
    build: Callable[[Case], Program]
    unavailable: Callable[[Case], str | None] = lambda case: None
    settle_seconds: float = 0.0


def _operator(
    implementation: Literal["fused", "xla", "dense"], semantics: Semantics, *, one_device: bool
) -> Callable[[Case], Program]:
    def build(case: Case) -> Program:
        num_pes = 1 if one_device else case.num_pes
        layer_config, here = config(case, semantics), mesh(num_pes)

        def layer(x: jax.Array, params: fm.MoEParams) -> jax.Array:
            return fm.moe(x, params, layer_config, mesh=here, implementation=implementation)[0]

        return JaxProgram(case, layer, num_pes)

    return build


def _why_not_fused(case: Case) -> str | None:
    return _ffi.unavailable_reason(jax.default_backend())


def _ragged_dot(case: Case) -> Program:
    """Rows sorted by expert on one device, and `lax.ragged_dot`."""
    layer_config = config(case, "dropless")
    experts, slots = case.shape.num_experts, case.shape.experts_per_token

    def layer(x: jax.Array, params: fm.MoEParams) -> jax.Array:
        routing = fm.route(x, params, layer_config)
        expert = routing.indices.reshape(-1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=experts).astype(jnp.int32)
        outputs = _ffn(
            x[order // slots],
            params,
            lambda rows, weight: lax.ragged_dot(
                rows, weight, sizes, preferred_element_type=jnp.float32
            ),
        )
        by_slot = outputs[jnp.argsort(order)].reshape(case.tokens, slots, -1)
        return _combine(by_slot, routing.weights, x.dtype)

    return JaxProgram(case, layer, 1)


def _all_to_all(case: Case) -> Program:
    """The exchange of GShard (arXiv 2006.16668): every PE has places of its own at every expert."""
    layer_config = config(case, "dropless")
    num_pes, experts, slots = case.num_pes, case.shape.num_experts, case.shape.experts_per_token
    places = case.capacity("capacity per source")
    assert places is not None  # these semantics have one
    local_experts = experts // num_pes

    def local_layer(x: jax.Array, params: fm.MoEParams) -> jax.Array:
        tokens, hidden = x.shape
        routing = fm.route(x, params, layer_config)
        expert = routing.indices.reshape(-1)
        chosen = jax.nn.one_hot(expert, experts, dtype=jnp.int32)
        place = (jnp.cumsum(chosen, axis=0) * chosen).sum(1) - 1
        sent = jnp.zeros((experts, places, hidden), x.dtype)
        rows = x[jnp.arange(expert.size) // slots]
        sent = sent.at[expert, place].set(rows, mode="drop")
        received = _exchange(sent.reshape(num_pes, local_experts, places, hidden))
        received = received.swapaxes(0, 1).reshape(local_experts, num_pes * places, hidden)
        outputs = _ffn(
            received,
            params,
            lambda rows, weight: jnp.einsum(
                "ecm,emn->ecn", rows, weight, preferred_element_type=jnp.float32
            ),
        )
        outputs = outputs.reshape(local_experts, num_pes, places, hidden).swapaxes(0, 1)
        returned = _exchange(outputs).reshape(experts, places, hidden)
        by_slot = returned.at[expert, place].get(mode="fill", fill_value=0)
        return _combine(by_slot.reshape(tokens, slots, hidden), routing.weights, x.dtype)

    def _exchange(blocks: jax.Array) -> jax.Array:
        if num_pes == 1:
            return blocks
        return lax.all_to_all(blocks, EXPERT_AXIS, split_axis=0, concat_axis=0, tiled=True)

    here = mesh(num_pes)
    if here is None:
        return JaxProgram(case, local_layer, num_pes)
    tokens = PartitionSpec(EXPERT_AXIS)
    layer = jax.shard_map(
        local_layer,
        mesh=here,
        in_specs=(tokens, partition_specs(layer_config, EXPERT_AXIS)),
        out_specs=tokens,
    )
    return JaxProgram(case, layer, num_pes)


def _ffn(
    rows: jax.Array, params: fm.MoEParams, product: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """The experts on their rows, in the dtype of the rows, with products summed in float32."""
    hidden = product(rows, params.up)
    if params.gate is None:
        hidden = jax.nn.silu(hidden)
    else:
        hidden = jax.nn.silu(product(rows, params.gate)) * hidden
    return product(hidden.astype(rows.dtype), params.down).astype(rows.dtype)


def _combine(by_slot: jax.Array, weights: jax.Array, dtype: Any) -> jax.Array:
    """[T, H]: weighted sums of [T, K, H] over the slots, in float32."""
    return jnp.einsum("tkh,tk->th", by_slot.astype(jnp.float32), weights).astype(dtype)


def _opponents() -> dict[str, Opponent]:
    opponents = [
        Opponent(
            name=name,
            family="fused",
            semantics=semantics,
            build=_operator("fused", semantics, one_device=False),
            unavailable=_why_not_fused,
        )
        for name, semantics in _FUSED
    ]
    opponents += [
        Opponent(
            name=name,
            family="xla",
            semantics=semantics,
            one_device=one_device,
            build=_operator(implementation, semantics, one_device=one_device),
        )
        for name, implementation, semantics, one_device in _XLA
    ]
    opponents += [
        Opponent(
            name="xla-all-to-all",
            family="xla",
            semantics="capacity per source",
            build=_all_to_all,
        ),
        Opponent(
            name="ragged-dot",
            family="xla",
            semantics="dropless",
            one_device=True,
            build=_ragged_dot,
        ),
    ]
    opponents += [
        Opponent(
            name=name,
            family="torch",
            semantics="dropless",
            one_device=True,
            build=build,
            unavailable=unavailable,
            settle_seconds=torch_opponents.SETTLE_SECONDS,
        )
        for name, build, unavailable in torch_opponents.OPPONENTS
    ]
    return {opponent.name: opponent for opponent in opponents}


_FUSED: tuple[tuple[str, Semantics], ...] = (
    ("fused", "dropless"),
    ("fused-capacity", "capacity"),
)
_XLA: tuple[tuple[str, Literal["xla", "dense"], Semantics, bool], ...] = (
    ("xla", "xla", "dropless", False),
    ("xla-capacity", "xla", "capacity", False),
    ("xla-capacity-one-device", "xla", "capacity", True),
    ("dense", "dense", "dropless", True),
)

OPPONENTS = _opponents()
