"""Every way of calling the layer gives what the oracle gives for the same batch."""

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MeshMaker
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from measures import assert_close

import flashmoe_jax as fm
from flashmoe_jax import api
from flashmoe_jax.params import partition_specs

E, K, H, D = 8, 2, 12, 20
# At most 2 sqrt(T * K = 96) half roundings of float32, as in test_reference.py, and the router's
# product and softmax before them.
ROUNDING = 3 * 10 * 2.0**-24

CONFIG = fm.MoEConfig(
    num_experts=E, experts_per_token=K, hidden_size=H, intermediate_size=D, num_shared_experts=1
)
AXES = [{"expert": 8}, {"data": 2, "expert": 4}, {"data": 2, "expert": 2, "model": 2}]
AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]


def make_inputs(
    *lead: int, config: fm.MoEConfig = CONFIG, seed: int = 0
) -> tuple[jax.Array, fm.MoEParams]:
    keys = jax.random.split(jax.random.key(seed))
    return jax.random.normal(keys[0], (*lead, H)), fm.init_params(keys[1], config)


def layer(implementation: str, config: fm.MoEConfig = CONFIG, **kwargs: Any) -> Any:
    return functools.partial(fm.moe, config=config, implementation=implementation, **kwargs)


def value_and_gradients(apply: Any, x: jax.Array, params: fm.MoEParams) -> Any:
    """y, the auxiliary values, and the gradients of x and all parameters through y and both losses.

    The losses are scaled so that their gradients are about as large as those through y.
    """
    readout = np.asarray(jax.random.normal(jax.random.key(3), x.shape))

    def value(x: jax.Array, params: fm.MoEParams) -> tuple[jax.Array, Any]:
        y, aux = apply(x, params)
        loss = jnp.sum(y * readout) + x.size * (aux.load_balance_loss + aux.z_loss)
        return loss, (y, aux)

    gradients, outputs = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))(x, params)
    return outputs, gradients


@functools.cache
def oracle(*lead: int) -> Any:
    """What the oracle gives for `make_inputs(*lead)`, compiled once for all tests."""
    return value_and_gradients(layer("dense"), *make_inputs(*lead))


def assert_same(got: Any, want: Any, dropped: bool = False) -> None:
    """Outputs of `value_and_gradients`; counts must be equal."""
    (y, aux), gradients = got
    (want_y, want_aux), want_gradients = want
    np.testing.assert_array_equal(aux.tokens_per_expert, want_aux.tokens_per_expert)
    assert int(aux.dropped) == int(want_aux.dropped)
    assert (int(aux.dropped) > 0) == dropped
    got = y, aux.load_balance_loss, aux.z_loss, gradients
    want = want_y, want_aux.load_balance_loss, want_aux.z_loss, want_gradients
    assert_close(got, want, ROUNDING)


@pytest.mark.parametrize("axis_type", AXIS_TYPES, ids=str)
@pytest.mark.parametrize("sizes", AXES, ids=str)
def test_on_a_mesh(sizes: dict[str, int], axis_type: AxisType, make_mesh: MeshMaker) -> None:
    x, params = make_inputs(8, 6)
    mesh = make_mesh(axis_type, **sizes)
    got = value_and_gradients(layer("xla", mesh=mesh), x, params)
    assert_same(got, oracle(8, 6))


@pytest.mark.smoke
@pytest.mark.parametrize("axis_type", AXIS_TYPES, ids=str)
@pytest.mark.parametrize("lead", [(3, 6), (13,), (8, 1, 3), (1,)], ids=str)
def test_tokens_that_do_not_divide_among_the_shards(
    lead: tuple[int, ...], axis_type: AxisType, make_mesh: MeshMaker
) -> None:
    x, params = make_inputs(*lead)
    mesh = make_mesh(axis_type, data=2, expert=4)
    y, aux = layer("xla", mesh=mesh)(x, params)
    want, want_aux = layer("dense")(x, params)
    assert y.shape == x.shape
    assert_close(y, want, ROUNDING)
    np.testing.assert_array_equal(aux.tokens_per_expert, want_aux.tokens_per_expert)
    for name in ("load_balance_loss", "z_loss"):
        assert_close(getattr(aux, name), getattr(want_aux, name), ROUNDING)


