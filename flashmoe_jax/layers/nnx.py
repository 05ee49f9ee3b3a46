"""The Mixture-of-Experts layer for Flax NNX."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from flashmoe_jax.api import Implementation, MoEAux, moe
from flashmoe_jax.config import MoEConfig
from flashmoe_jax.layers import _parameters
from flashmoe_jax.params import MoEParams
from flashmoe_jax.routing import Routing, update_selection_bias


@nnx.register_variable_name("router_state")
class RouterState(nnx.Variable):
    """State of a router that no gradient trains: the selection bias.

    The Linen layer keeps it in the collection "router_state".
    """


class MoE(nnx.Module):
    """Distributed Mixture-of-Experts layer: router, experts and, by choice, shared experts.

    Under `jax.set_mesh`, or with `mesh`, the experts are created sharded over `expert_axis`, each
    device making its own; router and shared experts are replicated. Names and layouts are those of
    the Linen layer: `router` [H, E], `gate` and `up` [E, H, D], `down` [E, D, H], `gate_bias` and
    `up_bias` [E, D], `down_bias` [E, H], `shared_gate` and `shared_up` [H, S * D], `shared_down`
    [S * D, H] (each an `nnx.Param`, or None where the configuration has none) and `selection_bias`
    [E] (a `RouterState`, or None).

    Args:
        config: Sizes, activation, router.
        mesh: The devices; None: the mesh of `jax.set_mesh`, or no mesh.
        expert_axis: The mesh axis that the experts are sharded over.
        token_axes: The mesh axes that the tokens are sharded over, `expert_axis` among them; None:
            those of ("data", expert_axis) that the mesh has.
        dtype: Compute dtype; None: what the input and the experts promote to.
        param_dtype: Dtype of the experts and the shared experts. The router is float32.
        implementation: "auto", "fused", "xla" or "dense".
        deterministic: True switches the router's jitter off; `model.eval()` sets it.
        rngs: Stream "params" initialises; a router with jitter forks stream "jitter" for itself.

    Raises:
        ValueError: The mesh has no `expert_axis`, or its size does not divide the experts.

    Example:
        with jax.set_mesh(mesh):
            layer = flashmoe_jax.MoE(config, rngs=nnx.Rngs(0))
            y, aux = layer(x)
    """

    router: nnx.Param
    selection_bias: RouterState | None
    gate: nnx.Param | None
    up: nnx.Param
    down: nnx.Param
    gate_bias: nnx.Param | None
    up_bias: nnx.Param | None
    down_bias: nnx.Param | None
    shared_gate: nnx.Param | None
    shared_up: nnx.Param | None
    shared_down: nnx.Param | None

    def __init__(
        self,
        config: MoEConfig,
        *,
        mesh: Mesh | None = None,
        expert_axis: str = "expert",
        token_axes: tuple[str, ...] | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        implementation: Implementation = "auto",
        deterministic: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.mesh = mesh
        self.expert_axis = expert_axis
        self.token_axes = token_axes
        self.dtype = dtype
        self.implementation = implementation
        self.deterministic = deterministic

        shapes = _parameters.shapes(config, param_dtype)
        arrays = _parameters.create(
            rngs.params(),
            config,
            param_dtype,
            mesh=mesh,
            expert_axis=expert_axis,
            names=tuple(shapes),
        )
        for name in _parameters.NAMES:
            variable: Any = nnx.data(None)
            if name in arrays:
                kind = RouterState if name == _parameters.SELECTION_BIAS else nnx.Param
                variable = kind(arrays[name], **self._sharding(name, arrays[name].ndim))
            setattr(self, name, variable)
        self.jitter_stream = rngs["jitter"].fork() if config.router.jitter else nnx.data(None)

    def __call__(
        self,
        x: jax.Array,
        *,
        routing: Routing | None = None,
        mask: jax.Array | None = None,
        key: jax.Array | None = None,
        deterministic: bool | None = None,
    ) -> tuple[jax.Array, MoEAux]:
        """Applies the layer.

        Args:
            x: [..., H].
            routing: Another router's choice, shaped as x leads; None: the layer's own.
            mask: [...] bool; the routed experts ignore a token where it is False. None: all tokens.
            key: Random key of the jitter; None: the next one of the layer's own stream.
            deterministic: True: No jitter, unless `key` is given; None: the layer's attribute.

        Returns:
            y [..., H] in the compute dtype, and the auxiliary losses and counts.

        Raises:
            ValueError, TypeError: The arguments do not fit; see `flashmoe_jax.moe`.
        """
        if deterministic is None:
            deterministic = self.deterministic
        if key is None and routing is None and self.jitter_stream is not None and not deterministic:
            key = self.jitter_stream()
        x, params = _parameters.cast(x, self.moe_params(), self.dtype)
        return moe(
            x,
            params,
            self.config,
            routing,
            mesh=self.mesh,
            expert_axis=self.expert_axis,
            token_axes=self.token_axes,
            implementation=self.implementation,
            key=key,
            mask=mask,
        )

    def moe_params(self) -> MoEParams:
        """The parameters as `flashmoe_jax.moe` takes them, in their own dtype."""
        variables = {name: getattr(self, name) for name in _parameters.NAMES}
        return _parameters.unflatten({k: v[...] for k, v in variables.items() if v is not None})

    def update_selection_bias(self, aux: MoEAux, rate: float) -> None:
        """Moves the selection bias by `rate` towards experts that got fewer rows than the mean.

        Call it once per training step with the `aux` of that step: the balancing without an
        auxiliary loss of arXiv 2408.15664.

        Raises:
            ValueError: The router has no selection bias.
        """
        if self.selection_bias is None:
            raise ValueError(_parameters.NO_SELECTION_BIAS)
        self.selection_bias[...] = update_selection_bias(
            self.selection_bias[...], aux.tokens_per_expert, rate
        )

    def _sharding(self, name: str, ndim: int) -> dict[str, Any]:
        """Flax's sharding metadata of a parameter."""
        metadata: dict[str, Any] = {
            "out_sharding": _parameters.partition(name, ndim, self.expert_axis)
        }
        if self.mesh is not None:
            metadata["mesh"] = self.mesh
        elif not _parameters.flax_can_shard():
            metadata["eager_sharding"] = False
        return metadata
