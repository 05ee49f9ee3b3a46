"""The Flax layers: names and shardings, agreement with the operator and each other, dtypes."""

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
from layer_cases import (
    CONFIG,
    EVERYTHING,
    assert_same,
    biased,
    each_config,
    each_kind,
    linen_arrays,
    linen_layer,
    linen_variables,
    nnx_arrays,
    nnx_layer,
    tokens,
)

import flashmoe_jax as fm

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


def fill(layer: fm.MoE, arrays: Mapping[str, jax.Array]) -> None:
    """Sets the layer's variables from arrays by name."""
    for name, array in arrays.items():
        getattr(layer, name)[...] = array


def assert_alike(got: Any, want: Any) -> None:
    """The same tree of arrays but for rounding: XLA scales normal numbers in one way or another."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


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
        layer = biased(nnx_layer(config, implementation=implementation))
        want = fm.moe(x, layer.moe_params(), config, implementation=implementation)
        assert_same(layer(x), want)
        module = linen_layer(config, implementation=implementation)
        assert_same(module.apply(linen_variables(nnx_arrays(layer)), x), want)


@pytest.mark.smoke
@each_config
def test_parameters_convert_both_ways_bitwise(config: fm.MoEConfig) -> None:
    x = tokens()
    layer = biased(nnx_layer(config, seed=5))
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
    layer = biased(nnx_layer(EVERYTHING))
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
