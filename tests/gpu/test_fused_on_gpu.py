"""The fused implementation on a GPU, through JAX: `make gpu-check` runs this.

The layers are of the equivalence suite's kind, with its inputs, its oracle in float64 and its
bounds, on one PE and at sizes that the kernel takes. Forward is the kernel's, gradients are XLA's.
"""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence import evaluate, inputs, suite
from equivalence.cases import FACTORS, LOADS, Layer
from equivalence.evaluate import Results

import flashmoe_jax as fm
from flashmoe_jax import _ffi

if jax.default_backend() != "gpu":
    pytest.skip("needs a GPU: make gpu-check", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent.parent
DTYPES = FACTORS["dtype"]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """On GPUs XLA rounds float32 to TF32 unless it is told not to."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(autouse=True)
def no_failures() -> Iterator[None]:
    yield
    fm.runtime.check()


def layers() -> list[Layer]:
    """Every limit with every dtype, and the other factors in turn, most of them several times."""
    turns = {
        name: itertools.cycle(values)
        for name, values in FACTORS.items()
        if name not in ("num_pes", "dtype", "limit", "size")
    }
    # Small, and several tiles of columns and rows.
    sizes = itertools.cycle([((24, 40), 16, 64), ((608, 704), 4, 160), ((136, 24), 16, 61)])
    found = []
    for dtype, limit in itertools.product(DTYPES, FACTORS["limit"]):
        size, experts, tokens = next(sizes)
        others = {name: next(values) for name, values in turns.items()}
        others["experts_per_token"] = min(others["experts_per_token"], experts // 2)
        found.append(
            Layer(
                num_pes=1,
                dtype=dtype,
                limit=limit,
                size=size,
                num_experts=experts,
                tokens=tokens,
                **others,
            )
        )
    return found


@pytest.mark.parametrize("layer", layers(), ids=str)
def test_the_layer_equals_the_oracle(layer: Layer) -> None:
    for load in LOADS:
        want = evaluate.oracle_results(layer, load)
        suite.check_order_one(layer, want)
        for implementation in ("fused", "xla"):
            got = evaluate.implementation_results(layer, load, implementation)
            fractions = suite.check(layer, load, got, want)
            print(f"{load}, {implementation}: at most {suite.largest(fractions)} of the bounds")


def plain(dtype: str, **options: Any) -> Layer:
    return Layer(
        **{
            "num_pes": 1,
            "experts_per_token": 2,
            "dtype": dtype,
            "network": ("silu", True),
            "limit": "dropless",
            "router": "softmax",
            "use_bias": True,
            "num_shared_experts": 0,
            "save_rows": True,
            "save_preactivations": True,
            "size": (136, 608),
            "num_experts": 8,
            "tokens": 192,
            **options,
        }
    )


def assert_equal_bits(got: Results, want: Results) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].tobytes() == want[name].tobytes(), name


FORWARD = ("y", "tokens_per_expert", "dropped", "load_balance_loss", "z_loss")


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_agree_in_every_bit(dtype: str) -> None:
    def run(layer: Layer, load: Any = "skewed") -> Results:
        results = evaluate.implementation_results(layer, load, "fused")
        return {name: results[name] for name in FORWARD}

    layer = plain(dtype)
    other = plain(dtype, size=(40, 136), tokens=64)
    first = run(layer)
    for load in LOADS:
        run(other, load)  # Leaves other values in heaps and workspaces.
        run(layer, load)
        assert_equal_bits(run(layer), first)
    fm.runtime.reset()
    assert_equal_bits(run(layer), first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_flax_layer_under_jit_with_gradients(dtype: str) -> None:
    from flax import nnx

    layer = plain(dtype)
    batch, params = inputs.batch(layer, "uniform"), inputs.parameters(layer)
    flax_layer = fm.MoE(
        layer.config, implementation="fused", param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)
    )
    names = ("router", "gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    for name in names:
        getattr(flax_layer, name)[...] = jnp.asarray(getattr(params, name))

    def loss(flax_layer: fm.MoE) -> tuple[jax.Array, jax.Array]:
        y, aux = flax_layer(jnp.asarray(batch.x), mask=jnp.asarray(batch.mask))
        losses = jnp.stack([aux.load_balance_loss, aux.z_loss])
        cotangents = (y.astype(jnp.float32) * jnp.asarray(batch.dy, jnp.float32)).sum()
        return cotangents + (losses * jnp.asarray(batch.dlosses)).sum(), y

    (_, y), gradients = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(flax_layer)
    got = {"y": np.asarray(y)}
    got |= {f"d_{name}": np.asarray(getattr(gradients, name)[...]) for name in names}
    want = evaluate.oracle_results(layer, "uniform")
    suite.check(layer, "uniform", got, {name: want[name] for name in got})


def test_transformations_of_a_program() -> None:
    layer = plain("bfloat16", router="caller")
    batch, params = inputs.batch(layer, "uniform"), inputs.parameters(layer)
    routing = jax.tree.map(jnp.asarray, batch.routing)

    # Nothing of it is XLA's, which may round in other places in another program.
    def once(x: jax.Array) -> jax.Array:
        return fm.moe(x, params, layer.config, routing, implementation="fused")[0]

    def twice(x: jax.Array) -> jax.Array:
        return once(once(x))

    def scanned(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (once(x), None), x, None, length=2)[0]

    x = jnp.asarray(batch.x)
    want = np.asarray(jax.jit(twice)(x))
    assert np.isfinite(want.astype(np.float32)).all()
    for program in (scanned, jax.checkpoint(twice)):
        np.testing.assert_array_equal(jax.jit(program)(x), want)
    with jax.disable_jit():
        np.testing.assert_array_equal(twice(x), want)


def test_memory_is_made_by_execution_and_freed() -> None:
    module = _ffi.cuda_extension()
    layer = plain("bfloat16")
    batch, params = inputs.batch(layer, "uniform"), inputs.parameters(layer)
    function = jax.jit(functools.partial(fm.moe, config=layer.config, implementation="fused"))
    fm.runtime.reset()
    jax.eval_shape(function, batch.x, params)
    compiled = function.lower(batch.x, params).compile()
    assert module.reserved_bytes(0) == 0
    jax.block_until_ready(compiled(batch.x, params))
    held = module.reserved_bytes(0)
    assert held > 0
    jax.block_until_ready(function(batch.x, params))
    assert module.reserved_bytes(0) == held
    fm.runtime.reset()
    assert module.reserved_bytes(0) == 0


def error_of(function: Any) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011 -- XLA chooses the type
        function()
    return str(caught.value)


def test_a_bad_index_is_reported_until_reset() -> None:
    layer = plain("bfloat16", router="caller")
    batch, params = inputs.batch(layer, "uniform"), inputs.parameters(layer)
    good = jax.tree.map(jnp.asarray, batch.routing)
    bad = fm.Routing(good.indices.at[13, 1].set(99), good.weights)
    function = jax.jit(
        lambda routing: fm.moe(batch.x, params, layer.config, routing, implementation="fused")[0]
    )
    want = function(good)
    assert np.isnan(np.asarray(function(bad), np.float32)).all()
    for fails in (fm.runtime.check, lambda: jax.block_until_ready(function(good))):
        assert "expert index 99 (PE 0, token 13, slot 1) is out of range" in error_of(fails)
    fm.runtime.reset()
    np.testing.assert_array_equal(function(good), want)


def test_a_deadline_that_passes() -> None:
    layer = plain("bfloat16")
    batch, params = inputs.batch(layer, "uniform"), inputs.parameters(layer)
    # No thread block can be so early that it need not wait for another one.
    config = dataclasses.replace(layer.config, deadline_seconds=1e-9)
    y, _ = jax.jit(lambda x: fm.moe(x, params, config, implementation="fused"))(batch.x)
    assert np.isnan(np.asarray(y, np.float32)).all()
    assert "when the deadline passed" in error_of(fm.runtime.check)
    fm.runtime.reset()


def test_training_a_language_model(tmp_path: Path) -> None:
    for package in ("flax", "optax", "orbax.checkpoint", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    options = ["--quick", "--implementation", "fused", "--compare-steps", "20"]
    process = subprocess.run(
        [sys.executable, "-P", "examples/train_lm.py", *options, "--output", str(tmp_path)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT / "examples")]),
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            # Both processes are on the one GPU.
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.2",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    fused, xla = json.loads((tmp_path / "report.json").read_text())["timings"]
    assert (fused["implementation"], xla["implementation"]) == ("fused", "xla")
    # They differ by the order of sums in float32, which 20 steps amplify (tests/test_demo.py).
    assert np.abs(np.subtract(fused["losses"], xla["losses"])).max() < 1e-3
    assert fused["losses"][-1] < fused["losses"][0]
