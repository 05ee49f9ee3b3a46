"""Tokens, parameters and cotangents of a case: random, and the same in every run.

Outputs and gradients of the routed rows are of order one. The experts of a token are those of the
router, whose decision must be the same in every implementation: tokens whose K-th and next logits
nearly tie are drawn again. The first feature of every token is 1, so that the first row of the
router shifts the logits: that is how a load is made uneven.
"""

import dataclasses
import functools
import zlib

import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Case, Dtype, Load
from benchmarks.shapes import Shape

# Of logits of standard deviation 1, summed in float32.
_MARGIN = 1e-4
_HOT_LOGIT = 6.0


@dataclasses.dataclass(frozen=True, eq=False)
class Parameters:
    """Of a layer: router [H, E] float32; gate (None if not gated), up [E, H, D]; down [E, D, H]."""

    router: np.ndarray
    gate: np.ndarray | None
    up: np.ndarray
    down: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """Of a case.

    Attributes:
        x: [N, H] tokens.
        parameters: Of the layer.
        cotangent: [N, H] of the outputs.
        indices: [N, K] experts of every token, best first.
    """

    x: np.ndarray
    parameters: Parameters
    cotangent: np.ndarray
    indices: np.ndarray


@functools.lru_cache(maxsize=2)
def parameters(shape: Shape, dtype: Dtype, load: Load) -> Parameters:
    """Parameters of a layer."""
    random = _random(shape, "parameters")
    experts, hidden, inner = shape.num_experts, shape.hidden, shape.intermediate

    def normal(*size: int) -> np.ndarray:
        weight = random.standard_normal(size, np.float32)
        weight *= size[-2] ** -0.5
        return weight.astype(jnp.dtype(dtype))

    return Parameters(
        router=_router(shape, load),
        gate=normal(experts, hidden, inner) if shape.gated else None,
        up=normal(experts, hidden, inner),
        down=normal(experts, inner, hidden),
    )


def inputs(case: Case) -> Inputs:
    """The inputs of a case; they do not depend on the number of PEs, nor on the direction."""
    return _inputs(case.shape, case.tokens, case.dtype, case.load)


@functools.lru_cache(maxsize=2)
def _inputs(shape: Shape, tokens: int, dtype: Dtype, load: Load) -> Inputs:
    weights = parameters(shape, dtype, load)
    random = _random(shape, f"tokens {tokens}")
    x, logits = _tokens(shape, tokens, dtype, weights.router, random)
    cotangent = random.standard_normal((tokens, shape.hidden), np.float32)
    # A weight gradient sums over the rows of its expert.
    cotangent *= (shape.num_experts / (tokens * shape.experts_per_token)) ** 0.5
    return Inputs(
        x=x,
        parameters=weights,
        cotangent=cotangent.astype(x.dtype),
        indices=np.argsort(-logits, axis=1, kind="stable")[:, : shape.experts_per_token],
    )


def clear() -> None:
    """Frees what is kept for the next case."""
    parameters.cache_clear()
    _inputs.cache_clear()


def _random(shape: Shape, purpose: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(f"{shape} {purpose}".encode()))


def _router(shape: Shape, load: Load) -> np.ndarray:
    random = _random(shape, "router")
    router = random.standard_normal((shape.hidden, shape.num_experts), np.float32)
    router *= (shape.hidden - 1) ** -0.5
    router[0] = 0.0
    if load == "zipf":
        router[0] = -np.log1p(np.arange(shape.num_experts))
    elif load == "hot":
        router[0, 0] = _HOT_LOGIT
    return router


def _tokens(
    shape: Shape, count: int, dtype: Dtype, router: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [N, H] whose choice of experts is clear, and their logits [N, E]."""
    slots = shape.experts_per_token
    x = np.empty((count, shape.hidden), jnp.dtype(dtype))
    logits = np.empty((count, shape.num_experts), np.float32)
    unclear = np.arange(count)
    while unclear.size:
        drawn = random.standard_normal((unclear.size, shape.hidden), np.float32)
        drawn[:, 0] = 1.0
        x[unclear] = drawn.astype(x.dtype)
        logits[unclear] = x[unclear].astype(np.float32) @ router
        if slots == shape.num_experts:
            break
        ordered = -np.sort(-logits[unclear], axis=1)
        unclear = unclear[ordered[:, slots - 1] - ordered[:, slots] < _MARGIN]
    return x, logits
