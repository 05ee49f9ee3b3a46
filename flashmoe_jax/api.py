"""The operator: `moe` on global arrays and `moe_local` inside a shard_map of the caller."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from flashmoe_jax import _ffi, validation
from flashmoe_jax.config import MoEConfig, deadline_seconds
from flashmoe_jax.local_call import LocalCall, local_call
from flashmoe_jax.params import MoEParams, partition_specs
from flashmoe_jax.reference.dense import dense
from flashmoe_jax.reference.ffn import shared_experts
from flashmoe_jax.reference.xla import xla_local
from flashmoe_jax.routing import (
    Routing,
    RoutingSums,
    accumulation_dtype,
    losses,
    route_from,
    routing_sums,
)

Implementation = Literal["auto", "fused", "xla", "dense"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEAux:
    """What a layer reports about the whole batch.

    Attributes:
        load_balance_loss: [] float32, see `flashmoe_jax.load_balance_loss`.
        z_loss: [] float32, see `flashmoe_jax.z_loss`.
        tokens_per_expert: [E] int32, rows routed to each expert, before any are dropped.
        dropped: [] int32, rows dropped because of the capacity or of max_received_rows.
    """

    load_balance_loss: jax.Array
    z_loss: jax.Array
    tokens_per_expert: jax.Array
    dropped: jax.Array


@dataclasses.dataclass(frozen=True)
class _Sharding:
    """Where the tokens and experts of a call are. Without a mesh there is one PE."""

    mesh: Mesh | AbstractMesh | None
    expert_axis: str | None
    token_axes: tuple[str, ...]

    @property
    def num_pes(self) -> int:
        return 1 if self.mesh is None else self.mesh.shape[self.expert_axis]

    @property
    def token_shards(self) -> int:
        return 1 if self.mesh is None else validation.token_shards(self.mesh, self.token_axes)


class _Tokens(NamedTuple):
    """Everything that is sharded with the tokens: x [..., H], routing [..., K], mask [...]."""

    x: jax.Array
    routing: Routing | None
    mask: jax.Array | None


def moe(
    x: jax.Array,
    params: MoEParams,
    config: MoEConfig,
    routing: Routing | None = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    expert_axis: str = "expert",
    token_axes: tuple[str, ...] | None = None,
    implementation: Implementation = "auto",
    key: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, MoEAux]:
    """A Mixture-of-Experts layer on global arrays, under `jit` or eagerly.

    Args:
        x: [..., H] tokens, float32, bfloat16 or float16 ("xla" and "dense" also take float64).
            Best for a batch whose first dimension is divisible by the token shards: then each
            device computes the part of x that it holds. Otherwise x is flattened and padded.
        params: The parameters, of the dtype of x but for the router; see `init_params`.
        config: The layer.
        routing: The caller's own routing, with the leading dimensions of x. A token may name an
            expert more than once. None: `route(x, params, config, key=key, mask=mask)`.
        mesh: Mesh over which the call is sharded. None: that of `jax.set_mesh`; without one, the
            call runs on one device.
        expert_axis: Mesh axis along which the experts are sharded.
        token_axes: Mesh axes over which the tokens are sharded, major first, expert_axis among
            them. None: those of "data" and expert_axis that the mesh has.
        implementation: "fused" (the custom call), "xla" (XLA collectives, every platform), "dense"
            (the oracle: every expert computes every token), or "auto": fused on CPUs and on one GPU
            if it is there, else xla, with a warning that says why.
        key: Random key of the router's jitter; None: no jitter.
        mask: [...] bool; the routed experts ignore a token where it is False. None: all tokens.

    Returns:
        y [..., H] in the dtype of x, and a `MoEAux`. Where a traced `routing` is invalid, y of a
        token is NaN with "xla" or "dense". "fused" raises on CPUs; on GPUs y is NaN, and the next
        call on the same heap raises, or `flashmoe_jax.runtime.check()`.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: A wrong shape, axis, or value; an implementation that is not available.
    """
    mesh = validation.check_global_mesh(mesh)
    if mesh is None:
        sharding = _Sharding(None, None, ())
        validation.check_max_rows(config, config.num_experts)
    else:
        if token_axes is None:
            token_axes = tuple(a for a in ("data", expert_axis) if a in mesh.shape)
        validation.check_axes(mesh, expert_axis, token_axes, config)
        sharding = _Sharding(mesh, expert_axis, tuple(token_axes))
    validation.check_arrays(x, params, config, routing, mask, config.num_experts)
    implementation = _choose_implementation(implementation, mesh, x.dtype, config, sharding.num_pes)
    if implementation == "fused":
        # Part of what `_moe` is compiled for, so that a changed environment counts.
        config = dataclasses.replace(config, deadline_seconds=deadline_seconds(config))
    return _moe(
        _Tokens(x, routing, mask),
        params,
        key,
        config=config,
        sharding=sharding,
        implementation=implementation,
        site=_site(implementation, sharding, (x, params, routing, mask)),
    )


def moe_local(
    x: jax.Array,
    params: MoEParams,
    config: MoEConfig,
    routing: Routing | None = None,
    *,
    expert_axis: str,
    token_axes: tuple[str, ...] | None = None,
    implementation: Implementation = "auto",
    key: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, MoEAux]:
    """`moe` inside a caller's shard_map, which must be manual over all axes of its mesh.

    Args:
        x: [..., H] tokens of this device; every device has the same number.
        params: The parameters, those of the experts restricted to the E/P of this device.
        config: The layer; `num_experts` counts those of all devices.
        routing: The caller's own routing of these tokens, by global expert index, or None.
        expert_axis: Mesh axis of the expert-parallel group.
        token_axes: Mesh axes over which the tokens differ, major first, expert_axis among them.
            None: the axes over which x varies, in the order of the mesh; with check_vma=False JAX
            does not track them, so they must be given.
        implementation: "auto", "fused" or "xla", as for `moe`.
        key: Random key of the router's jitter, the same on all devices; None: no jitter.
        mask: [...] bool, or None, as for `moe`.

    Returns:
        y [..., H] in the dtype of x, and a `MoEAux` of the tokens of all devices along token_axes.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: A wrong shape, axis, or value; no shard_map, or one that is partially manual;
            an implementation that is not available.
    """
    mesh = validation.check_local_mesh()
    if token_axes is None:
        token_axes = validation.varying_token_axes(mesh, x)
    validation.check_axes(mesh, expert_axis, token_axes, config)
    num_pes = mesh.shape[expert_axis]
    validation.check_arrays(x, params, config, routing, mask, config.num_experts // num_pes)
    if implementation == "dense":
        raise ValueError(
            "implementation='dense' computes on global arrays; use 'xla' here, or moe outside of "
            "the shard_map"
        )
    sharding = _Sharding(mesh, expert_axis, tuple(token_axes))
    implementation = _choose_implementation(implementation, mesh, x.dtype, config, num_pes)
    return _moe_shard(
        _Tokens(x, routing, mask),
        params,
        key,
        config=config,
        sharding=sharding,
        implementation=implementation,
        group_tokens=num_pes * math.prod(x.shape[:-1]),
        site=_site(implementation, sharding, (x, params, routing, mask)),
    )


@functools.partial(
    jax.jit, static_argnames=("config", "sharding", "implementation", "site"), inline=True
)
def _moe(
    tokens: _Tokens,
    params: MoEParams,
    key: jax.Array | None,
    *,
    config: MoEConfig,
    sharding: _Sharding,
    implementation: Implementation,
    site: object | None,
) -> tuple[jax.Array, MoEAux]:
    """`moe` after validation. Jitted, so that an eager call is compiled, and only once."""
    x, shards = tokens.x, sharding.token_shards
    num_tokens = math.prod(x.shape[:-1])
    compute: Callable[..., tuple[jax.Array, MoEAux]] = functools.partial(
        _moe_shard, implementation=implementation, site=site
    )
    if implementation == "dense":
        compute, params = _moe_dense, _replicate(params)
    compute = functools.partial(
        compute,
        config=config,
        sharding=sharding,
        group_tokens=math.ceil(num_tokens * sharding.num_pes / shards),
    )
    # A first dimension that divides is sharded as it is, so that a sharded batch need not move.
    flatten = implementation == "dense" or x.shape[0] % shards != 0
    if flatten:
        tokens = _flatten(_replicate(tokens), x.ndim - 1, padding=-num_tokens % shards)
    if sharding.mesh is not None and implementation != "dense":
        token_spec = PartitionSpec(sharding.token_axes)
        specs = (
            jax.tree.map(lambda _: token_spec, tokens),
            partition_specs(config, sharding.expert_axis),
        )
        tokens, params = _reshard((tokens, params), specs, sharding.mesh)
        compute = jax.shard_map(
            compute,
            mesh=sharding.mesh,
            in_specs=(*specs, PartitionSpec()),
            out_specs=(token_spec, PartitionSpec()),
        )
    y, aux = compute(tokens, params, key)
    if flatten:
        y = _replicate(y)[:num_tokens].reshape(x.shape)
    return _reshard_like(x, y), aux


def _moe_shard(
    tokens: _Tokens,
    params: MoEParams,
    key: jax.Array | None,
    *,
    config: MoEConfig,
    sharding: _Sharding,
    implementation: Implementation,
    group_tokens: int,
    site: object | None,
) -> tuple[jax.Array, MoEAux]:
    """The layer on one device: inside a fully manual shard_map, or anywhere without a mesh."""
    shape = tokens.x.shape
    num_tokens = math.prod(shape[:-1])
    # No collective takes an empty operand.
    tokens = _flatten(tokens, len(shape) - 1, padding=1 if num_tokens == 0 else 0)
    x = tokens.x
    call = local_call(
        config,
        axis=sharding.expert_axis,
        num_pes=sharding.num_pes,
        tokens_per_pe=x.shape[0],
        group_tokens=group_tokens,
        caller_routing=tokens.routing is not None,
        site=site,
    )
    y, dropped, routing = _computed(implementation, tokens, params, key, call, sharding)
    if params.shared is not None:
        y = y + shared_experts(x, params.shared, config)
    totals = routing_sums(routing, config), dropped
    if sharding.token_axes:
        totals = lax.psum(totals, sharding.token_axes)
    return y[:num_tokens].reshape(shape), _aux(*totals)


def _computed(
    implementation: Implementation,
    tokens: _Tokens,
    params: MoEParams,
    key: jax.Array | None,
    call: LocalCall,
    sharding: _Sharding,
) -> tuple[jax.Array, jax.Array, Routing]:
    """The routed experts' part of y [T, H], dropped [], and the routing, of this device."""
    config, axis = call.config, sharding.expert_axis
    compute: Callable[..., tuple[jax.Array, jax.Array]] = xla_local
    if implementation == "fused" and _platform(sharding.mesh) in _ffi.CUDA_PLATFORMS:
        from flashmoe_jax.fused_cuda import fused_cuda_local, routed_cuda_local

        if tokens.routing is None and (key is None or config.router.jitter == 0.0):
            unrouted = tokens.x, tokens.mask, dataclasses.replace(params, shared=None)
            if axis is not None:
                unrouted = _vary_alike(unrouted, axis)
            return routed_cuda_local(*unrouted, call)
        compute = fused_cuda_local
    elif implementation == "fused":
        from flashmoe_jax.fused import fused_local  # Loads the extension of the CPU engine.

        compute = fused_local
    shard = lax.axis_index(sharding.token_axes) if sharding.token_axes else 0
    routing = _routing(tokens, params, config, key, first_token=shard * tokens.x.shape[0])
    operands = tokens.x, routing.indices, routing.weights, _only_experts(params)
    if axis is not None:
        operands = _vary_alike(operands, axis)
    y, dropped = compute(*operands, call)
    return y, dropped, routing


