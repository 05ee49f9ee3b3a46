"""Everything that is checked before a call, in one place: arrays, mesh and axes."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh

from flashmoe_jax.config import MoEConfig
from flashmoe_jax.params import MoEParams, abstract_params
from flashmoe_jax.routing import Routing

TOKEN_DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_arrays(
    x: jax.Array,
    params: MoEParams,
    config: MoEConfig,
    routing: Routing | None,
    mask: jax.Array | None,
    num_experts: int,
) -> None:
    """Checks shapes and dtypes, and the values of a routing that is already known.

    Args:
        x: Must be [..., H] of one of `TOKEN_DTYPES`.
        params: Must have the shapes of `abstract_params` and, but for the router, the dtype of x.
        config: The layer.
        routing: Must have the leading dimensions of x.
        mask: Must have the leading dimensions of x.
        num_experts: Experts that the experts' fields must hold.

    Raises:
        TypeError: A type or dtype is wrong.
        ValueError: A shape is wrong, or a value of a concrete routing is.
    """
    _check_tokens(x, config)
    _check_params(params, config, x.dtype, num_experts)
    if mask is not None:
        if mask.dtype != jnp.bool_:
            raise TypeError(f"mask has dtype {mask.dtype}; pass booleans")
        _require_shape("mask", mask, x.shape[:-1], "the leading dimensions of x")
    if routing is not None:
        _check_routing(routing, config, x.shape[:-1])


def _check_tokens(x: jax.Array, config: MoEConfig) -> None:
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(f"x is a {type(x).__name__}; pass an array")
    if x.dtype.name not in TOKEN_DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; cast it to one of {', '.join(TOKEN_DTYPES)}")
    if x.ndim < 2:
        raise ValueError(
            f"x has shape {x.shape}; it must be [..., hidden_size] with at least one dimension of "
            "tokens, so for one token pass x[None]"
        )
    if x.shape[-1] != config.hidden_size:
        raise ValueError(
            f"x has shape {x.shape}, so its tokens are {x.shape[-1]} wide; "
            f"config.hidden_size={config.hidden_size}"
        )


def _check_params(params: MoEParams, config: MoEConfig, dtype: Any, num_experts: int) -> None:
    if not isinstance(params, MoEParams):
        raise TypeError(f"params is a {type(params).__name__}; pass flashmoe_jax.MoEParams")
    expected = _by_name(abstract_params(config, dtype, num_experts=num_experts))
    given = _by_name(params)
    for name in expected.keys() | given.keys():
        if name not in given:
            raise ValueError(
                f"params.{name} is None, but the config asks for shape {expected[name].shape}; "
                "make params with init_params(key, config)"
            )
        if name not in expected:
            raise ValueError(
                f"params.{name} has shape {given[name].shape}, but the config has no such "
                "parameter; pass None"
            )
    for name, leaf in expected.items():
        _require_shape(f"params.{name}", given[name], leaf.shape, "the config")
        if name in ("router", "selection_bias"):
            if not jnp.issubdtype(given[name].dtype, jnp.floating):
                raise TypeError(f"params.{name} has dtype {given[name].dtype}; it must be floating")
        elif given[name].dtype != dtype:
            raise TypeError(
                f"params.{name} has dtype {given[name].dtype} and x has {dtype}; cast one of them, "
                "for example params to x.dtype"
            )


def _check_routing(routing: Routing, config: MoEConfig, lead: tuple[int, ...]) -> None:
    if not isinstance(routing, Routing):
        raise TypeError(f"routing is a {type(routing).__name__}; pass flashmoe_jax.Routing")
    indices, weights, logits = routing.indices, routing.weights, routing.logits
    slots = (*lead, config.experts_per_token)
    shape_of = "the leading dimensions of x, then experts_per_token"
    _require_shape("routing.indices", indices, slots, shape_of)
    _require_shape("routing.weights", weights, slots, shape_of)
    if not jnp.issubdtype(indices.dtype, jnp.signedinteger):
        raise TypeError(f"routing.indices has dtype {indices.dtype}; pass int32")
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise TypeError(f"routing.weights has dtype {weights.dtype}; pass float32")
    if logits is not None:
        experts = (*lead, config.num_experts)
        _require_shape("routing.logits", logits, experts, "the leading dimensions of x, then E")
        if not jnp.issubdtype(logits.dtype, jnp.floating):
            raise TypeError(f"routing.logits has dtype {logits.dtype}; pass float32")
    if _is_readable(indices) and _is_readable(weights):
        _check_routing_values(np.asarray(indices), np.asarray(weights), config.num_experts)


def _check_routing_values(indices: np.ndarray, weights: np.ndarray, num_experts: int) -> None:
    bad = (indices < -1) | (indices >= num_experts)
    if bad.any():
        place = tuple(map(int, np.argwhere(bad)[0]))
        raise ValueError(
            f"routing.indices{list(place)} is {indices[place]}; it must be an expert from 0 to "
            f"{num_experts - 1}, or -1 to mask the slot"
        )
    bad = (indices >= 0) & ~np.isfinite(weights)
    if bad.any():
        place = tuple(map(int, np.argwhere(bad)[0]))
        raise ValueError(
            f"routing.weights{list(place)} is {weights[place]}; it must be finite unless "
            "routing.indices masks the slot with -1"
        )


def _is_readable(array: Any) -> bool:
    """Whether the values are known now, in this process."""
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)


def _by_name(params: MoEParams) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {".".join(key.name for key in path): leaf for path, leaf in leaves}


def _require_shape(name: str, array: jax.Array, shape: tuple[int, ...], source: str) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; it must be {shape} ({source})")


def check_global_mesh(mesh: Mesh | AbstractMesh | None) -> Mesh | AbstractMesh | None:
    """The mesh of a `moe` call: the given one, else that of `jax.set_mesh`, else None.

    Raises:
        ValueError: `moe` is called inside a shard_map, or two meshes contradict each other.
    """
    context = jax.sharding.get_abstract_mesh()
    if context.manual_axes:
        raise ValueError(
            f"moe was called inside a shard_map over {context.manual_axes}; call moe_local there, "
            "or moe outside"
        )
    if mesh is None:
        return None if context.empty else context
    if not context.empty and mesh.shape != context.shape:
        raise ValueError(
            f"mesh has axes {dict(mesh.shape)}, but jax.set_mesh made {dict(context.shape)} "
            "current; pass no mesh, or the same"
        )
    return mesh


def check_local_mesh() -> AbstractMesh:
    """The mesh of the fully manual shard_map around a `moe_local` call.

    Raises:
        ValueError: There is no shard_map, or it leaves an axis to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes:
        raise ValueError("moe_local was called outside of a shard_map; call moe there")
    rest = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    ]
    if rest:
        raise ValueError(
            f"moe_local was called in a shard_map that is manual over {mesh.manual_axes} but not "
            f"over {tuple(rest)}; leave axis_names out of that shard_map, so that all are manual"
        )
    return mesh


