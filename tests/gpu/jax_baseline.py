"""The layers of shapes.py through JAX on one GPU, forward, bfloat16: the kernel, and XLA's ways.

Prints one JSON line for each, and first the rate of a dense bf16 product, the ceiling of this card.
Times are of the host's clock, from the call to the end of its work, medians.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import flashmoe_jax as fm
from flashmoe_jax.api import Implementation
from tests.gpu.shapes import SHAPES

_REPETITIONS = 15
_CAPACITY_FACTOR = 1.25


def report(
    baseline: str, function: Callable[..., Any], *operands: Any, flops: float, **more: Any
) -> None:
    """Measures a jitted function, unless it takes more memory than there is."""
    line: dict[str, Any] = {"baseline": baseline, **more}
    try:
        for _ in range(3):
            jax.block_until_ready(function(*operands))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(json.dumps({**line, "skipped": "it takes more memory than there is"}), flush=True)
        return
    times = []
    for _ in range(_REPETITIONS):
        begin = time.perf_counter()
        jax.block_until_ready(function(*operands))
        times.append(time.perf_counter() - begin)
    median = statistics.median(times)
    print(
        json.dumps({**line, "median_ms": 1e3 * median, "tflops": flops / median / 1e12}), flush=True
    )


def random(key: int, *size: int, scale: float = 1.0) -> jax.Array:
    """Normally distributed bfloat16 values."""
    return scale * jax.random.normal(jax.random.key(key), size, jnp.bfloat16)


def ragged_dot_layer(x: jax.Array, params: fm.MoEParams, routing: fm.Routing) -> jax.Array:
    """As a user of JAX writes it: rows sorted by expert, and `lax.ragged_dot`."""
    tokens, slots = routing.indices.shape
    expert = routing.indices.reshape(-1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=params.up.shape[0]).astype(jnp.int32)
    rows = x[order // slots]
    assert params.gate is not None
    hidden = jax.nn.silu(lax.ragged_dot(rows, params.gate, sizes))
    hidden *= lax.ragged_dot(rows, params.up, sizes)
    outputs = lax.ragged_dot(hidden, params.down, sizes)[jnp.argsort(order)]
    by_slot = outputs.reshape(tokens, slots, -1).astype(jnp.float32)
    return (by_slot * routing.weights[..., None]).sum(1).astype(x.dtype)


def measure_layer(name: str, tokens: int, hidden: int, width: int, experts: int, k: int) -> None:
    """All ways to compute a layer whose routing is given and uniform on average."""
    config = fm.MoEConfig(
        num_experts=experts, experts_per_token=k, hidden_size=hidden, intermediate_size=width
    )
    params = fm.MoEParams(
        router=jnp.zeros((hidden, experts), jnp.float32),
        selection_bias=None,
        gate=random(0, experts, hidden, width, scale=0.02),
        up=random(1, experts, hidden, width, scale=0.02),
        down=random(2, experts, width, hidden, scale=0.02),
    )
    x = random(3, tokens, hidden)
    _, indices = lax.top_k(jax.random.uniform(jax.random.key(4), (tokens, experts)), k)
    routing = fm.Routing(indices, jnp.full((tokens, k), 1 / k))

    def operator(config: fm.MoEConfig, implementation: Implementation) -> Callable[..., Any]:
        return jax.jit(
            lambda *operands: fm.moe(
                operands[0], operands[1], config, operands[2], implementation=implementation
            )[0]
        )

    bounded = dataclasses.replace(config, capacity_factor=_CAPACITY_FACTOR)
    ways = {
        "fused": operator(config, "fused"),
        "xla": operator(config, "xla"),
        f"xla, capacity factor {_CAPACITY_FACTOR}": operator(bounded, "xla"),
        "lax.ragged_dot": jax.jit(ragged_dot_layer),
    }
    for way, function in ways.items():
        flops = 6.0 * tokens * k * hidden * width
        report(way, function, x, params, routing, flops=flops, shape=name, tokens=tokens)
    fm.runtime.check()
    fm.runtime.reset()


def main() -> None:
    """Measures everything."""
    a, b = random(0, 8192, 8192), random(1, 8192, 8192)
    report("dense bf16 8192^3", jax.jit(jnp.matmul), a, b, flops=2.0 * 8192**3)
    for shape in SHAPES:
        measure_layer(*shape)


if __name__ == "__main__":
    main()
