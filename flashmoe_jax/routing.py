"""The router in JAX: which experts a token chooses, with which weights, and how evenly."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from flashmoe_jax.config import MoEConfig
from flashmoe_jax.params import MoEParams

# Keeps the renormalisation finite when all chosen sigmoid scores underflow (as DeepSeek-V3 does).
_RENORMALIZE_EPSILON = 1e-20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """The experts of every token.

    Attributes:
        indices: [..., K] int32, an expert for each slot; -1 masks the slot.
        weights: [..., K] float32, the weight of each slot's expert; ignored in a masked slot.
        logits: [..., E] float32 of the router that chose, or None; only the auxiliary losses
            read them.
    """

    indices: jax.Array
    weights: jax.Array
    logits: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingSums:
    """Sums over tokens, from which the losses follow. Those of several PEs add up.

    Attributes:
        tokens_per_expert: [E] int32, rows routed to each expert.
        tokens: [] int32, tokens with at least one unmasked slot.
        scores: [E], sum over tokens of the scores, normalised per token.
        squared_log_partition: [], sum over tokens of logsumexp(logits)^2.
    """

    tokens_per_expert: jax.Array
    tokens: jax.Array
    scores: jax.Array
    squared_log_partition: jax.Array


def route(
    x: jax.Array,
    params: MoEParams,
    config: MoEConfig,
    *,
    key: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> Routing:
    """Chooses the experts of every token. Differentiable in the weights and logits.

    Args:
        x: [..., H] tokens, any floating dtype; scores are computed in float32 (float64 for
            float64 tokens).
        params: Of which `router` and `selection_bias` are read.
        config: The layer.
        key: Random key of the router's jitter; None: no jitter. The noise of a token depends on
            the key and on its place in x alone.
        mask: [...] bool; a token where it is False is routed nowhere, whatever it holds, and has
            the logits of a token of zeros. None: all tokens are routed.

    Returns:
        A `Routing` with the leading dimensions of x. Ties go to the lowest expert index.
    """
    return route_from(x, params, config, key=key, mask=mask, first_token=0)


def route_from(
    x: jax.Array,
    params: MoEParams,
    config: MoEConfig,
    *,
    key: jax.Array | None,
    mask: jax.Array | None,
    first_token: int | jax.Array,
    indices: jax.Array | None = None,
) -> Routing:
    """`route`, where x starts at token `first_token` of the batch that the jitter is drawn for.

    With `indices`, [..., K], the experts have been chosen, and only their weights are computed.
    """
    router = config.router
    dtype = accumulation_dtype(x.dtype)
    x = x.astype(dtype)
    if mask is not None:
        # Not only its logits: the gradient of the router is a product with x.
        x = jnp.where(mask[..., None], x, 0)
    if key is not None and router.jitter > 0.0:
        x = x * _jitter(key, x, router.jitter, first_token)
    # The choice is discontinuous in the logits: no reduced-precision product here.
    logits = jnp.matmul(x, params.router.astype(dtype), precision=lax.Precision.HIGHEST)
    scores = jax.nn.softmax(logits) if router.score == "softmax" else jax.nn.sigmoid(logits)
    if indices is None:
        indices = _choose(lax.stop_gradient(scores), params.selection_bias, config)
    weights = jnp.take_along_axis(scores, indices, axis=-1)
    if router.renormalize:
        weights = weights / (weights.sum(-1, keepdims=True) + _RENORMALIZE_EPSILON)
    weights = weights * router.scaling_factor
    if mask is not None:
        indices = jnp.where(mask[..., None], indices, -1)
        weights = jnp.where(mask[..., None], weights, 0)
    return Routing(indices, weights, logits)


def accumulation_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype in which values of `dtype` are scored and summed: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def _jitter(key: jax.Array, x: jax.Array, width: float, first_token: int | jax.Array) -> jax.Array:
    """Noise of the shape of x, drawn per token so that it does not depend on the sharding."""
    lead, hidden = x.shape[:-1], x.shape[-1]
    tokens = first_token + jnp.arange(x.size // hidden, dtype=jnp.int32)

    def noise(token: jax.Array) -> jax.Array:
        token_key = jax.random.fold_in(key, token)
        return jax.random.uniform(token_key, (hidden,), x.dtype, 1.0 - width, 1.0 + width)

    return jax.vmap(noise)(tokens).reshape(*lead, hidden)


def _choose(scores: jax.Array, bias: jax.Array | None, config: MoEConfig) -> jax.Array:
    """[..., K] int32: the experts with the best biased scores [..., E], in the best groups only."""
    router = config.router
    if bias is not None:
        scores = scores + lax.stop_gradient(bias).astype(scores.dtype)
    if router.groups_per_token < router.num_groups:
        grouped = scores.reshape(*scores.shape[:-1], router.num_groups, -1)
        best_two = lax.top_k(grouped, min(2, grouped.shape[-1]))[0]
        best_groups = lax.top_k(best_two.sum(-1), router.groups_per_token)[1]
        group = jnp.arange(router.num_groups)
        eligible = (best_groups[..., None] == group).any(-2)
        scores = jnp.where(eligible[..., None], grouped, -jnp.inf).reshape(scores.shape)
    # top_k puts the lower of two equal elements' indices first.
    return lax.top_k(scores, config.experts_per_token)[1].astype(jnp.int32)


def routing_sums(routing: Routing, config: MoEConfig) -> RoutingSums:
    """The sums over all tokens of `routing`. Sums of the scores are 0 without logits."""
    experts = jnp.arange(config.num_experts)
    slots = routing.indices.reshape(-1, 1)
    routed = (routing.indices >= 0).any(-1)
    if routing.logits is None:
        scores, partition = jnp.zeros(config.num_experts), jnp.zeros(())
    else:
        # Masked tokens may hold anything, also logits that are not finite.
        logits = jnp.where(routed[..., None], routing.logits, 0)
        if config.router.score == "softmax":
            shares = jax.nn.softmax(logits)
        else:
            shares = jax.nn.sigmoid(logits)
            shares = shares / (shares.sum(-1, keepdims=True) + _RENORMALIZE_EPSILON)
        tokens = tuple(range(routed.ndim))
        scores = jnp.where(routed[..., None], shares, 0).sum(tokens)
        partition = jnp.where(routed, jax.nn.logsumexp(logits, axis=-1) ** 2, 0).sum()
    return RoutingSums(
        tokens_per_expert=(slots == experts).sum(0, dtype=jnp.int32),
        tokens=routed.sum(dtype=jnp.int32),
        scores=scores,
        squared_log_partition=partition,
    )


def losses(sums: RoutingSums) -> tuple[jax.Array, jax.Array]:
    """(load_balance_loss, z_loss) of the tokens that `sums` is taken over."""
    rows = jnp.maximum(sums.tokens_per_expert.sum(), 1)
    tokens = jnp.maximum(sums.tokens, 1)
    share_of_rows = sums.tokens_per_expert / rows
    mean_scores = sums.scores / tokens
    balance = sums.scores.size * jnp.sum(share_of_rows * mean_scores)
    return balance, sums.squared_log_partition / tokens


def load_balance_loss(routing: Routing, config: MoEConfig) -> jax.Array:
    """E * sum_e f_e * p_e, which is 1 at perfect balance (Switch Transformer, equations 4 to 6).

    f_e is expert e's share of all routed rows and carries no gradient; p_e is its mean score over
    the unmasked tokens, where sigmoid scores are first normalised per token. 0 without logits.

    Returns:
        [] float32.
    """
    return losses(routing_sums(routing, config))[0]


def z_loss(routing: Routing, config: MoEConfig) -> jax.Array:
    """Mean over unmasked tokens of logsumexp(logits)^2 (ST-MoE, equation 5). 0 without logits.

    Returns:
        [] float32.
    """
    return losses(routing_sums(routing, config))[1]


def update_selection_bias(
    bias: jax.Array, tokens_per_expert: jax.Array, rate: float | jax.Array
) -> jax.Array:
    """The selection bias after one step of auxiliary-loss-free balancing (arXiv 2408.15664).

    Args:
        bias: [E] floating.
        tokens_per_expert: [E], rows routed to each expert in the last batch (`MoEAux`).
        rate: How far a bias moves: up for an expert below the mean, down for one above.

    Returns:
        [E], in the dtype of `bias`.
    """
    counts = tokens_per_expert.astype(accumulation_dtype(bias.dtype))
    return bias + (rate * jnp.sign(counts.mean() - counts)).astype(bias.dtype)
