"""Parameters and batches of the cases: random, scaled, and the same in every run.

Outputs and gradients are of order one: pre-activations and the experts' outputs have a root mean
square of about 1. Gradients of the routing weights are inner products over H and grow with it,
those of the router also with the tokens, and those of the tokens with the inverse of the tokens'
size: tokens and cotangents are scaled down for large H, so that all stay in range.

The decisions of a router are the same in every precision: the router's columns are orthogonal, so
tokens can be made to have chosen logits, which leave a margin of 1 between the experts that are to
be chosen and the others.
"""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import numpy as np

import flashmoe_jax as fm

from . import bounds
from .cases import Layer, Load

_SELECTION_BIAS = 0.05  # The sigmoid scores of logits -0.75 and 0.25 differ by 0.24.
_BIAS = 0.3

Array = Any  # NumPy's here, and JAX's where a program is traced.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What a layer is called with besides its parameters, and what its gradients are taken of.

    Attributes:
        x: [N, H] tokens.
        mask: [N] bool.
        routing: The caller's, or None.
        dy: [N, H], cotangent of the outputs.
        dlosses: [2] float32, cotangents of load-balance loss and z-loss.
    """

    x: Array
    mask: Array
    routing: fm.Routing | None
    dy: Array
    dlosses: Array


@functools.lru_cache(maxsize=4)
def parameters(layer: Layer) -> fm.MoEParams:
    """The parameters of a layer, as NumPy arrays."""
    random = _random(layer, "parameters")
    experts, hidden, inner = layer.num_experts, layer.hidden, layer.intermediate
    output_scale = 1 / bounds.activation_rms(layer.activation)

    def normal(*shape: int, scale: float) -> Array:
        return (scale * random.standard_normal(shape)).astype(layer.dtype)

    def bias(present: bool, *shape: int) -> Array:
        return normal(*shape, scale=_BIAS) if present else None

    def into(*shape: int) -> Array:
        return normal(*shape, scale=shape[-2] ** -0.5 / _token_scale(layer))

    def out_of(*shape: int) -> Array:
        return normal(*shape, scale=output_scale * shape[-2] ** -0.5)

    width = layer.num_shared_experts * inner
    return fm.MoEParams(
        router=_router(layer, random),
        selection_bias=(
            _selection_bias(layer, random) if layer.config.router.selection_bias else None
        ),
        gate=into(experts, hidden, inner) if layer.gated else None,
        up=into(experts, hidden, inner),
        down=out_of(experts, inner, hidden),
        gate_bias=bias(layer.use_bias and layer.gated, experts, inner),
        up_bias=bias(layer.use_bias, experts, inner),
        down_bias=bias(layer.use_bias, experts, hidden),
        shared=fm.SharedParams(
            gate=into(hidden, width) if layer.gated else None,
            up=into(hidden, width),
            down=out_of(width, hidden),
        )
        if width
        else None,
    )


@functools.lru_cache(maxsize=16)
def batch(layer: Layer, load: Load) -> Batch:
    """The batch of a layer that has this load."""
    random = _random(layer, load)
    tokens, hidden = layer.tokens, layer.hidden
    mask = _mask(layer) if load == "masked" else np.ones(tokens, np.bool_)
    chosen = _chosen_experts(layer, load, random)
    routing = _caller_routing(layer, chosen, random) if layer.router == "caller" else None
    while True:
        x = _token_scale(layer) * random.standard_normal((tokens, hidden))
        if routing is None:
            x = _choosing(x, parameters(layer).router, chosen, random)
        x = x.astype(layer.dtype)
        if layer.activation != "relu" or _is_clear_of_the_kink(layer, x):
            break
    losses = layer.router != "caller"
    return Batch(
        x=x,
        mask=mask,
        routing=routing,
        dy=(_cotangent_scale(layer) * random.standard_normal((tokens, hidden))).astype(layer.dtype),
        dlosses=np.full(2, 0.03 * tokens if losses else 0.0, np.float32),
    )


def _random(layer: Layer, purpose: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(f"{layer} {purpose}".encode()))


def _token_scale(layer: Layer) -> float:
    return min(1.0, (24 / layer.hidden) ** 0.375)


def _cotangent_scale(layer: Layer) -> float:
    scale = 0.55
    if layer.router == "caller" and layer.limit != "dropless":
        scale = 0.65  # All rows may go to one expert, of which the limit drops most.
    elif layer.experts_per_token == 1 and layer.limit == "dropless":
        scale = 0.34  # All rows may go to one expert, and each has all of its token's weight.
    return scale * min(1.0, (24 / layer.hidden) ** 0.25)


def _router(layer: Layer, random: np.random.Generator) -> Array:
    """[H, E] float32 with orthogonal columns; the caller's routing leaves it unused."""
    router = random.standard_normal((layer.hidden, layer.num_experts))
    if layer.router != "caller":
        router = np.linalg.qr(router)[0] / _token_scale(layer)
    return router.astype(np.float32)


