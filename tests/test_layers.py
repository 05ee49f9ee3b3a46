"""The Flax layers: creation on a mesh, agreement with the operator and each other, training."""

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import MeshMaker
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import flashmoe_jax as fm
from flashmoe_jax.layers import linen
from flashmoe_jax.layers.nnx import RouterState

CONFIG = fm.MoEConfig(num_experts=8, experts_per_token=2, hidden_size=16, intermediate_size=24)
PLAIN = dataclasses.replace(CONFIG, activation="gelu", gated=False, use_bias=True)
EVERYTHING = dataclasses.replace(
    CONFIG,
    use_bias=True,
    num_shared_experts=2,
    router=fm.RouterConfig(score="sigmoid", selection_bias=True, num_groups=4, groups_per_token=2),
)
CONFIGS = {"gated": CONFIG, "plain": PLAIN, "everything": EVERYTHING}
SHAPES = {
    "router": (16, 8),
    "selection_bias": (8,),
    "gate": (8, 16, 24),
    "up": (8, 16, 24),
    "down": (8, 24, 16),
    "gate_bias": (8, 24),
    "up_bias": (8, 24),
    "down_bias": (8, 16),
    "shared_gate": (16, 48),
    "shared_up": (16, 48),
    "shared_down": (48, 16),
}
OF_EXPERTS = {"gate", "up", "down", "gate_bias", "up_bias", "down_bias"}
KINDS = [AxisType.Auto, AxisType.Explicit]

each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def tokens(dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(7), (8, 4, 16), dtype)


def nnx_layer(config: fm.MoEConfig = CONFIG, seed: int = 0, **options: Any) -> fm.MoE:
    return fm.MoE(config, rngs=nnx.Rngs(seed), **{"implementation": "xla", **options})


def linen_layer(config: fm.MoEConfig = CONFIG, **options: Any) -> linen.MoE:
    return linen.MoE(config, **{"implementation": "xla", **options})


def nnx_arrays(layer: fm.MoE) -> dict[str, jax.Array]:
    """The parameters and the selection bias by name."""
    state = nnx.to_flat_state(nnx.state(layer, (nnx.Param, RouterState)))
    return {".".join(path): variable[...] for path, variable in state}


def linen_arrays(variables: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The parameters and the selection bias by name."""
    return {**nn.unbox(variables["params"]), **variables.get("router_state", {})}


def linen_variables(arrays: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
    """What Linen takes, from arrays by name."""
    params = dict(arrays)
    if (bias := params.pop("selection_bias", None)) is None:
        return {"params": params}
    return {"params": params, "router_state": {"selection_bias": bias}}


def fill(layer: fm.MoE, arrays: Mapping[str, jax.Array]) -> None:
    """Sets the layer's variables from arrays by name."""
    for name, array in arrays.items():
        getattr(layer, name)[...] = array


def assert_same(got: Any, want: Any) -> None:
    """The same tree of arrays, bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_alike(got: Any, want: Any) -> None:
    """The same tree of arrays but for rounding: XLA scales normal numbers in one way or another."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def biased(config: fm.MoEConfig, layer: fm.MoE) -> fm.MoE:
    """The layer with biases that are not zero, as they are after some training."""
    for number, name in enumerate(sorted(nnx_arrays(layer))):
        if name.endswith("bias"):
            variable = getattr(layer, name)
            variable[...] = jax.random.normal(jax.random.key(number), variable.shape)
    return layer


# Names, values, shardings


@each_config
def test_both_layers_have_the_same_names_and_layouts(config: fm.MoEConfig) -> None:
    of_nnx = jax.tree.map(lambda a: (a.shape, a.dtype), nnx_arrays(nnx_layer(config)))
    variables = linen_layer(config).init(jax.random.key(0), tokens())
    of_linen = jax.tree.map(lambda a: (a.shape, a.dtype), linen_arrays(variables))
    assert of_nnx == of_linen
    assert {name: shape for name, (shape, _) in of_nnx.items()} == {
        name: shape for name, shape in SHAPES.items() if name in of_nnx
    }
    if config is EVERYTHING:
        assert of_nnx.keys() == SHAPES.keys()


def test_nnx_values_are_those_of_init_params() -> None:
    layer = nnx_layer(EVERYTHING, seed=3)
    assert_alike(layer.moe_params(), fm.init_params(nnx.Rngs(3).params(), EVERYTHING))


def test_linen_weights_have_the_scale_of_init_params() -> None:
    config = dataclasses.replace(EVERYTHING, hidden_size=64, intermediate_size=96)
    params = fm.init_params(jax.random.key(1), config)
    module = linen_layer(config)
    variables = module.init(jax.random.key(0), jnp.ones((8, 64)))
    got = module.apply(variables, method="moe_params")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True):
        assert abs(jnp.std(a) - jnp.std(b)) <= 0.1 * jnp.std(b)
    names = ("gate", "up", "shared_up")
    assert len({float(linen_arrays(variables)[name].ravel()[0]) for name in names}) == 3


