"""What the machine itself can do: the rate of large products, and the cost of a call.

The ceiling is the best large product that anything here computes: XLA's, a BLAS with a thread on
each core, PyTorch's, or the operator's own with a single expert.
"""

import dataclasses
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import flashmoe_jax as fm
from benchmarks import opponents, platform, program, torch_opponents
from benchmarks.cases import Case, Dtype
from benchmarks.inputs import inputs
from benchmarks.results import Probe, Timing
from benchmarks.shapes import Shape
from flashmoe_jax.params import partition_specs


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeCall:
    """A call to be timed; see `results.Probe`."""

    name: str
    kind: Literal["ceiling", "floor"]
    dtype: Dtype
    case: str = ""
    flops: int = 0
    call: Callable[[], Any]

    def result(self, timing: Timing) -> Probe:
        """What was measured."""
        return Probe(
            name=self.name,
            kind=self.kind,
            dtype=self.dtype,
            case=self.case,
            flops=self.flops,
            timing=timing,
        )


def ceilings(dtypes: Iterable[Dtype]) -> list[ProbeCall]:
    """Large products of these dtypes, and of float32, as which the others may be computed."""
    calls = []
    for dtype in sorted({*dtypes, "float32"}):
        calls += [_xla_product(dtype), *_torch_product(dtype), *_operator_product(dtype)]
    blas = platform.blas_product()
    if blas is not None:
        call, flops = blas
        calls.append(
            ProbeCall(name="BLAS", kind="ceiling", dtype="float32", flops=flops, call=call)
        )
    return calls


def _xla_product(dtype: Dtype) -> ProbeCall:
    size = platform.product_size()
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size)).astype(dtype) for key in keys)
    product = jax.jit(jnp.matmul).lower(a, b).compile()
    return ProbeCall(
        name="XLA",
        kind="ceiling",
        dtype=dtype,
        flops=2 * size**3,
        call=lambda: jax.block_until_ready(product(a, b)),
    )


def _torch_product(dtype: Dtype) -> list[ProbeCall]:
    size = platform.product_size()
    call = torch_opponents.large_product(size, dtype)
    if call is None:
        return []
    return [ProbeCall(name="PyTorch", kind="ceiling", dtype=dtype, flops=2 * size**3, call=call)]


def _operator_product(dtype: Dtype) -> list[ProbeCall]:
    size = platform.product_size()
    shape = Shape(
        name="one expert",
        hidden=size // 2,
        intermediate=size,
        num_experts=1,
        experts_per_token=1,
    )
    case = Case(shape=shape, tokens=size, num_pes=1, dtype=dtype, direction="forward", opponents=())
    opponent = opponents.OPPONENTS["fused"]
    if opponent.unavailable(case) is not None:
        return []
    layer = opponent.build(case)
    layer.compile()
    flops = case.useful_flops(case.rows)
    name = "the operator, one expert"
    return [ProbeCall(name=name, kind="ceiling", dtype=dtype, flops=flops, call=layer)]


def floors(case: Case) -> list[ProbeCall]:
    """What a call costs whoever computes it.

    XLA's dispatch to all devices; the router, whose time includes a dispatch; and reading the
    weights of all experts that any token chooses, once, from memory.
    """
    here = program.mesh(case.num_pes)
    x, params, _ = program.operands(
        dataclasses.replace(case, direction="forward", num_pes=1, opponents=()), case.num_pes
    )
    layer_config = program.config(case, "dropless")

    def dispatch(x: jax.Array, params: fm.MoEParams) -> jax.Array:
        return x + 1

    def router(x: jax.Array, params: fm.MoEParams) -> tuple[jax.Array, jax.Array]:
        routing = fm.route(x, params, layer_config)
        return routing.indices, routing.weights

    def probe(name: str, function: Callable[..., Any]) -> ProbeCall:
        if here is not None:
            tokens = PartitionSpec(program.EXPERT_AXIS)
            specs = tokens, partition_specs(layer_config, program.EXPERT_AXIS)
            function = jax.shard_map(function, mesh=here, in_specs=specs, out_specs=tokens)
        compiled = jax.jit(function).lower(x, params).compile()
        return ProbeCall(
            name=name,
            kind="floor",
            dtype=case.dtype,
            case=case.name,
            call=lambda: jax.block_until_ready(compiled(x, params)),
        )

    return [
        probe("dispatch only", dispatch),
        probe("router only", router),
        ProbeCall(
            name="reading the chosen experts",
            kind="floor",
            dtype=case.dtype,
            case=case.name,
            call=_reading(case),
        ),
    ]


def _reading(case: Case) -> Callable[[], Any]:
    given = inputs(case)
    chosen = np.unique(given.indices)
    weights = given.parameters
    matrices = [
        matrix[expert].reshape(-1).view(np.uint32)
        for matrix in (weights.gate, weights.up, weights.down)
        if matrix is not None
        for expert in chosen
    ]
    pool = ThreadPoolExecutor(platform.cores())
    return lambda: list(pool.map(np.max, matrices))
