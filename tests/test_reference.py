"""The oracle against a NumPy loop in float64, and the sharded JAX path against the oracle."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MeshMaker
from measures import assert_close

import flashmoe_jax as fm
from flashmoe_jax.reference.drops import water_fill_cap

E, K, H, D, T = 16, 3, 24, 40, 64

# Both sides sum at most H, D or T * K = 192 terms in different orders, and an error passes through
# two products at most: twice the square root of 192 half roundings.
FLOAT32 = 2 * 14 * 2.0**-24
FLOAT64 = 2 * 14 * 2.0**-53
# In 16 bits the values between the products are rounded too: x, hidden, expert output, y and their
# cotangents, eight half roundings.
BFLOAT16 = 8 * 2.0**-9
FLOAT16 = 8 * 2.0**-12


def make_config(**changes: Any) -> fm.MoEConfig:
    sizes = {
        "num_experts": E,
        "experts_per_token": K,
        "hidden_size": H,
        "intermediate_size": D,
        "use_bias": True,
    }
    return fm.MoEConfig(**{**sizes, **changes})


def make_inputs(
    config: fm.MoEConfig, dtype: Any = jnp.float32, seed: int = 0
) -> tuple[jax.Array, fm.MoEParams, fm.Routing]:
    """Tokens, parameters, and a routing with everything a caller may do, with values of size 1.

    It masks slots and whole tokens, repeats experts within a token, gives expert 1 nothing and
    expert 0 about a third of all rows.
    """
    key = jax.random.key(seed)
    names = ("x", "params", "biases", "indices", "repeats", "skew", "mask", "weights")
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    params = fm.init_params(keys["params"], config, dtype)
    biases = {
        name: jax.random.normal(jax.random.fold_in(keys["biases"], i), bias.shape, dtype)
        for i, name in enumerate(("gate_bias", "up_bias", "down_bias"))
        if (bias := getattr(params, name)) is not None
    }
    params = dataclasses.replace(params, **biases)
    shape = (T, config.experts_per_token)
    indices = jax.random.randint(keys["indices"], shape, 1, E)
    indices = jnp.where(indices == 1, 2, indices)
    repeats = jax.random.bernoulli(keys["repeats"], 0.2, (T, 1))
    indices = jnp.where(repeats, indices[:, :1], indices)
    indices = jnp.where(jax.random.bernoulli(keys["skew"], 0.3, shape), 0, indices)
    indices = jnp.where(jax.random.bernoulli(keys["mask"], 0.1, shape), -1, indices)
    indices = indices.at[5:8].set(-1)
    weights = jax.random.normal(keys["weights"], shape)
    # What a masked slot holds must not matter.
    weights = jnp.where(indices < 0, jnp.nan, weights)
    return jax.random.normal(keys["x"], (T, H), dtype), params, fm.Routing(indices, weights)


def loop(
    x: Any,
    params: fm.MoEParams,
    indices: np.ndarray,
    weights: np.ndarray,
    config: fm.MoEConfig,
    num_pes: int = 1,
) -> tuple[np.ndarray, int]:
    """y [T, H] and the dropped rows, by the text of the design, one row at a time in float64."""
    x, p = jax.tree.map(functools.partial(np.asarray, dtype=np.float64), (x, params))
    activation: Callable[[np.ndarray], np.ndarray] = {
        "silu": lambda v: v / (1 + np.exp(-v)),
        "gelu": lambda v: v * np.vectorize(math.erfc)(-v / math.sqrt(2)) / 2,
        "gelu_tanh": lambda v: (
            v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2
        ),
        "relu": lambda v: np.maximum(v, 0),
        "relu2": lambda v: np.maximum(v, 0) ** 2,
    }[config.activation]

    def expert(e: int, token: np.ndarray) -> np.ndarray:
        up = token @ p.up[e] + (p.up_bias[e] if config.use_bias else 0)
        if config.gated:
            gate = token @ p.gate[e] + (p.gate_bias[e] if config.use_bias else 0)
            hidden = activation(gate) * up
        else:
            hidden = activation(up)
        return hidden @ p.down[e] + (p.down_bias[e] if config.use_bias else 0)

    counts = np.array([(indices == e).sum() for e in range(config.num_experts)])
    cap = max(counts.max(), 1)
    if config.max_received_rows is not None:
        while np.minimum(counts, cap).reshape(num_pes, -1).sum(1).max() > config.max_received_rows:
            cap -= 1
    if config.capacity_factor is not None:
        mean_rows = len(x) * config.experts_per_token / config.num_experts
        cap = min(cap, max(1, math.ceil(config.capacity_factor * mean_rows)))

    y = np.zeros_like(x)
    seen = np.zeros(config.num_experts, int)
    dropped = 0
    for token, slot in np.ndindex(*indices.shape):
        e = indices[token, slot]
        if e < 0:
            continue
        if seen[e] < cap:
            y[token] += weights[token, slot] * expert(e, x[token])
        else:
            dropped += 1
        seen[e] += 1
    if config.num_shared_experts:
        shared = dataclasses.replace(
            params,
            gate=None if p.shared.gate is None else p.shared.gate[None],
            up=p.shared.up[None],
            down=p.shared.down[None],
        )
        one = dataclasses.replace(config, num_experts=1, experts_per_token=1, use_bias=False)
        one = dataclasses.replace(
            one, num_shared_experts=0, capacity_factor=None, max_received_rows=None
        )
        ones = np.ones((len(x), 1))
        y += loop(x, shared, np.zeros((len(x), 1), int), ones, one)[0]
    return y, dropped


DROPS = {
    "dropless": {},
    "capacity": {"capacity_factor": 0.75},
    "bounded": {"max_received_rows": 30},
    "capacity and bounded": {"capacity_factor": 1.5, "max_received_rows": 25},
}


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_dense_equals_loop(activation: str, gated: bool) -> None:
    config = make_config(activation=activation, gated=gated, num_shared_experts=int(gated))
    with jax.enable_x64(True):
        x, params, routing = make_inputs(config, jnp.float64)
        params = dataclasses.replace(params, router=params.router.astype(jnp.float64))
        y, aux = fm.moe(x, params, config, routing, implementation="dense")
    assert y.dtype == jnp.float64
    indices, weights = map(np.asarray, (routing.indices, routing.weights))
    want, _ = loop(x, params, indices, weights, config)
    assert_close(y, want, FLOAT64)
    assert int(aux.dropped) == 0
    counts = [(indices == e).sum() for e in range(E)]
    np.testing.assert_array_equal(aux.tokens_per_expert, counts)


@pytest.mark.parametrize("drops", DROPS.values(), ids=DROPS)
@pytest.mark.parametrize("num_pes", [1, 8])
def test_dense_drops_what_the_loop_drops(
    drops: dict[str, Any], num_pes: int, make_mesh: MeshMaker
) -> None:
    config = make_config(**drops)
    x, params, routing = make_inputs(config)
    y, aux = fm.moe(
        x, params, config, routing, mesh=make_mesh(expert=num_pes), implementation="dense"
    )
    indices, weights = map(np.asarray, (routing.indices, routing.weights))
    want, dropped = loop(x, params, indices, weights, config, num_pes)
    assert_close(y, want, FLOAT32)
    assert aux.dropped == dropped
    # With 8 PEs the bound alone may let some rows pass on all of them.
    assert (dropped > 0) == bool(drops)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_gradient_of_dense_is_the_slope_of_the_loop(gated: bool) -> None:
    config = make_config(gated=gated, activation="gelu", num_shared_experts=1)
    with jax.enable_x64(True):
        x, params, routing = make_inputs(config, jnp.float64)
        indices = np.asarray(routing.indices)
        weights = jnp.nan_to_num(routing.weights).astype(jnp.float64)
        readout = jax.random.normal(jax.random.key(9), (T, H), jnp.float64)

        def value(x: jax.Array, params: fm.MoEParams, weights: jax.Array) -> jax.Array:
            routing = fm.Routing(jnp.asarray(indices), weights)
            y, _ = fm.moe(x, params, config, routing, implementation="dense")
            return jnp.sum(y * readout)

        point = x, dataclasses.replace(params, router=params.router.astype(jnp.float64)), weights
        gradient = jax.tree.map(np.asarray, jax.jit(jax.grad(value, argnums=(0, 1, 2)))(*point))
        readout = np.asarray(readout)
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, point))
    rng = np.random.default_rng(0)
    step = 1e-5
    for i, slope in enumerate(jax.tree.leaves(gradient)):
        direction = rng.normal(size=leaves[i].shape)

        def moved(step: float, i: int = i, direction: np.ndarray = direction) -> float:
            changed = [*leaves[:i], leaves[i] + step * direction, *leaves[i + 1 :]]
            x, params, weights = jax.tree.unflatten(structure, changed)
            return float(np.sum(loop(x, params, indices, weights, config)[0] * readout))

        quotient = (moved(step) - moved(-step)) / (2 * step)
        # Central differences err by step^2 of a third derivative, and rounding by 1e-16 / step.
        scale = np.linalg.norm(slope) * np.linalg.norm(direction)
        assert abs(np.sum(slope * direction) - quotient) <= 1e-8 * scale


def outputs_and_gradients(
    implementation: str, config: fm.MoEConfig, mesh: Any, x: Any, params: Any, routing: fm.Routing
) -> Any:
    """y, dropped, and the gradients of x, the parameters and the weights of unmasked slots."""
    # Cotangents of size 1, of both signs.
    readout = jax.random.normal(jax.random.key(4), x.shape)

    def value(x: jax.Array, params: fm.MoEParams, weights: jax.Array) -> Any:
        given = dataclasses.replace(routing, weights=weights)
        y, aux = fm.moe(x, params, config, given, mesh=mesh, implementation=implementation)
        return jnp.sum(y.astype(readout.dtype) * readout), (y, aux.dropped)

    grad = jax.jit(jax.grad(value, argnums=(0, 1, 2), has_aux=True))
    (dx, d_params, d_weights), (y, dropped) = grad(x, params, routing.weights)
    assert not np.any(np.asarray(d_params.router)), "the given routing does not use the router"
    return int(dropped), (y, dx, dataclasses.replace(d_params, router=None), d_weights)


# Every activation, gated and plain, with and without biases and shared experts.
LAYERS = [
    {},
    {"activation": "gelu", "gated": False},
    {"activation": "gelu_tanh", "use_bias": False, "num_shared_experts": 2},
    {"activation": "relu2", "gated": False, "use_bias": False},
    {"activation": "relu", "num_shared_experts": 1},
]


@pytest.mark.parametrize(
    ("num_pes", "drops", "layer"),
    [
        (num_pes, drops, LAYERS[(i + j) % len(LAYERS)])
        for i, num_pes in enumerate((1, 2, 4, 8))
        for j, drops in enumerate(DROPS)
    ],
    ids=str,
)
def test_xla_equals_dense(
    num_pes: int, drops: str, layer: dict[str, Any], make_mesh: MeshMaker
) -> None:
    config = make_config(**DROPS[drops], **layer)
    inputs = make_inputs(config)
    mesh = make_mesh(expert=num_pes)
    dropped, got = outputs_and_gradients("xla", config, mesh, *inputs)
    want_dropped, want = outputs_and_gradients("dense", config, mesh, *inputs)
    assert dropped == want_dropped
    assert_close(got, want, FLOAT32)


@pytest.mark.parametrize("drops", ["dropless", "capacity"])
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(jnp.bfloat16, BFLOAT16), (jnp.float16, FLOAT16)], ids=["bf16", "f16"]
)
def test_xla_in_16_bits(drops: str, dtype: Any, rounding: float, make_mesh: MeshMaker) -> None:
    config = make_config(**DROPS[drops], num_shared_experts=1)
    x, params, routing = make_inputs(config, dtype)
    dropped, got = outputs_and_gradients("xla", config, make_mesh(expert=4), x, params, routing)
    exact_x, exact_params = jax.tree.map(lambda a: a.astype(jnp.float32), (x, params))
    want_dropped, want = outputs_and_gradients(
        "dense", config, None, exact_x, exact_params, routing
    )
    assert got[0].dtype == dtype
    assert dropped == want_dropped
    assert_close(got, want, rounding)


@pytest.mark.smoke
def test_xla_without_a_mesh_equals_dense() -> None:
    config = make_config(capacity_factor=0.75)
    inputs = make_inputs(config)
    dropped, got = outputs_and_gradients("xla", config, None, *inputs)
    want_dropped, want = outputs_and_gradients("dense", config, None, *inputs)
    assert dropped == want_dropped > 0
    assert_close(got, want, FLOAT32)


def test_an_expert_without_rows_has_no_gradient(make_mesh: MeshMaker) -> None:
    config = make_config()
    inputs = make_inputs(config)
    for implementation, mesh in (("xla", make_mesh(expert=4)), ("dense", None)):
        _, (_, _, gradient, _) = outputs_and_gradients(implementation, config, mesh, *inputs)
        assert not np.any(gradient.up[1])
        assert np.any(gradient.up[0])


@pytest.mark.parametrize("implementation", ["xla", "dense"])
@pytest.mark.parametrize("drops", ["dropless", "capacity"])
def test_a_traced_invalid_routing_makes_its_token_nan(
    implementation: str, drops: str, make_mesh: MeshMaker
) -> None:
    config = make_config(**DROPS[drops], use_bias=False)
    x, params, routing = make_inputs(config)
    indices = routing.indices.at[3, 0].set(E).at[20, 1].set(-2).at[30].set(4)
    routing = fm.Routing(indices, routing.weights.at[30, 2].set(jnp.inf))
    mesh = make_mesh(expert=4)

    @jax.jit
    def run(routing: fm.Routing) -> jax.Array:
        return fm.moe(x, params, config, routing, mesh=mesh, implementation=implementation)[0]

    invalid = [3, 20, 30]
    y = run(routing)
    assert np.isnan(y[np.array(invalid)]).all()
    masked = fm.Routing(indices.at[np.array(invalid)].set(-1), routing.weights)
    rest = np.setdiff1d(np.arange(T), invalid)
    np.testing.assert_array_equal(y[rest], run(masked)[rest])


def test_drops_do_not_depend_on_the_number_of_pes(make_mesh: MeshMaker) -> None:
    config = make_config(capacity_factor=0.5)
    x, params, routing = make_inputs(config)
    results = [
        fm.moe(x, params, config, routing, mesh=make_mesh(expert=n), implementation="xla")
        for n in (1, 2, 4, 8)
    ]
    want, want_aux = results[0]
    assert want_aux.dropped > 0
    for y, aux in results[1:]:
        assert int(aux.dropped) == int(want_aux.dropped)
        assert_close(y, want, FLOAT32)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (4, 4), (3, 16)])
def test_water_fill_is_the_largest_cap_that_fits(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = rng.geometric(rng.uniform(0.02, 0.5), shape) - 1
        for max_rows in rng.integers(shape[1], counts.sum(1).max() + shape[1] + 1, 5):
            cap = int(water_fill_cap(jnp.asarray(counts, jnp.int32), int(max_rows)))

            def most_rows(cap: int, counts: np.ndarray = counts) -> int:
                return np.minimum(counts, cap).sum(1).max()

            assert most_rows(cap) <= max_rows
            if counts.sum(1).max() <= max_rows:
                assert cap >= counts.max()
            else:
                assert most_rows(cap + 1) > max_rows