def _moe_dense(
    tokens: _Tokens,
    params: MoEParams,
    key: jax.Array | None,
    *,
    config: MoEConfig,
    sharding: _Sharding,
    group_tokens: int,
) -> tuple[jax.Array, MoEAux]:
    """The layer by the oracle, on all tokens [N, H] of all expert-parallel groups."""
    x = tokens.x
    routing = _routing(tokens, params, config, key, first_token=0)
    call = local_call(
        config,
        axis=None,
        num_pes=sharding.num_pes,
        tokens_per_pe=x.shape[0] // sharding.token_shards,
        group_tokens=group_tokens,
        caller_routing=tokens.routing is not None,
    )
    members = _tokens_by_group(sharding, x.shape[0])
    y, dropped = jax.vmap(dense, in_axes=(0, 0, 0, None, None))(
        x[members], routing.indices[members], routing.weights[members], params, call
    )
    y = jnp.zeros_like(x).at[members].set(y)
    if params.shared is not None:
        y = y + shared_experts(x, params.shared, config)
    return y, _aux(routing_sums(routing, config), dropped.sum(dtype=jnp.int32))


def _tokens_by_group(sharding: _Sharding, num_tokens: int) -> np.ndarray:
    """[groups, N / groups]: the tokens of every expert-parallel group in the order of its PEs."""
    tokens = np.arange(num_tokens)
    if sharding.mesh is None:
        return tokens[None]
    sizes = [sharding.mesh.shape[axis] for axis in sharding.token_axes]
    by_axis = tokens.reshape(*sizes, num_tokens // sharding.token_shards)
    by_axis = np.moveaxis(by_axis, sharding.token_axes.index(sharding.expert_axis), -2)
    groups = sharding.token_shards // sharding.num_pes
    return by_axis.reshape(groups, num_tokens // groups)


def _routing(
    tokens: _Tokens,
    params: MoEParams,
    config: MoEConfig,
    key: jax.Array | None,
    first_token: int | jax.Array,
) -> Routing:
    """The routing of tokens [T, H]: the router's, or the caller's with masked tokens masked."""
    x, routing, mask = tokens
    if routing is None:
        return route_from(x, params, config, key=key, mask=mask, first_token=first_token)
    indices = routing.indices.astype(jnp.int32)
    if mask is not None:
        indices = jnp.where(mask[:, None], indices, -1)
    return Routing(indices, routing.weights.astype(accumulation_dtype(x.dtype)), routing.logits)


def _aux(sums: RoutingSums, dropped: jax.Array) -> MoEAux:
    balance, z = losses(sums)
    return MoEAux(balance, z, sums.tokens_per_expert, dropped)


def _flatten(tokens: _Tokens, num_lead: int, padding: int) -> _Tokens:
    """Merges the `num_lead` leading dimensions and appends masked tokens."""
    x, routing, mask = tokens
    if padding and mask is None:
        tokens = _Tokens(x, routing, jnp.ones(x.shape[:-1], jnp.bool_))

    def flatten(array: jax.Array) -> jax.Array:
        flat = array.reshape(math.prod(array.shape[:num_lead]), *array.shape[num_lead:])
        return jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1))

    return jax.tree.map(flatten, tokens)