def test_gradients_where_tokens_are_padded(make_mesh: MeshMaker) -> None:
    x, params = make_inputs(3, 6)
    got = value_and_gradients(layer("xla", mesh=make_mesh(data=2, expert=4)), x, params)
    assert_same(got, oracle(3, 6))


@pytest.mark.parametrize("axis_type", AXIS_TYPES, ids=str)
@pytest.mark.parametrize("drops", [{"capacity_factor": 0.7}, {"max_received_rows": 7}], ids=str)
@pytest.mark.parametrize("token_axes", [("data", "expert"), ("expert", "data")], ids=str)
def test_every_expert_parallel_group_drops_by_itself(
    token_axes: tuple[str, str],
    drops: dict[str, Any],
    axis_type: AxisType,
    make_mesh: MeshMaker,
) -> None:
    config = dataclasses.replace(CONFIG, **drops)
    x, params = make_inputs(8, 3)
    mesh = make_mesh(axis_type, data=2, expert=4)
    kwargs: dict[str, Any] = {"config": config, "mesh": mesh, "token_axes": token_axes}
    y, aux = layer("xla", **kwargs)(x, params)
    want, want_aux = layer("dense", **kwargs)(x, params)
    assert int(aux.dropped) == int(want_aux.dropped) > 0
    assert_close(y, want, ROUNDING)

    # The same by hand: each group alone on a mesh of its own.
    groups = x.reshape(2, 4, 3, H) if token_axes[0] == "data" else x.reshape(4, 2, 3, H)
    groups = np.moveaxis(np.asarray(groups), token_axes.index("data"), 0)
    alone = [layer("dense", config, mesh=make_mesh(expert=4))(group, params)[1] for group in groups]
    assert int(aux.dropped) == sum(int(one.dropped) for one in alone)


def test_capacity_counts_real_tokens_only(make_mesh: MeshMaker) -> None:
    # 9 tokens on 8 PEs are padded to 16, whose capacity would be 2; that of 9 is 1.
    config = dataclasses.replace(CONFIG, capacity_factor=0.4)
    assert (config.capacity(9), config.capacity(16)) == (1, 2)
    x, params = make_inputs(9)
    got = layer("xla", config, mesh=make_mesh(expert=8))(x, params)
    want = layer("dense", config)(x, params)
    assert int(got[1].dropped) == int(want[1].dropped) > 0
    assert_close(got[0], want[0], ROUNDING)


def test_without_a_mesh_and_on_one_device(make_mesh: MeshMaker) -> None:
    x, params = make_inputs(8, 6)
    assert_same(value_and_gradients(layer("xla"), x, params), oracle(8, 6))
    mesh = make_mesh(data=1, expert=1)
    assert_same(value_and_gradients(layer("xla", mesh=mesh), x, params), oracle(8, 6))


@pytest.mark.smoke
@pytest.mark.parametrize("axis_type", AXIS_TYPES, ids=str)
def test_the_mesh_of_set_mesh(axis_type: AxisType, make_mesh: MeshMaker) -> None:
    x, params = make_inputs(8, 6)
    want = oracle(8, 6)
    mesh = make_mesh(axis_type, data=2, expert=4)
    with jax.set_mesh(mesh):
        specs = partition_specs(CONFIG, "expert")
        sharded_x = jax.device_put(x, P("data"))
        sharded_params = jax.device_put(
            params, jax.tree.map(functools.partial(_named, mesh), specs)
        )
        got = value_and_gradients(layer("xla"), sharded_x, sharded_params)
        assert_same(got, want)
        # The same mesh by name, and the oracle on sharded arrays.
        for apply in (layer("xla", mesh=mesh), layer("dense")):
            y, _ = apply(sharded_x, sharded_params)
            assert_close(y, want[0][0], ROUNDING)


def _named(mesh: Mesh, spec: P) -> NamedSharding:
    return NamedSharding(mesh, spec)


