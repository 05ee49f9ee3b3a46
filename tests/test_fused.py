"""The custom call inside every kind of program that users write around it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import flashmoe_jax as fm

CONFIG = fm.MoEConfig(
    num_experts=16, experts_per_token=2, hidden_size=24, intermediate_size=40, use_bias=True
)
TOKENS = 64
# Both sides compute in float32 and differ by the order of their sums: a few hundred roundings of
# 6e-8, far below any mistake.
CLOSE = 1e-4

EXPERTS = PartitionSpec("expert")
PARAM_SPECS = fm.MoEParams(
    router=PartitionSpec(),
    selection_bias=None,
    gate=EXPERTS,
    up=EXPERTS,
    down=EXPERTS,
    gate_bias=EXPERTS,
    up_bias=EXPERTS,
    down_bias=EXPERTS,
    shared=None,
)


def mesh_of(num_pes: int) -> Mesh:
    return jax.make_mesh((num_pes,), ("expert",), (AxisType.Auto,), devices=jax.devices()[:num_pes])


def inputs(seed: int = 0, config: fm.MoEConfig = CONFIG) -> tuple[jax.Array, fm.MoEParams]:
    key_x, key_params, key_bias = jax.random.split(jax.random.key(seed), 3)
    params = fm.init_params(key_params, config)
    if config.use_bias:
        bias = functools.partial(jax.random.normal, key_bias)
        params = dataclasses.replace(
            params,
            gate_bias=bias(params.gate_bias.shape),
            up_bias=bias(params.up_bias.shape),
            down_bias=bias(params.down_bias.shape),
        )
    return jax.random.normal(key_x, (TOKENS, config.hidden_size)), params


def assert_close(got: Any, want: Any, bound: float = CLOSE) -> None:
    """Every leaf differs by at most `bound` of the rms of what is wanted."""
    got_leaves, got_tree = jax.tree.flatten(got)
    want_leaves, want_tree = jax.tree.flatten(want)
    assert got_tree == want_tree
    for a, b in zip(got_leaves, want_leaves, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        rms = np.sqrt(np.mean(b**2))
        assert rms > 0
        assert np.max(np.abs(a - b)) <= bound * rms


Layer = Callable[[jax.Array, fm.MoEParams], jax.Array]


def layer(implementation: str, mesh: Mesh | None, config: fm.MoEConfig = CONFIG) -> Layer:
    def apply(x: jax.Array, params: fm.MoEParams) -> jax.Array:
        return fm.moe(x, params, config, mesh=mesh, implementation=implementation)[0]

    return apply


def dense_gradients(build: Callable[[Layer], Callable[..., jax.Array]], *args: Any) -> Any:
    return jax.jit(jax.value_and_grad(build(layer("dense", None)), argnums=(0, 1)))(*args)


def fused_gradients(build: Callable[[Layer], Callable[..., jax.Array]], *args: Any) -> Any:
    return jax.jit(jax.value_and_grad(build(layer("fused", mesh_of(8))), argnums=(0, 1)))(*args)


def single(apply: Layer) -> Callable[..., jax.Array]:
    return lambda x, params: jnp.mean(apply(x, params) ** 2)


def rematerialised(apply: Layer) -> Callable[..., jax.Array]:
    return lambda x, params: jnp.mean(jax.checkpoint(apply)(x, params) ** 2)


def looped(apply: Layer) -> Callable[..., jax.Array]:
    def loss(x: jax.Array, params: fm.MoEParams) -> jax.Array:
        body = lambda i, x: x + 0.1 * apply(x, params)  # noqa: E731
        return jnp.mean(jax.lax.fori_loop(0, 3, body, x) ** 2)

    return loss


def conditional(apply: Layer) -> Callable[..., jax.Array]:
    def loss(x: jax.Array, params: fm.MoEParams) -> jax.Array:
        y = jax.lax.cond(x[0, 0] > -1e9, lambda x: apply(x, params), lambda x: x, x)
        z = jax.lax.cond(x[0, 0] > 1e9, lambda x: apply(x, params), lambda x: x, y)
        return jnp.mean(z**2)

    return loss


def repeated(apply: Layer) -> Callable[..., jax.Array]:
    """One traced function called twice, and the same arguments in both calls."""
    jitted = jax.jit(apply)
    return lambda x, params: jnp.mean(jitted(x, params) * jitted(x, params))


@pytest.mark.smoke
@pytest.mark.parametrize("build", [single, rematerialised, looped, conditional, repeated])
def test_gradients_through_program(build: Callable[[Layer], Callable[..., jax.Array]]) -> None:
    x, params = inputs()
    assert_close(fused_gradients(build, x, params), dense_gradients(build, x, params))


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_layers(remat: bool) -> None:
    x, _ = inputs()
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[inputs(i)[1] for i in range(3)])

    def build(apply: Layer) -> Callable[..., jax.Array]:
        step = jax.checkpoint(apply) if remat else apply

        def loss(x: jax.Array, stack: fm.MoEParams) -> jax.Array:
            body = lambda x, params: (x + 0.1 * step(x, params), None)  # noqa: E731
            return jnp.mean(jax.lax.scan(body, x, stack)[0] ** 2)

        return loss

    assert_close(fused_gradients(build, x, stack), dense_gradients(build, x, stack))


def test_what_is_saved_changes_no_gradient() -> None:
    x, params = inputs()
    results = []
    for rows in (True, False):
        for preactivations in (True, False):
            config = dataclasses.replace(CONFIG, save_rows=rows, save_preactivations=preactivations)
            loss = single(layer("fused", mesh_of(4), config))
            results.append(jax.jit(jax.grad(loss, argnums=(0, 1)))(x, params))
    for other in results[1:]:
        assert_close(other, results[0])


def test_residuals_are_kept_only_if_asked_for() -> None:
    """Under grad the forward call returns rows and pre-activations, unless told otherwise."""
    x, params = inputs()

    def program(**options: bool) -> str:
        config = dataclasses.replace(CONFIG, **options)
        return str(jax.make_jaxpr(jax.grad(single(layer("fused", None, config))))(x, params))

    # R of 128 slots: at worst each of 16 experts has a block of 64 rows to itself, of which one row
    # is used, and one expert all the others.
    rows = 64 * (16 + 1)
    kept = program()
    assert f"u32[{rows},24]" in kept
    assert f"u32[{rows},40]" in kept
    assert f"u32[{rows}," not in program(save_rows=False, save_preactivations=False)


def test_training_step_with_donated_state() -> None:
    x, params = inputs()
    mesh = mesh_of(8)
    placed = jax.tree.map(
        lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)),
        jax.tree.map(jnp.copy, params),
        PARAM_SPECS,
    )

    def step(params: fm.MoEParams, x: jax.Array, apply: Layer) -> tuple[fm.MoEParams, jax.Array]:
        loss, gradients = jax.value_and_grad(lambda p: single(apply)(x, p))(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), loss

    fused = jax.jit(functools.partial(step, apply=layer("fused", mesh)), donate_argnums=0)
    dense = jax.jit(functools.partial(step, apply=layer("dense", None)))
    for _ in range(5):
        old = placed
        placed, fused_loss = fused(placed, x)
        params, dense_loss = dense(params, x)
        np.testing.assert_allclose(fused_loss, dense_loss, rtol=CLOSE)
    assert old.up.is_deleted()
    assert placed.up.sharding.spec == EXPERTS
    assert_close(placed, params)


def test_ahead_of_time_compilation() -> None:
    x, params = inputs()
    apply = layer("fused", mesh_of(8))
    compiled = jax.jit(apply).lower(x, params).compile()
    assert_close(compiled(x, params), layer("dense", None)(x, params))


def test_debug_nans_does_not_see_unwritten_residuals() -> None:
    x, params = inputs()
    # What XLA hands out next has been used before, and is full of NaNs.
    poison = [jnp.full((2**20,), jnp.nan) for _ in range(8)]
    del poison
    with jax.debug_nans(True):
        gradient = jax.grad(lambda x: single(layer("fused", None))(x, params))(x)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((1,), ("expert",)),
        ((8,), ("expert",)),
        ((2, 4), ("data", "expert")),
        ((2, 2, 2), ("data", "expert", "model")),
    ],
)
def test_meshes(shape: tuple[int, ...], names: tuple[str, ...], kind: AxisType) -> None:
    x, params = inputs()
    mesh = jax.make_mesh(
        shape, names, (kind,) * len(shape), devices=jax.devices()[: int(np.prod(shape))]
    )
    want = dense_gradients(single, x, params)
    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(single(layer("fused", None)), argnums=(0, 1)))(x, params)
    assert_close(got, want)


CALLS = 40
REPETITIONS = 20


def test_independent_calls_mixed_with_collectives() -> None:
    """XLA starts what is ready in any order, on every device in another one."""
    mesh = mesh_of(8)
    xs, params = zip(*[inputs(i) for i in range(CALLS)], strict=True)

    def program(xs: list[jax.Array], params: list[fm.MoEParams]) -> Any:
        ys, sums = [], []
        for x, p in zip(xs, params, strict=True):
            y, _ = fm.moe_local(x, p, CONFIG, expert_axis="expert", implementation="fused")
            ys.append(y)
            sums.append((jax.lax.psum(x, "expert"), jax.lax.psum(y, "expert")))
        return ys, sums

    tokens = [EXPERTS] * CALLS
    run = jax.jit(
        jax.shard_map(
            program,
            mesh=mesh,
            in_specs=(tokens, [PARAM_SPECS] * CALLS),
            out_specs=(tokens, [(PartitionSpec(), PartitionSpec())] * CALLS),
        )
    )
    dense = jax.jit(layer("dense", None))
    want = [dense(x, p) for x, p in zip(xs, params, strict=True)]

    def over_pes(array: jax.Array) -> jax.Array:
        return array.reshape(8, -1, array.shape[-1]).sum(0)

    first = None
    for _ in range(REPETITIONS):
        ys, sums = run(list(xs), list(params))
        assert_close(ys, want)
        assert_close(sums, [(over_pes(x), over_pes(y)) for x, y in zip(xs, want, strict=True)])
        bits = [np.asarray(y).tobytes() for y in ys]
        first = first or bits
        assert bits == first


def test_runs_that_overlap() -> None:
    """Executions of one program that are in flight together do not mix."""
    x, params = inputs()
    apply = jax.jit(layer("fused", mesh_of(8)))
    batches = [x * (i + 1) for i in range(16)]
    got = [apply(batch, params) for batch in batches]  # nobody waits in between
    dense = layer("dense", None)
    assert_close(got, [dense(batch, params) for batch in batches])