@each_kind
@pytest.mark.parametrize("how", ["eager", "jit"])
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_set_mesh_shards_the_experts(
    api: str, how: str, kind: AxisType, make_mesh: MeshMaker
) -> None:
    def make() -> dict[str, jax.Array]:
        if api == "nnx":
            return nnx_arrays(nnx_layer(EVERYTHING))
        return linen_arrays(linen_layer(EVERYTHING).init(jax.random.key(0), tokens()))

    with jax.set_mesh(make_mesh(kind, data=2, expert=4)):
        arrays = (jax.jit(make) if how == "jit" else make)()
    for name, array in arrays.items():
        parts = 4 if name in OF_EXPERTS else 1
        local = (array.shape[0] // parts, *array.shape[1:])
        assert array.sharding.shard_shape(array.shape) == local, name
    assert_alike(arrays, make())


@each_kind
def test_mesh_argument_shards_the_experts(kind: AxisType, make_mesh: MeshMaker) -> None:
    mesh = make_mesh(kind, expert=4)
    layer = nnx_layer(EVERYTHING, mesh=mesh)
    y, aux = layer(tokens())
    assert layer.up.sharding.shard_shape(layer.up.shape) == (2, 16, 24)
    assert layer.up.sharding.mesh == mesh
    assert_alike(nnx_arrays(layer), nnx_arrays(nnx_layer(EVERYTHING)))
    module = linen_layer(EVERYTHING, mesh=mesh)
    variables = module.init(jax.random.key(0), tokens())
    up = variables["params"]["up"].value
    assert up.sharding.shard_shape(up.shape) == (2, 16, 24)
    assert_same(module.apply(linen_variables(nnx_arrays(layer)), tokens()), (y, aux))


def test_mixed_axis_types(make_mesh: MeshMaker) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "expert"), (AxisType.Explicit, AxisType.Auto))
    with jax.set_mesh(mesh):
        layer = nnx_layer()
        y, _ = layer(tokens())
    assert layer.up.sharding.shard_shape(layer.up.shape) == (2, 16, 24)
    np.testing.assert_allclose(y, nnx_layer()(tokens())[0], rtol=1e-5, atol=1e-6)


def test_other_axis_names(make_mesh: MeshMaker) -> None:
    options = {"expert_axis": "ep", "token_axes": ("dp", "ep")}
    with jax.set_mesh(make_mesh(dp=2, ep=2, tp=2)):
        layer = nnx_layer(**options)
        y, _ = layer(tokens())
        variables = linen_layer(**options).init(jax.random.key(0), tokens())
    assert layer.up.sharding.spec == PartitionSpec("ep", None, None)
    assert variables["params"]["up"].names == ("ep", None, None)
    np.testing.assert_allclose(y, nnx_layer()(tokens())[0], rtol=1e-5, atol=1e-6)