def _only_experts(params: MoEParams) -> MoEParams:
    """The part of the parameters that the local implementations read."""
    return dataclasses.replace(params, selection_bias=None, shared=None)


def _vary_alike(operands: Any, expert_axis: str) -> Any:
    """Lets all operands vary over the same mesh axes, so that their gradients are summed there."""

    def varying(array: jax.Array) -> frozenset[str]:
        return jax.typeof(array).manual_axis_type.varying

    axes = frozenset({expert_axis}).union(*map(varying, jax.tree.leaves(operands)))

    def vary(array: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying(array)))
        return lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(vary, operands)


def _replicate(tree: Any) -> Any:
    """The arrays without a sharding in their types; only Explicit mesh axes give them one."""

    def replicate(array: jax.Array) -> jax.Array:
        sharding = jax.typeof(array).sharding
        if all(axes is None for axes in sharding.spec):
            return array
        return jax.sharding.reshard(array, NamedSharding(sharding.mesh, PartitionSpec()))

    return jax.tree.map(replicate, tree)


def _reshard(tree: Any, specs: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The arrays sharded by `specs` over Explicit mesh axes, where shard_map moves nothing."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = {axis for axis, kind in kinds.items() if kind == AxisType.Explicit}
    if not explicit:
        return tree

    def reshard(array: jax.Array, spec: PartitionSpec) -> jax.Array:
        dims = ((axes,) if isinstance(axes, str) else axes for axes in spec)
        visible = PartitionSpec(*(tuple(a for a in axes if a in explicit) for axes in dims))
        return jax.sharding.reshard(array, NamedSharding(mesh, visible))

    return jax.tree.map(reshard, tree, specs)


def _reshard_like(x: jax.Array, y: jax.Array) -> jax.Array:
    """Gives y the sharding in the type of x, so that the two can be added."""
    wanted, given = jax.typeof(x).sharding, jax.typeof(y).sharding
    return y if wanted.mesh.empty or wanted == given else jax.sharding.reshard(y, wanted)


def _choose_implementation(
    implementation: Implementation,
    mesh: Mesh | AbstractMesh | None,
    dtype: jnp.dtype,
    config: MoEConfig,
    num_pes: int,
) -> Implementation:
    """What "auto" means here, or the given implementation if it is available."""
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation={implementation!r} must be one of {get_args(Implementation)}"
        )
    if implementation in ("xla", "dense"):
        return implementation
    platform = _platform(mesh)
    reason = _ffi.why_not_by_default(platform, num_pes) if implementation == "auto" else None
    reason = reason or _why_not_fused(platform, dtype, config, num_pes)
    if reason is None:
        return "fused"
    if implementation == "fused":
        raise ValueError(
            f"implementation='fused' is not available: {reason}; use implementation='xla'"
        )
    _warn_once(f"flashmoe_jax computes with implementation='xla' instead of 'fused': {reason}")
    return "xla"


def _why_not_fused(platform: str, dtype: jnp.dtype, config: MoEConfig, num_pes: int) -> str | None:
    if dtype == jnp.float64:
        return "it does not compute float64"
    reason = _ffi.unavailable_reason(platform)
    if reason is None and platform in _ffi.CUDA_PLATFORMS:
        from flashmoe_jax import fused_cuda  # Loads the extension of the CUDA kernel.

        reason = fused_cuda.why_not(config, dtype, num_pes)
    return reason


def _site(implementation: Implementation, sharding: _Sharding, operands: Any) -> object | None:
    """For `LocalCall.site`: every call that spans GPUs and is traced gets one of its own.

    An eager call has none, since it would be compiled each time.
    """
    spans_gpus = sharding.num_pes > 1 and _platform(sharding.mesh) in _ffi.CUDA_PLATFORMS
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(operands))
    return object() if implementation == "fused" and spans_gpus and traced else None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _platform(mesh: Mesh | AbstractMesh | None) -> str:
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0].platform
    if mesh is not None and mesh.abstract_device is not None:
        return mesh.abstract_device.platform
    default = jax.config.jax_default_device
    if default is not None:
        return default if isinstance(default, str) else default.platform
    return jax.default_backend()