def varying_token_axes(mesh: AbstractMesh, x: jax.Array) -> tuple[str, ...]:
    """The axes of the surrounding shard_map over which x varies, in the order of the mesh.

    Raises:
        ValueError: The shard_map has check_vma=False, so JAX does not know them.
    """
    if not jax.typeof(lax.axis_index(mesh.axis_names[0])).manual_axis_type.varying:
        raise ValueError(
            "moe_local cannot see over which mesh axes x varies in a shard_map with "
            "check_vma=False; pass token_axes"
        )
    varying = jax.typeof(x).manual_axis_type.varying
    return tuple(axis for axis in mesh.axis_names if axis in varying)


def check_axes(
    mesh: Mesh | AbstractMesh, expert_axis: str, token_axes: Sequence[str], config: MoEConfig
) -> None:
    """Checks the names of mesh axes and how the experts divide among the PEs.

    Raises:
        TypeError: token_axes is one name instead of a tuple of names.
        ValueError: An axis does not exist or is named twice, tokens are not sharded over the
            expert axis, or E is not divisible by P.
    """
    if isinstance(token_axes, str):
        raise TypeError(f"token_axes={token_axes!r} is a name; pass a tuple, ({token_axes!r},)")
    sizes: Mapping[Hashable, int] = mesh.shape
    for name in (expert_axis, *token_axes):
        if name not in sizes:
            raise ValueError(
                f"the mesh has no axis {name!r}, its axes are {tuple(sizes)}; pass expert_axis and "
                "token_axes by the names in the mesh"
            )
    if len(set(token_axes)) != len(token_axes):
        raise ValueError(f"token_axes={token_axes} names an axis twice")
    if expert_axis not in token_axes:
        raise ValueError(
            f"token_axes={token_axes} must contain expert_axis={expert_axis!r}: every PE of a "
            "group has tokens of its own"
        )
    pes = sizes[expert_axis]
    if config.num_experts % pes:
        raise ValueError(
            f"num_experts={config.num_experts} is not divisible by the {pes} PEs of mesh axis "
            f"{expert_axis!r}; change one of them"
        )
    check_max_rows(config, config.num_experts // pes)


def check_max_rows(config: MoEConfig, local_experts: int) -> None:
    """Checks that the memory of a PE has room for a row of each of its experts.

    Raises:
        ValueError: It has not, so that a busy batch would lose all its rows.
    """
    rows = config.max_received_rows
    if rows is not None and rows < local_experts:
        raise ValueError(
            f"max_received_rows={rows} is less than the {local_experts} experts of a PE, each of "
            f"which gets the same share; allow at least {local_experts}"
        )


def token_shards(mesh: Mesh | AbstractMesh, token_axes: tuple[str, ...]) -> int:
    """In how many parts the tokens are divided."""
    return math.prod(mesh.shape[axis] for axis in token_axes)