@pytest.mark.parametrize("implementation", ["xla", "dense"])
def test_explicit_axes_keep_the_type_of_x(implementation: str, make_mesh: MeshMaker) -> None:
    mesh = make_mesh(AxisType.Explicit, data=2, expert=4)
    config = CONFIG
    for lead, spec in (((8, 4), P("data")), ((8, 4), P(None, "expert")), ((2, 3), P("data"))):
        x, params = make_inputs(*lead)
        with jax.set_mesh(mesh):
            x = jax.device_put(x, spec)

            @jax.jit
            def residual(x: jax.Array, params: fm.MoEParams) -> jax.Array:
                return x + fm.moe(x, params, config, implementation=implementation)[0]

            y = residual(x, params)
            assert jax.typeof(y).sharding.spec == jax.typeof(x).sharding.spec


def test_a_mesh_of_mixed_axis_types(make_mesh: MeshMaker) -> None:
    types = (AxisType.Explicit, AxisType.Auto)
    mesh = jax.make_mesh((2, 4), ("data", "expert"), types)
    x, params = make_inputs(8, 3)
    with jax.set_mesh(mesh):
        y, _ = jax.jit(layer("xla"))(jax.device_put(x, P("data")), params)
    assert_close(y, layer("dense")(x, params)[0], ROUNDING)


def test_eager_and_jitted_calls_agree_bitwise(make_mesh: MeshMaker) -> None:
    x, params = make_inputs(8, 3)
    apply = layer("xla", mesh=make_mesh(expert=8))
    eager, jitted = apply(x, params), jax.jit(apply)(x, params)
    jax.tree.map(np.testing.assert_array_equal, eager, jitted)


def test_other_axis_names(make_mesh: MeshMaker) -> None:
    x, params = make_inputs(8, 6)
    mesh = make_mesh(rows=2, ep=2, seq=2)
    apply = layer("xla", mesh=mesh, expert_axis="ep", token_axes=("rows", "seq", "ep"))
    assert_same(value_and_gradients(apply, x, params), oracle(8, 6))


def test_mask_and_jitter_do_not_depend_on_the_sharding(make_mesh: MeshMaker) -> None:
    config = dataclasses.replace(CONFIG, router=fm.RouterConfig(jitter=0.3))
    x, params = make_inputs(8, 6)
    mask = jax.random.bernoulli(jax.random.key(1), 0.7, (8, 6))
    mask = mask.at[0].set(False)
    kwargs = {"config": config, "key": jax.random.key(2), "mask": mask}
    mesh = make_mesh(data=2, expert=4)
    want = value_and_gradients(layer("dense", **kwargs), x, params)
    assert_same(value_and_gradients(layer("xla", mesh=mesh, **kwargs), x, params), want)

    y, aux = want[0]
    assert int(aux.tokens_per_expert.sum()) == K * int(mask.sum())
    quiet = layer("dense", config, mask=mask)(x, params)[0]
    assert not np.allclose(y, quiet)
    # What masked tokens get is what the shared experts alone give them.
    nothing = jax.tree.map(jnp.zeros_like, params)
    only_shared = dataclasses.replace(nothing, shared=params.shared)
    np.testing.assert_array_equal(y[~mask], layer("dense")(x, only_shared)[0][~mask])


