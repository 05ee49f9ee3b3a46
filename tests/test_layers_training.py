"""The Flax layers in training: jitter, selection bias, optimizers, stacks of layers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import MeshMaker
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from layer_cases import (
    CONFIG,
    EVERYTHING,
    assert_same,
    each_kind,
    linen_layer,
    linen_variables,
    nnx_arrays,
    nnx_layer,
    tokens,
)

import flashmoe_jax as fm
from flashmoe_jax.layers import linen
from flashmoe_jax.layers.nnx import RouterState

# Jitter


def test_nnx_jitter_only_in_training() -> None:
    config = dataclasses.replace(CONFIG, router=fm.RouterConfig(jitter=0.5))
    x = tokens()
    layer = nnx_layer(config)
    first, second = layer(x)[0], layer(x)[0]
    assert not np.array_equal(first, second)
    key = jax.random.key(3)
    assert_same(
        layer(x, key=key), fm.moe(x, layer.moe_params(), config, implementation="xla", key=key)
    )

    without = fm.moe(x, layer.moe_params(), config, implementation="xla")
    assert_same(layer(x, deterministic=True), without)
    count = int(layer.jitter_stream.count[...])
    layer.eval()
    assert_same(layer(x), without)
    assert int(layer.jitter_stream.count[...]) == count
    layer.train()
    assert not np.array_equal(layer(x)[0], without[0])

    # The same stream under jit, and the same parameters with and without a stream.
    other = nnx_layer(config)
    jitted = nnx.jit(lambda layer, x: layer(x)[0])
    np.testing.assert_allclose(jitted(other, x), first, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jitted(other, x), second, rtol=1e-5, atol=1e-6)
    assert_same(nnx_arrays(layer), nnx_arrays(nnx_layer(CONFIG)))
    assert nnx.state(nnx_layer(CONFIG), nnx.RngState) == nnx.State({})


def test_linen_jitter_only_in_training() -> None:
    config = dataclasses.replace(CONFIG, router=fm.RouterConfig(jitter=0.5))
    x = tokens()
    module = linen_layer(config)
    variables = module.init(jax.random.key(0), x)
    without = linen_layer(CONFIG).apply(variables, x)

    def jittered(seed: int) -> jax.Array:
        return module.apply(variables, x, rngs={"jitter": jax.random.key(seed)})[0]

    assert not np.array_equal(jittered(1), without[0])
    assert not np.array_equal(jittered(1), jittered(2))
    assert_same(jittered(1), jittered(1))
    assert_same(module.apply(variables, x, deterministic=True), without)
    assert_same(linen_layer(config, deterministic=True).apply(variables, x), without)
    key = jax.random.key(3)
    assert_same(
        module.apply(variables, x, key=key),
        fm.moe(
            x, module.apply(variables, method="moe_params"), config, implementation="xla", key=key
        ),
    )
    with pytest.raises(Exception, match="jitter"):
        module.apply(variables, x)


# Selection bias


def test_selection_bias_is_updated_by_counts_and_not_by_gradients() -> None:
    x = tokens()
    layer = nnx_layer(EVERYTHING)
    module = linen_layer(EVERYTHING)
    variables = linen_variables(nnx_arrays(layer))
    assert isinstance(layer.selection_bias, RouterState)
    assert "selection_bias" not in nnx.state(layer, nnx.Param)

    _, aux = layer(x)
    counts = np.asarray(aux.tokens_per_expert)
    assert counts.min() < counts.mean() < counts.max()
    layer.update_selection_bias(aux, 0.25)
    np.testing.assert_array_equal(
        layer.selection_bias[...], 0.25 * np.sign(counts.mean() - counts).astype(np.float32)
    )
    _, updated = module.apply(
        variables, aux, 0.25, method="update_selection_bias", mutable=["router_state"]
    )
    assert_same(updated["router_state"]["selection_bias"], layer.selection_bias[...])

    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)
    before = jnp.array(layer.selection_bias[...])
    router = jnp.array(layer.router[...])
    optimizer.update(layer, nnx.grad(lambda layer: layer(x)[0].sum())(layer))
    assert_same(layer.selection_bias[...], before)
    assert not np.array_equal(layer.router[...], router)


def test_selection_bias_evens_out_the_load_under_jit(make_mesh: MeshMaker) -> None:
    config = dataclasses.replace(CONFIG, router=fm.RouterConfig(selection_bias=True))
    x = tokens() + 1  # A common direction, which some experts like better than others.

    @nnx.jit
    def step(layer: fm.MoE) -> jax.Array:
        _, aux = layer(x)
        layer.update_selection_bias(aux, 0.01)
        return aux.tokens_per_expert

    with jax.set_mesh(make_mesh(expert=4)):
        layer = nnx_layer(config)
        counts = [np.asarray(step(layer)) for _ in range(60)]
    assert counts[-1].max() < 0.7 * counts[0].max()
    assert counts[-1].sum() == counts[0].sum()


def test_selection_bias_that_does_not_exist() -> None:
    layer = nnx_layer()
    _, aux = layer(tokens())
    assert layer.selection_bias is None
    with pytest.raises(ValueError, match=r"RouterConfig\(selection_bias=True\)"):
        layer.update_selection_bias(aux, 0.1)
    with pytest.raises(ValueError, match=r"RouterConfig\(selection_bias=True\)"):
        linen_layer().apply(
            linen_variables(nnx_arrays(layer)), aux, 0.1, method="update_selection_bias"
        )


# Training and transformations


def regression() -> tuple[jax.Array, jax.Array]:
    x = tokens()
    return x, jnp.roll(x, 1, axis=-1)


@pytest.mark.parametrize("implementation", ["fused", "xla"])
def test_nnx_trains_on_a_mesh(implementation: str, make_mesh: MeshMaker) -> None:
    x, target = regression()

    @nnx.jit
    def step(layer: fm.MoE, optimizer: nnx.Optimizer) -> jax.Array:
        def loss(layer: fm.MoE) -> jax.Array:
            y, aux = layer(x)
            return jnp.mean((y - target) ** 2) + 0.01 * aux.load_balance_loss

        value, gradients = nnx.value_and_grad(loss)(layer)
        optimizer.update(layer, gradients)
        return value

    with jax.set_mesh(make_mesh(data=2, expert=4)):
        layer = nnx_layer(implementation=implementation)
        optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.Param)
        losses = [float(step(layer, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    assert layer.up.sharding.shard_shape(layer.up.shape) == (2, 16, 24)


@pytest.mark.parametrize("implementation", ["fused", "xla"])
def test_linen_trains_on_a_mesh(implementation: str, make_mesh: MeshMaker) -> None:
    x, target = regression()
    module = linen_layer(implementation=implementation)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            y, aux = module.apply({"params": params}, x)
            return jnp.mean((y - target) ** 2) + 0.01 * aux.load_balance_loss

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    losses = []
    with jax.set_mesh(make_mesh(data=2, expert=4)):
        params = module.init(jax.random.key(0), x)["params"]
        state = optimizer.init(params)
        for _ in range(30):
            params, state, value = step(params, state)
            losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    up = params["up"].value
    assert up.sharding.shard_shape(up.shape) == (2, 16, 24)


@each_kind
def test_nnx_layers_stacked_and_scanned(kind: AxisType, make_mesh: MeshMaker) -> None:
    x = tokens()
    depth = 3

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def make(rngs: nnx.Rngs) -> fm.MoE:
        return fm.MoE(CONFIG, implementation="xla", rngs=rngs)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def apply(x: jax.Array, layer: fm.MoE) -> jax.Array:
        return x + layer(x)[0]

    with jax.set_mesh(make_mesh(kind, expert=8)):
        stack = make(nnx.Rngs(0))
        assert stack.up.shape == (depth, 8, 16, 24)
        assert stack.up.sharding.shard_shape(stack.up.shape) == (depth, 1, 16, 24)
        assert stack.up.get_metadata("out_sharding") == (None, "expert", None, None)
        y = nnx.jit(apply)(x, stack)
        want = x
        for i in range(depth):
            params = jax.tree.map(lambda a, i=i: jnp.asarray(np.asarray(a)[i]), stack.moe_params())
            want = want + fm.moe(want, params, CONFIG, implementation="dense")[0]
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


def test_linen_inside_another_module() -> None:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> tuple[jax.Array, fm.MoEAux]:
            y, aux = linen.MoE(CONFIG, implementation="xla", name="moe")(nn.LayerNorm()(x))
            return x + y, aux

    variables = Block().init(jax.random.key(0), tokens())
    assert set(variables["params"]["moe"]) == {"router", "gate", "up", "down"}
    y, aux = jax.jit(Block().apply)(variables, tokens())
    assert y.shape == tokens().shape
    assert int(aux.tokens_per_expert.sum()) == 64
