"""The parameters of a layer: canonical layout, shapes, initial values and partition specs."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flashmoe_jax.config import MoEConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedParams:
    """The shared experts as one FFN of width S*D.

    Attributes:
        gate: [H, S*D], or None when the experts are not gated.
        up: [H, S*D].
        down: [S*D, H].
    """

    gate: jax.Array | None
    up: jax.Array
    down: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEParams:
    """The parameters of a layer. Inside a shard_map E is E/P in all fields of the experts.

    Attributes:
        router: [H, E], any floating dtype; used in float32.
        selection_bias: [E], or None without `RouterConfig.selection_bias`.
        gate: [E, H, D], or None when the experts are not gated.
        up: [E, H, D].
        down: [E, D, H].
        gate_bias: [E, D], or None without `use_bias` or gate.
        up_bias: [E, D], or None without `use_bias`.
        down_bias: [E, H], or None without `use_bias`.
        shared: The shared experts, or None without them.
    """

    router: jax.Array
    selection_bias: jax.Array | None
    gate: jax.Array | None
    up: jax.Array
    down: jax.Array
    gate_bias: jax.Array | None = None
    up_bias: jax.Array | None = None
    down_bias: jax.Array | None = None
    shared: SharedParams | None = None


# The fields that the PEs of a group share out among themselves, along axis 0.
EXPERT_FIELDS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


def abstract_params(
    config: MoEConfig, dtype: jax.typing.DTypeLike = jnp.float32, *, num_experts: int | None = None
) -> MoEParams:
    """Shapes and dtypes of the parameters, as `jax.ShapeDtypeStruct` leaves.

    Args:
        config: The layer.
        dtype: Of the experts; router and selection bias are float32.
        num_experts: Leading size of the experts' fields; None: all E of the layer.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    experts = config.num_experts if num_experts is None else num_experts

    def array(present: bool, *shape: int, dtype: jax.typing.DTypeLike = dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype) if present else None

    shared_inner = config.num_shared_experts * inner
    shared = SharedParams(
        gate=array(config.gated, hidden, shared_inner),
        up=array(True, hidden, shared_inner),
        down=array(True, shared_inner, hidden),
    )
    return MoEParams(
        router=array(True, hidden, config.num_experts, dtype=jnp.float32),
        selection_bias=array(config.router.selection_bias, config.num_experts, dtype=jnp.float32),
        gate=array(config.gated, experts, hidden, inner),
        up=array(True, experts, hidden, inner),
        down=array(True, experts, inner, hidden),
        gate_bias=array(config.use_bias and config.gated, experts, inner),
        up_bias=array(config.use_bias, experts, inner),
        down_bias=array(config.use_bias, experts, hidden),
        shared=shared if config.num_shared_experts else None,
    )


def init_params(
    key: jax.Array, config: MoEConfig, dtype: jax.typing.DTypeLike = jnp.float32
) -> MoEParams:
    """Initial parameters: weights normal with standard deviation 1/sqrt(fan in), biases zero.

    Args:
        key: A JAX random key.
        config: The layer.
        dtype: Of the experts; router and selection bias are float32.
    """
    abstract, structure = jax.tree_util.tree_flatten_with_path(abstract_params(config, dtype))
    keys = jax.random.split(key, len(abstract))

    def initial(path: tuple, leaf: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        if path[-1].name.endswith("bias"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        # Drawn in float32, so that a bfloat16 model starts at the rounded float32 model.
        weight = jax.random.normal(key, leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))
        return (weight / math.sqrt(leaf.shape[-2])).astype(leaf.dtype)

    leaves = [initial(path, leaf, key) for (path, leaf), key in zip(abstract, keys, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def partition_specs(config: MoEConfig, expert_axis: str | None) -> MoEParams:
    """Where the parameters live on a mesh: experts along `expert_axis`, everything else everywhere.

    Args:
        config: The layer.
        expert_axis: Mesh axis of the expert-parallel group; None: everything is replicated.

    Returns:
        The tree of `abstract_params`, with `PartitionSpec` leaves.
    """

    def spec(path: tuple, _: jax.ShapeDtypeStruct) -> PartitionSpec:
        of_experts = len(path) == 1 and path[0].name in EXPERT_FIELDS
        return PartitionSpec(expert_axis) if of_experts and expert_axis else PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, abstract_params(config))