@pytest.mark.parametrize("given", [False, True], ids=["mask", "given"])
@pytest.mark.parametrize("drops", [{}, {"capacity_factor": 1.0}], ids=["dropless", "capacity"])
@pytest.mark.parametrize("implementation", ["fused", "xla", "dense"])
def test_tokens_that_are_routed_nowhere_may_hold_anything(
    implementation: str, drops: dict[str, Any], given: bool, make_mesh: MeshMaker
) -> None:
    config = dataclasses.replace(CONFIG, num_shared_experts=0, use_bias=True, **drops)
    x, params = make_inputs(32, config=config)
    mask = np.arange(32) % 3 > 0
    kwargs: dict[str, Any] = {"mask": mask}
    if given:
        kwargs = {"routing": fm.route(x, params, config, mask=mask)}
    apply = layer(implementation, config, mesh=make_mesh(expert=4), **kwargs)

    @jax.jit
    def results(x: jax.Array, params: fm.MoEParams) -> Any:
        y, pull_back, aux = jax.vjp(apply, x, params, has_aux=True)
        return y, aux, pull_back(jnp.ones_like(y))

    want = results(jnp.where(mask[:, None], x, 0), params)
    for value in (np.nan, np.inf):
        got = results(jnp.where(mask[:, None], x, value), params)
        y, _, (d_x, _) = got
        assert not np.asarray(y)[~mask].any()
        assert not np.asarray(d_x)[~mask].any()
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_given_routing_with_mask_equals_own_routing(make_mesh: MeshMaker) -> None:
    x, params = make_inputs(3, 6)
    mask = jax.random.bernoulli(jax.random.key(1), 0.7, (3, 6))
    mesh = make_mesh(data=2, expert=4)
    routing = fm.route(x, params, CONFIG)
    y, aux = layer("xla", mesh=mesh, routing=routing, mask=mask)(x, params)
    want, want_aux = layer("xla", mesh=mesh, mask=mask)(x, params)
    jax.tree.map(functools.partial(assert_close, rounding=ROUNDING), y, want)
    np.testing.assert_array_equal(aux.tokens_per_expert, want_aux.tokens_per_expert)
    for name in ("load_balance_loss", "z_loss"):
        assert_close(getattr(aux, name), getattr(want_aux, name), ROUNDING)

    without_logits = dataclasses.replace(routing, logits=None)
    _, aux = layer("xla", mesh=mesh, routing=without_logits)(x, params)
    assert aux.load_balance_loss == aux.z_loss == 0


def test_aux_is_that_of_the_router(make_mesh: MeshMaker) -> None:
    x, params = make_inputs(8, 6)
    routing = fm.route(x, params, CONFIG)
    _, aux = layer("xla", mesh=make_mesh(data=2, expert=4))(x, params)
    assert_close(aux.load_balance_loss, fm.load_balance_loss(routing, CONFIG), ROUNDING)
    assert_close(aux.z_loss, fm.z_loss(routing, CONFIG), ROUNDING)
    counts = np.bincount(np.asarray(routing.indices).reshape(-1), minlength=E)
    np.testing.assert_array_equal(aux.tokens_per_expert, counts)


@pytest.mark.parametrize("implementation", ["xla", "dense"])
def test_no_tokens_at_all(implementation: str, make_mesh: MeshMaker) -> None:
    x, params = make_inputs(0, 6)
    y, aux = layer(implementation, mesh=make_mesh(expert=4))(x, params)
    assert y.shape == x.shape
    assert int(aux.tokens_per_expert.sum()) == int(aux.dropped) == 0
    assert aux.load_balance_loss == aux.z_loss == 0


@pytest.mark.parametrize("drops", [{}, {"capacity_factor": 1.0}], ids=str)
def test_no_tokens_on_any_device_of_a_shard_map(
    drops: dict[str, Any], make_mesh: MeshMaker
) -> None:
    config = dataclasses.replace(CONFIG, **drops)
    x, params = make_inputs(0, 6)
    apply = local_layer(make_mesh(data=2, expert=4), True, config, implementation="xla")
    y, aux = apply(x, params)
    assert y.shape == x.shape
    assert int(aux.tokens_per_expert.sum()) == int(aux.dropped) == 0


def test_router_of_another_dtype(make_mesh: MeshMaker) -> None:
    x, params = make_inputs(8, 3)
    low = params.router.astype(jnp.bfloat16)
    mesh = make_mesh(expert=4)
    y, _ = layer("xla", mesh=mesh)(x, dataclasses.replace(params, router=low))
    same = dataclasses.replace(params, router=low.astype(jnp.float32))
    np.testing.assert_array_equal(y, layer("xla", mesh=mesh)(x, same)[0])


def local_layer(mesh: Mesh, check_vma: bool, config: fm.MoEConfig = CONFIG, **kwargs: Any) -> Any:
    """`moe_local` in a shard_map as a user writes it, tokens sharded over data and expert."""
    tokens = P(("data", "expert"))
    local = functools.partial(fm.moe_local, config=config, expert_axis="expert", **kwargs)
    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(tokens, partition_specs(config, "expert")),
        out_specs=(tokens, P()),
        check_vma=check_vma,
    )
    return jax.jit(sharded)


