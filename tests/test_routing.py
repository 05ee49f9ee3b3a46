"""The router against a NumPy loop in float64."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashmoe_jax as fm
from flashmoe_jax.routing import route_from

E, K, H, T = 8, 3, 6, 40
# float32 scores of logits of size 1: a few roundings of 6e-8.
FLOAT32 = 1e-6


def make_config(experts_per_token: int = K, **router: Any) -> fm.MoEConfig:
    return fm.MoEConfig(
        num_experts=E,
        experts_per_token=experts_per_token,
        hidden_size=H,
        intermediate_size=4,
        router=fm.RouterConfig(**router),
    )


def make_inputs(config: fm.MoEConfig, seed: int = 0) -> tuple[jax.Array, fm.MoEParams]:
    keys = jax.random.split(jax.random.key(seed), 3)
    params = fm.init_params(keys[0], config)
    if params.selection_bias is not None:
        bias = 0.3 * jax.random.normal(keys[1], (E,))
        params = dataclasses.replace(params, selection_bias=bias)
    return jax.random.normal(keys[2], (T, H)), params


def loop(x: Any, params: fm.MoEParams, config: fm.MoEConfig) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights [T, K], one token at a time."""
    router = config.router
    logits = np.asarray(x, np.float64) @ np.asarray(params.router, np.float64)
    all_indices, all_weights = [], []
    for token in logits:
        if router.score == "softmax":
            scores = np.exp(token - token.max())
            scores /= scores.sum()
        else:
            scores = 1 / (1 + np.exp(-token))
        choice = scores.copy()
        if params.selection_bias is not None:
            choice += np.asarray(params.selection_bias, np.float64)
        size = E // router.num_groups
        groups = [range(g * size, (g + 1) * size) for g in range(router.num_groups)]
        groups.sort(key=lambda group: -sum(sorted(choice[group])[-2:]))
        allowed = sorted(e for group in groups[: router.groups_per_token] for e in group)
        indices = sorted(allowed, key=lambda e: -choice[e])[: config.experts_per_token]
        weights = scores[indices]
        if router.renormalize:
            weights = weights / weights.sum()
        all_indices.append(indices)
        all_weights.append(weights * router.scaling_factor)
    return np.array(all_indices), np.array(all_weights)


ROUTERS = [
    {},
    {"renormalize": False, "scaling_factor": 2.5},
    {"score": "sigmoid"},
    {"score": "sigmoid", "renormalize": False},
    {"selection_bias": True},
    {"num_groups": 4, "groups_per_token": 2},
    {"num_groups": 8, "groups_per_token": 4},
    {
        "score": "sigmoid",
        "selection_bias": True,
        "num_groups": 2,
        "groups_per_token": 1,
        "scaling_factor": 2.5,
    },
]


@pytest.mark.smoke
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_route_equals_loop(router: dict[str, Any]) -> None:
    config = make_config(**router)
    x, params = make_inputs(config)
    routing = fm.route(x, params, config)
    indices, weights = loop(x, params, config)
    assert routing.indices.dtype == jnp.int32
    assert routing.weights.dtype == routing.logits.dtype == jnp.float32
    np.testing.assert_array_equal(routing.indices, indices)
    np.testing.assert_allclose(routing.weights, weights, rtol=10 * FLOAT32)
    np.testing.assert_allclose(
        routing.logits, np.asarray(x, np.float64) @ params.router, atol=10 * FLOAT32
    )


def test_selection_bias_chooses_and_does_not_weigh() -> None:
    config = make_config(experts_per_token=1, selection_bias=True, renormalize=False)
    x, params = make_inputs(config)
    bias = jnp.zeros(E).at[5].set(10.0)
    routing = fm.route(x, dataclasses.replace(params, selection_bias=bias), config)
    assert jnp.all(routing.indices == 5)
    scores = jax.nn.softmax(routing.logits)[:, 5:6]
    np.testing.assert_allclose(routing.weights, scores, rtol=FLOAT32)


def test_ties_go_to_the_lowest_index() -> None:
    config = make_config(num_groups=4, groups_per_token=2)
    x, params = make_inputs(config)
    routing = fm.route(x, dataclasses.replace(params, router=jnp.zeros((H, E))), config)
    np.testing.assert_array_equal(routing.indices, np.tile([0, 1, 2], (T, 1)))
    np.testing.assert_allclose(routing.weights, 1 / K, rtol=FLOAT32)


def test_leading_dimensions_are_kept() -> None:
    config = make_config()
    x, params = make_inputs(config)
    flat = fm.route(x, params, config)
    folded = fm.route(x.reshape(4, 5, 2, H), params, config)
    for name in ("indices", "weights", "logits"):
        array = getattr(folded, name)
        assert array.shape[:-1] == (4, 5, 2)
        np.testing.assert_array_equal(array.reshape(T, -1), getattr(flat, name))