@each_kind
def test_optimizer_state_is_sharded_like_the_parameters(
    kind: AxisType, make_mesh: MeshMaker
) -> None:
    with jax.set_mesh(make_mesh(kind, expert=8)):
        layer = nnx_layer()
        optimizer = nnx.Optimizer(layer, optax.adam(1e-3), wrt=nnx.Param)
    moment = optimizer.opt_state[0].mu["up"]
    assert moment.sharding.shard_shape(moment.shape) == (1, 16, 24)


def test_sharding_metadata_for_abstract_creation(make_mesh: MeshMaker) -> None:
    mesh = make_mesh(expert=8)
    with jax.set_mesh(mesh):
        abstract = nnx.state(nnx.eval_shape(lambda: nnx_layer(EVERYTHING)))
    specs = nnx.get_partition_spec(abstract)
    assert specs["up"].get_value() == PartitionSpec("expert", None, None)
    assert specs["router"].get_value() == PartitionSpec(None, None)
    variables = jax.eval_shape(linen_layer(EVERYTHING).init, jax.random.key(0), tokens())
    assert nn.get_partition_spec(variables)["params"]["up"] == PartitionSpec("expert", None, None)


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_mesh_that_does_not_fit(api: str, make_mesh: MeshMaker) -> None:
    def make(config: fm.MoEConfig, **options: Any) -> None:
        if api == "nnx":
            nnx_layer(config, **options)
        else:
            linen_layer(config, **options).init(jax.random.key(0), tokens())

    with pytest.raises(ValueError, match=r"no axis 'expert'.*'data'"):
        make(CONFIG, mesh=make_mesh(data=2))
    six = dataclasses.replace(CONFIG, num_experts=6)
    with (
        jax.set_mesh(make_mesh(expert=4)),
        pytest.raises(ValueError, match=r"num_experts=6.*4 PEs"),
    ):
        make(six)


# Agreement


@pytest.mark.smoke
@pytest.mark.parametrize("implementation", ["fused", "xla", "dense"])
@each_config
def test_layers_agree_with_the_operator_bitwise(
    config: fm.MoEConfig, implementation: str, make_mesh: MeshMaker
) -> None:
    x = tokens()
    with jax.set_mesh(make_mesh(expert=4)):
        layer = biased(config, nnx_layer(config, implementation=implementation))
        want = fm.moe(x, layer.moe_params(), config, implementation=implementation)
        assert_same(layer(x), want)
        module = linen_layer(config, implementation=implementation)
        assert_same(module.apply(linen_variables(nnx_arrays(layer)), x), want)


@pytest.mark.smoke
@each_config
def test_parameters_convert_both_ways_bitwise(config: fm.MoEConfig) -> None:
    x = tokens()
    layer = biased(config, nnx_layer(config, seed=5))
    module = linen_layer(config)
    variables = linen_variables(nnx_arrays(layer))
    assert jax.tree.structure(variables) == jax.tree.structure(
        nn.unbox(module.init(jax.random.key(0), x))
    )
    assert_same(module.apply(variables, x), layer(x))

    other = module.init(jax.random.key(11), x)
    fill(layer, linen_arrays(other))
    assert_same(layer(x), module.apply(other, x))


