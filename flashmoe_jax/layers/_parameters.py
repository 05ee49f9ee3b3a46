"""What the NNX and the Linen layer share: names, shardings, creation and the compute dtype."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from flashmoe_jax import validation
from flashmoe_jax.config import MoEConfig
from flashmoe_jax.params import (
    EXPERT_FIELDS,
    MoEParams,
    SharedParams,
    abstract_params,
    init_params,
)

SELECTION_BIAS = "selection_bias"
NO_SELECTION_BIAS = (
    "this layer's router has no selection bias to update; configure it with "
    "RouterConfig(selection_bias=True)"
)
_ROUTER = ("router", SELECTION_BIAS)
_SHARED_PREFIX = "shared_"
_SHARED = tuple(_SHARED_PREFIX + field.name for field in dataclasses.fields(SharedParams))
NAMES = (*_ROUTER, *EXPERT_FIELDS, *_SHARED)


def flatten(params: MoEParams) -> dict[str, jax.Array]:
    """The arrays of `params` by the names of the layers: `shared.gate` is `shared_gate`."""
    named = {name: getattr(params, name) for name in (*_ROUTER, *EXPERT_FIELDS)}
    if params.shared is not None:
        for name in _SHARED:
            named[name] = getattr(params.shared, name.removeprefix(_SHARED_PREFIX))
    return {name: value for name, value in named.items() if value is not None}


def unflatten(named: Mapping[str, jax.Array]) -> MoEParams:
    """The inverse of `flatten`; what `named` lacks is None."""
    shared = {name.removeprefix(_SHARED_PREFIX): named.get(name) for name in _SHARED}
    fields = {name: named.get(name) for name in (*_ROUTER, *EXPERT_FIELDS)}
    return MoEParams(
        **fields,  # type: ignore[arg-type]
        shared=None if shared["up"] is None else SharedParams(**shared),  # type: ignore[arg-type]
    )


def shapes(config: MoEConfig, dtype: DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter that the layer has, by name."""
    return flatten(abstract_params(config, dtype))  # type: ignore[return-value]


def partition(name: str, ndim: int, expert_axis: str) -> tuple[str | None, ...]:
    """The mesh axis of every dimension of a parameter: experts are shared out, the rest is not."""
    first = expert_axis if name in EXPERT_FIELDS else None
    return (first, *(None,) * (ndim - 1))


def flax_can_shard() -> bool:
    """Whether Flax can apply sharding metadata here: it wants a mesh with one type of axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and (mesh.are_all_axes_auto or mesh.are_all_axes_explicit)


def create(
    key: jax.Array,
    config: MoEConfig,
    dtype: DTypeLike,
    *,
    mesh: Mesh | None,
    expert_axis: str,
    names: Sequence[str],
) -> dict[str, jax.Array]:
    """Initial values, every device making only the experts that are its own.

    Args:
        key: A JAX random key; the values depend on it, and not on the mesh but for their last bit.
        config: The layer.
        dtype: Of the experts and the shared experts.
        mesh: Where the experts live; None: the mesh of `jax.set_mesh`, if there is one.
        expert_axis: Mesh axis of the expert-parallel group.
        names: Which parameters, some of `shapes`.

    Returns:
        The arrays by name.

    Raises:
        ValueError: The mesh has no such axis, or its size does not divide the number of experts.
    """
    where = validation.check_global_mesh(mesh)
    if where is None:
        return _initialiser(config, jnp.dtype(dtype), tuple(names), None)(key)
    validation.check_axes(where, expert_axis, (expert_axis,), config)
    all_shapes = shapes(config, dtype)
    specs = [PartitionSpec(*partition(n, all_shapes[n].ndim, expert_axis)) for n in names]
    # A bare specification means the mesh of `jax.set_mesh`, inside a trace too.
    shardings = tuple(spec if mesh is None else NamedSharding(mesh, spec) for spec in specs)
    arrays = _initialiser(config, jnp.dtype(dtype), tuple(names), shardings)(key)
    kinds = dict(zip(where.axis_names, where.axis_types, strict=True))
    if mesh is None and kinds[expert_axis] == AxisType.Explicit:
        # Inside a trace, out_shardings do not enter the types, which Explicit axes ask for.
        arrays = jax.sharding.reshard(arrays, dict(zip(names, shardings, strict=True)))
    return arrays


@functools.lru_cache
def _initialiser(
    config: MoEConfig,
    dtype: jnp.dtype,
    names: tuple[str, ...],
    shardings: tuple[PartitionSpec | NamedSharding, ...] | None,
) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """A jitted function, cached so that the equal layers of a model compile it once."""

    def initialise(key: jax.Array) -> dict[str, jax.Array]:
        params = flatten(init_params(key, config, dtype))
        return {name: params[name] for name in names}

    by_name = None if shardings is None else dict(zip(names, shardings, strict=True))
    return jax.jit(initialise, out_shardings=by_name)


def cast(x: jax.Array, params: MoEParams, dtype: DTypeLike | None) -> tuple[jax.Array, MoEParams]:
    """Casts x and the weights of the experts to the compute dtype; the router keeps its own.

    Args:
        x: [..., H].
        params: The parameters in their own dtype.
        dtype: The compute dtype; None: what x and the experts promote to, as in Flax's layers.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x, params  # `moe` refuses it; a cast would hide the mistake.
    if dtype is None:
        dtype = jnp.result_type(x, params.up)
    named = {
        name: value if name in _ROUTER else value.astype(dtype)
        for name, value in flatten(params).items()
    }
    return x.astype(dtype), unflatten(named)