def test_bfloat16_tokens_are_scored_in_float32() -> None:
    config = make_config()
    x, params = make_inputs(config)
    x = x.astype(jnp.bfloat16)
    got, want = fm.route(x, params, config), fm.route(x.astype(jnp.float32), params, config)
    np.testing.assert_array_equal(got.logits, want.logits)
    np.testing.assert_array_equal(got.weights, want.weights)


def test_masked_tokens_go_nowhere_and_count_nowhere() -> None:
    config = make_config()
    x, params = make_inputs(config)
    mask = jnp.arange(T) % 3 != 0
    masked = fm.route(jnp.where(mask[:, None], x, jnp.nan), params, config, mask=mask)
    alone = fm.route(x[mask], params, config)
    assert jnp.all(masked.indices[~mask] == -1)
    assert jnp.all(masked.weights[~mask] == 0)
    np.testing.assert_array_equal(masked.indices[mask], alone.indices)
    for loss in (fm.load_balance_loss(masked, config), fm.load_balance_loss(alone, config)):
        assert jnp.isfinite(loss)
    np.testing.assert_allclose(
        fm.load_balance_loss(masked, config), fm.load_balance_loss(alone, config), rtol=FLOAT32
    )
    np.testing.assert_allclose(fm.z_loss(masked, config), fm.z_loss(alone, config), rtol=FLOAT32)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_masked_tokens_have_no_part_in_gradients(score: str, value: float) -> None:
    config = make_config(score=score, jitter=0.1)
    x, params = make_inputs(config)
    mask = jnp.arange(T) % 3 != 0

    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(x: jax.Array, router: jax.Array) -> jax.Array:
        with_router = dataclasses.replace(params, router=router)
        routing = fm.route(x, with_router, config, key=jax.random.key(7), mask=mask)
        weighed = routing.weights @ jnp.arange(1.0, K + 1)
        return weighed.sum() + fm.load_balance_loss(routing, config) + fm.z_loss(routing, config)

    got = gradients(jnp.where(mask[:, None], x, value), params.router)
    assert jnp.all(got[0][~mask] == 0)
    for a, b in zip(got, gradients(x, params.router), strict=True):
        assert jnp.any(b)
        np.testing.assert_array_equal(a, b)