def test_gradients_of_both_layers_agree_bitwise() -> None:
    x = tokens()
    layer = biased(EVERYTHING, nnx_layer(EVERYTHING))
    module = linen_layer(EVERYTHING)

    def loss(y: jax.Array, aux: fm.MoEAux) -> jax.Array:
        return jnp.sum(y**2) + aux.load_balance_loss + aux.z_loss

    of_nnx = nnx.grad(lambda layer: loss(*layer(x)))(layer)
    variables = linen_variables(nnx_arrays(layer))
    state = {"router_state": variables["router_state"]}
    of_linen = jax.grad(lambda params: loss(*module.apply({"params": params} | state, x)))(
        variables["params"]
    )
    assert_same({path[0]: grad[...] for path, grad in nnx.to_flat_state(of_nnx)}, of_linen)
    assert all(jnp.any(gradient != 0) for gradient in of_linen.values())


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_mask_and_routing_reach_the_operator(api: str) -> None:
    x = tokens()
    layer = nnx_layer()
    params = layer.moe_params()
    module = linen_layer()

    def apply(**options: Any) -> Any:
        if api == "nnx":
            return layer(x, **options)
        return module.apply(linen_variables(nnx_arrays(layer)), x, **options)

    mask = jnp.arange(32).reshape(8, 4) % 3 > 0
    masked = apply(mask=mask)
    assert_same(masked, fm.moe(x, params, CONFIG, implementation="xla", mask=mask))
    assert int(masked[1].tokens_per_expert.sum()) == 2 * int(mask.sum())

    swapped = fm.route(x, params, CONFIG)
    routing = fm.Routing((swapped.indices + 1) % 8, swapped.weights)
    routed = apply(routing=routing)
    assert_same(routed, fm.moe(x, params, CONFIG, routing, implementation="xla"))
    assert not np.allclose(routed[0], apply()[0])


# Compute dtype


@pytest.mark.parametrize("api", ["nnx", "linen"])
@pytest.mark.parametrize(
    ("x_dtype", "param_dtype", "dtype", "want"),
    [
        (jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32, None, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16, None, jnp.bfloat16),
        (jnp.float16, jnp.bfloat16, jnp.float16, jnp.float16),
    ],
)
def test_compute_dtype(api: str, x_dtype: Any, param_dtype: Any, dtype: Any, want: Any) -> None:
    config = dataclasses.replace(EVERYTHING, use_bias=False)
    x = tokens(x_dtype)
    layer = nnx_layer(config, param_dtype=param_dtype, dtype=dtype)
    arrays = nnx_arrays(layer)
    params = layer.moe_params()
    if api == "nnx":
        y, _ = layer(x)
    else:
        module = linen_layer(config, param_dtype=param_dtype, dtype=dtype)
        created = linen_arrays(module.init(jax.random.key(0), x))
        assert {n: a.dtype for n, a in created.items()} == {n: a.dtype for n, a in arrays.items()}
        y, _ = module.apply(linen_variables(arrays), x)
    assert params.up.dtype == params.shared.down.dtype == param_dtype
    assert params.router.dtype == params.selection_bias.dtype == jnp.float32
    cast = jax.tree.map(lambda a: a.astype(want), params)
    cast = dataclasses.replace(cast, router=params.router, selection_bias=params.selection_bias)
    assert_same(y, fm.moe(x.astype(want), cast, config, implementation="xla")[0])
    assert y.dtype == want


def test_gradients_have_the_dtype_of_the_parameters() -> None:
    layer = nnx_layer(dtype=jnp.bfloat16)
    gradients = nnx.grad(lambda layer: layer(tokens())[0].astype(jnp.float32).sum())(layer)
    assert {a.dtype for a in jax.tree.leaves(nnx.as_pure(gradients))} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_integer_tokens_are_refused(api: str) -> None:
    x = jnp.ones((8, 16), jnp.int32)
    with pytest.raises(TypeError, match="x has dtype int32"):
        nnx_layer()(x) if api == "nnx" else linen_layer().init(jax.random.key(0), x)


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


def regression(layer_count: int = 1) -> tuple[jax.Array, jax.Array]:
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


def test_the_operator_does_not_need_flax() -> None:
    program = (
        "import sys; sys.modules['flax'] = None\n"
        "import flashmoe_jax as fm, jax\n"
        "config = fm.MoEConfig("
        "num_experts=2, experts_per_token=1, hidden_size=4, intermediate_size=4)\n"
        "x = jax.numpy.ones((3, 4))\n"
        "fm.moe(x, fm.init_params(jax.random.key(0), config), config, implementation='xla')\n"
        "try:\n    fm.MoE\nexcept ImportError:\n    print('only the layer needs Flax')\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "only the layer needs Flax", run.stderr