def test_moe_local(make_mesh: MeshMaker) -> None:
    x, params = make_inputs(8, 6)
    apply = local_layer(make_mesh(data=2, expert=4), True, implementation="xla")
    assert_same(value_and_gradients(apply, x, params), oracle(8, 6))


def test_moe_local_without_check_vma(make_mesh: MeshMaker) -> None:
    x, params = make_inputs(8, 6)
    mesh = make_mesh(data=2, expert=4)
    apply = local_layer(mesh, False, implementation="xla", token_axes=("data", "expert"))
    assert_same(value_and_gradients(apply, x, params), oracle(8, 6))


def test_moe_local_draws_the_jitter_of_the_whole_batch(make_mesh: MeshMaker) -> None:
    config = dataclasses.replace(CONFIG, router=fm.RouterConfig(jitter=0.3))
    x, params = make_inputs(8, 3)
    mesh = make_mesh(data=2, expert=4)
    key = jax.random.key(2)

    def local(x: jax.Array, params: fm.MoEParams, key: jax.Array) -> jax.Array:
        return fm.moe_local(x, params, config, expert_axis="expert", implementation="xla", key=key)[
            0
        ]

    tokens = P(("data", "expert"))
    specs = (tokens, partition_specs(config, "expert"), P())
    apply = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=tokens))
    y = apply(x, params, key)
    assert_close(y, layer("dense", config, key=key)(x, params)[0], ROUNDING)


@pytest.mark.parametrize("implementation", ["xla", "dense"])
def test_composes_with_scan_remat_and_vmap(implementation: str, make_mesh: MeshMaker) -> None:
    x, _ = make_inputs(8, 3)
    stack = [make_inputs(1, seed=seed)[1] for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stack)
    apply = layer(implementation, mesh=make_mesh(expert=4))

    def scanned(x: jax.Array, stacked: fm.MoEParams) -> jax.Array:
        body = jax.checkpoint(lambda x, params: (x + apply(x, params)[0], None))
        return jnp.sum(jax.lax.scan(body, x, stacked)[0] ** 2)

    def unrolled(x: jax.Array, stacked: fm.MoEParams) -> jax.Array:
        for i in range(2):
            x = x + apply(x, jax.tree.map(lambda leaf, i=i: leaf[i], stacked))[0]
        return jnp.sum(x**2)

    got, want = (jax.jit(jax.grad(f, argnums=(0, 1)))(x, stacked) for f in (scanned, unrolled))
    assert_close(got, want, 2 * ROUNDING)

    batched = jax.jit(jax.vmap(apply, in_axes=(None, 0)))(x, stacked)[0]
    for i, params in enumerate(stack):
        assert_close(batched[i], apply(x, params)[0], ROUNDING)


@pytest.fixture
def no_warning_given_yet() -> None:
    api._warn_once.cache_clear()


@pytest.mark.smoke
@pytest.mark.usefixtures("no_warning_given_yet")
def test_auto_says_once_why_it_is_not_fused(
    make_mesh: MeshMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    platforms = []

    def unavailable_reason(platform: str) -> str:
        platforms.append(platform)
        return "the test says no"

    monkeypatch.setattr("flashmoe_jax._ffi.unavailable_reason", unavailable_reason)
    x, params = make_inputs(8, 3)
    mesh = make_mesh(expert=4)
    message = "implementation='xla' instead of 'fused': the test says no"
    with pytest.warns(UserWarning, match=message) as warned:
        y, _ = layer("auto", mesh=mesh)(x, params)
    assert [one.filename for one in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer("auto")(x, params)
        with jax.set_mesh(mesh):
            layer("auto")(x, params)
    assert platforms == ["cpu"] * 3
    np.testing.assert_array_equal(y, layer("xla", mesh=mesh)(x, params)[0])


@pytest.mark.usefixtures("no_warning_given_yet")
def test_auto_computes_float64_with_xla() -> None:
    x, params = make_inputs(8, 3)
    with jax.enable_x64(True):
        x, params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (x, params))
        with pytest.warns(UserWarning, match="it does not compute float64"):
            y, _ = layer("auto")(x, params)
    assert y.dtype == jnp.float64