def _selection_bias(layer: Layer, random: np.random.Generator) -> Array:
    bias = random.uniform(-_SELECTION_BIAS, _SELECTION_BIAS, layer.num_experts)
    return bias.astype(np.float32)


def _mask(layer: Layer) -> Array:
    """[N] bool: every other PE, or the second half of the tokens if there is one PE."""
    shards = max(2, layer.token_shards)
    return np.arange(layer.tokens) // -(-layer.tokens // shards) % 2 == 0


def _chosen_experts(layer: Layer, load: Load, random: np.random.Generator) -> Array:
    """[N, K] experts. A token names none twice, unless all rows go to one."""
    tokens, slots, experts = layer.tokens, layer.experts_per_token, layer.num_experts
    if load == "one":
        first = experts // 2
        slot = 0 if layer.router == "caller" else np.arange(slots)
        return np.broadcast_to((first + slot) % experts, (tokens, slots)).astype(np.int32)
    log_share = np.zeros(experts)
    if load == "skewed":
        log_share = -2 * np.log1p(np.arange(experts))
    elif load == "empty":
        log_share[experts // 4 : experts // 2] = -np.inf
        if experts - experts // 4 < slots:
            raise ValueError(f"{layer} chooses more experts than the load leaves")
    # The K largest of log p + Gumbel noise are a draw without replacement from p.
    noisy = log_share + random.gumbel(size=(tokens, experts))
    return np.argsort(-noisy, axis=1)[:, :slots].astype(np.int32)


def _caller_routing(layer: Layer, chosen: Array, random: np.random.Generator) -> fm.Routing:
    """The chosen experts with weights of both signs; a tenth of the slots is masked, weight NaN.

    The weights of one token have one sign, lest those of a token that names one expert K times
    cancel.
    """
    masked = random.random(chosen.shape) < 0.1
    weights: Array = random.uniform(0.5, 1.5, chosen.shape)
    weights *= layer.experts_per_token**-0.5 * random.choice([-1, 1], (layer.tokens, 1))
    indices: Array = np.where(masked, -1, chosen).astype(np.int32)
    weights = np.where(masked, np.nan, weights).astype(np.float32)
    return fm.Routing(indices, weights)


def _choosing(x: Array, router: Array, chosen: Array, random: np.random.Generator) -> Array:
    """x [N, H], changed in the space of the router's columns so that it chooses `chosen` [N, K]."""
    logits = random.uniform(-1.5, -0.75, (x.shape[0], router.shape[1]))
    np.put_along_axis(logits, chosen, random.uniform(0.25, 1.0, chosen.shape), axis=1)
    return x + (logits - x @ router) @ np.linalg.pinv(router)


def _is_clear_of_the_kink(layer: Layer, x: Array) -> bool:
    """Whether rounding cannot move any pre-activation across 0, where the slope of relu jumps.

    There, no implementation would be wrong whichever slope it took.
    """
    params = parameters(layer)
    networks = [(params.gate, params.gate_bias) if layer.gated else (params.up, params.up_bias)]
    if params.shared is not None:
        networks.append((params.shared.gate if layer.gated else params.shared.up, None))
    for weight, bias in networks:
        pre = np.einsum("nh,...hd->n...d", x.astype(np.float64), np.asarray(weight, np.float64))
        if bias is not None:
            pre += np.asarray(bias, np.float64)
        if np.abs(pre).min() <= bounds.accumulation_bound(layer.hidden, pre.size):
            return False
    return True
