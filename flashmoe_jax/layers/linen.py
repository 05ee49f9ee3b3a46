"""The Mixture-of-Experts layer for Flax Linen."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jax.typing import DTypeLike

from flashmoe_jax.api import Implementation, MoEAux, moe
from flashmoe_jax.config import MoEConfig
from flashmoe_jax.layers import _parameters
from flashmoe_jax.params import MoEParams
from flashmoe_jax.routing import Routing, update_selection_bias

ROUTER_STATE = "router_state"


class MoE(nn.Module):
    """Distributed Mixture-of-Experts layer: router, experts and, by choice, shared experts.

    The twin of `flashmoe_jax.MoE`: the same arguments, the same parameters under the same names, in
    the collection "params" as `nn.Partitioned`, but for `selection_bias` [E], which no gradient
    trains and which lives in the collection "router_state".

    Attributes:
        config: Sizes, activation, router.
        mesh: The devices; None: the mesh of `jax.set_mesh`, or no mesh.
        expert_axis: The mesh axis that the experts are sharded over.
        token_axes: The mesh axes that the tokens are sharded over, `expert_axis` among them; None:
            those of ("data", expert_axis) that the mesh has.
        dtype: Compute dtype; None: what the input and the experts promote to.
        param_dtype: Dtype of the experts and the shared experts. The router is float32.
        implementation: "auto", "fused", "xla" or "dense".
        deterministic: True switches the router's jitter off; else it needs the PRNG "jitter".
    """

    config: MoEConfig
    mesh: Mesh | None = None
    expert_axis: str = "expert"
    token_axes: tuple[str, ...] | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    implementation: Implementation = "auto"
    deterministic: bool = False

    def setup(self) -> None:
        """Declares the parameters."""
        shapes = _parameters.shapes(self.config, self.param_dtype)
        bias = shapes.pop(_parameters.SELECTION_BIAS, None)
        self._params = {name: self._param(name, shape.ndim) for name, shape in shapes.items()}
        self._selection_bias: nn.Variable[jax.Array] | None = None
        if bias is not None:
            self._selection_bias = self.variable(
                ROUTER_STATE, _parameters.SELECTION_BIAS, jnp.zeros, bias.shape, bias.dtype
            )

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
            key: Random key of the jitter; None: one of the collection "jitter".
            deterministic: True: No jitter, unless `key` is given; None: the layer's attribute.

        Returns:
            y [..., H] in the compute dtype, and the auxiliary losses and counts.

        Raises:
            ValueError, TypeError: The arguments do not fit; see `flashmoe_jax.moe`.
        """
        if deterministic is None:
            deterministic = self.deterministic or self.is_initializing()
        if key is None and routing is None and self.config.router.jitter and not deterministic:
            key = self.make_rng("jitter")
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
        named = dict(self._params)
        if self._selection_bias is not None:
            named[_parameters.SELECTION_BIAS] = self._selection_bias.value
        return _parameters.unflatten(named)

    def update_selection_bias(self, aux: MoEAux, rate: float) -> None:
        """Moves the selection bias by `rate` towards experts that got fewer rows than the mean.

        Call it once per training step with the `aux` of that step, the collection "router_state"
        mutable: the balancing without an auxiliary loss of arXiv 2408.15664.

        Raises:
            ValueError: The router has no selection bias.
        """
        if self._selection_bias is None:
            raise ValueError(_parameters.NO_SELECTION_BIAS)
        self._selection_bias.value = update_selection_bias(
            self._selection_bias.value, aux.tokens_per_expert, rate
        )

    def _param(self, name: str, ndim: int) -> jax.Array:
        def create(key: jax.Array) -> jax.Array:
            arrays = _parameters.create(
                key,
                self.config,
                self.param_dtype,
                mesh=self.mesh,
                expert_axis=self.expert_axis,
                names=(name,),
            )
            return arrays[name]

        axes = _parameters.partition(name, ndim, self.expert_axis)
        return self.param(name, nn.with_partitioning(create, axes))  # type: ignore[return-value]