def test_jitter_depends_on_key_and_place_alone() -> None:
    config = make_config(jitter=0.2)
    x, params = make_inputs(config)
    key = jax.random.key(7)
    quiet = fm.route(x, params, config)
    noisy = fm.route(x, params, config, key=key)
    again = fm.route(x, params, config, key=key)
    np.testing.assert_array_equal(noisy.logits, again.logits)
    assert not jnp.allclose(noisy.logits, quiet.logits)
    other = fm.route(x, params, config, key=jax.random.key(8))
    assert not jnp.allclose(noisy.logits, other.logits)
    second_half = route_from(x[T // 2 :], params, config, key=key, mask=None, first_token=T // 2)
    np.testing.assert_allclose(second_half.logits, noisy.logits[T // 2 :], atol=10 * FLOAT32)
    no_jitter = fm.route(x, params, make_config(), key=key)
    np.testing.assert_array_equal(no_jitter.logits, quiet.logits)


def test_jitter_range() -> None:
    config = make_config(jitter=0.25)
    # A router of ones and a token with one non-zero entry: each logit is that entry's noise.
    _, params = make_inputs(config)
    params = dataclasses.replace(params, router=jnp.ones((H, E)))
    x = jnp.zeros((4000, H)).at[:, 0].set(1.0)
    noise = fm.route(x, params, config, key=jax.random.key(0)).logits[:, 0]
    # Within 4000 draws the extremes come closer than 1% of the width, but for chance e^-40.
    assert 0.75 <= noise.min() < 0.755
    assert 1.245 < noise.max() <= 1.25
    # Five standard errors of the mean of a uniform distribution of width 0.5.
    assert noise.mean() == pytest.approx(1.0, abs=5 * 0.5 / 12**0.5 / 4000**0.5)


@pytest.mark.parametrize("router", [{}, {"score": "sigmoid", "scaling_factor": 2.0}], ids=str)
def test_weights_are_differentiable(router: dict[str, Any]) -> None:
    config = make_config(**router)
    x, params = make_inputs(config)
    direction = np.asarray(jax.random.normal(jax.random.key(5), (H, E)), np.float64)
    readout = np.asarray(jax.random.normal(jax.random.key(6), (T, K)), np.float64)

    def value(router: jax.Array) -> jax.Array:
        routing = fm.route(x, dataclasses.replace(params, router=router), config)
        return jnp.sum(routing.weights * readout.astype(np.float32))

    def loop_value(step: float) -> float:
        router = np.asarray(params.router, np.float64) + step * direction
        return float(
            np.sum(loop(x, dataclasses.replace(params, router=router), config)[1] * readout)
        )

    step = 1e-6
    slope = (loop_value(step) - loop_value(-step)) / (2 * step)
    gradient = jax.grad(value)(params.router)
    # The quotient is exact to about 1e-8, the float32 gradient to a few roundings of each term.
    np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-4)


def test_load_balance_loss_by_hand() -> None:
    config = make_config(experts_per_token=1)
    logits = jnp.log(jnp.array([[0.5] + [0.5 / 7] * 7, [0.3] + [0.1] * 7]))
    routing = fm.Routing(jnp.array([[0], [3]]), jnp.ones((2, 1)), logits)
    # f = 1/2 for experts 0 and 3; p = 0.4 and (0.5/7 + 0.1)/2.
    expected = 8 * (0.5 * 0.4 + 0.5 * (0.5 / 7 + 0.1) / 2)
    np.testing.assert_allclose(fm.load_balance_loss(routing, config), expected, rtol=FLOAT32)


def test_load_balance_loss_of_sigmoid_scores_normalises_them_per_token() -> None:
    config = make_config(experts_per_token=1, score="sigmoid")
    logits = jax.random.normal(jax.random.key(0), (T, E))
    indices = jnp.zeros((T, 1), jnp.int32)
    scores = jax.nn.sigmoid(logits)
    share = jnp.mean(scores[:, 0] / scores.sum(-1))
    loss = fm.load_balance_loss(fm.Routing(indices, jnp.ones((T, 1)), logits), config)
    np.testing.assert_allclose(loss, E * share, rtol=10 * FLOAT32)


def test_load_balance_loss_is_one_at_balance_and_its_gradient_reaches_the_logits() -> None:
    config = make_config(experts_per_token=1)
    indices = jnp.arange(T, dtype=jnp.int32)[:, None] % E

    def loss(logits: jax.Array, indices: jax.Array = indices) -> jax.Array:
        return fm.load_balance_loss(fm.Routing(indices, jnp.ones((T, 1)), logits), config)

    logits = jax.random.normal(jax.random.key(0), (T, E))
    np.testing.assert_allclose(loss(logits), 1.0, rtol=10 * FLOAT32)
    # All rows at expert 0: less of its score is better.
    gradient = jax.grad(loss)(logits, jnp.zeros_like(indices))
    assert jnp.all(gradient[:, 0] > 0)
    assert jnp.all(gradient[:, 1:] < 0)


def test_z_loss_by_hand() -> None:
    config = make_config(experts_per_token=1)
    logits = jnp.array([[2.0] * E, [-1.0] * E])
    routing = fm.Routing(jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1)), logits)
    expected = ((2 + np.log(8)) ** 2 + (-1 + np.log(8)) ** 2) / 2
    np.testing.assert_allclose(fm.z_loss(routing, config), expected, rtol=FLOAT32)


def test_losses_without_logits_or_tokens_are_zero() -> None:
    config = make_config()
    routing = fm.Routing(jnp.zeros((T, K), jnp.int32), jnp.ones((T, K)))
    assert fm.load_balance_loss(routing, config) == fm.z_loss(routing, config) == 0
    masked = fm.Routing(jnp.full((T, K), -1), jnp.ones((T, K)), jnp.ones((T, E)))
    assert fm.load_balance_loss(masked, config) == fm.z_loss(masked, config) == 0


def test_bias_update_moves_towards_the_mean() -> None:
    bias = jnp.array([0.5, -0.5, 0.0, 0.25])
    updated = fm.update_selection_bias(bias, jnp.array([4, 0, 2, 2], jnp.int32), 0.125)
    np.testing.assert_array_equal(updated, [0.375, -0.375, 0.0, 0.25])


def test_bias_update_balances_a_skewed_router() -> None:
    config = make_config(experts_per_token=2, selection_bias=True)
    x = jax.random.normal(jax.random.key(0), (512, H))
    params = fm.init_params(jax.random.key(1), config)

    @jax.jit
    def step(bias: jax.Array) -> tuple[jax.Array, jax.Array]:
        routing = fm.route(x, dataclasses.replace(params, selection_bias=bias), config)
        counts = jnp.bincount(routing.indices.reshape(-1), length=E)
        return fm.update_selection_bias(bias, counts, 0.005), counts

    bias, first = step(params.selection_bias)
    for _ in range(200):
        bias, counts = step(bias)
    assert first.max() > 1.3 * first.mean()
    assert counts.max() < 1.1 * counts.mean()
