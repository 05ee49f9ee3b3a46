"""Orbax checkpoints of the layers, on the devices that wrote them and on others."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import MeshMaker
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType

import flashmoe_jax as fm
from flashmoe_jax.layers import linen

CONFIG = fm.MoEConfig(
    num_experts=8,
    experts_per_token=2,
    hidden_size=16,
    intermediate_size=24,
    use_bias=True,
    num_shared_experts=1,
    router=fm.RouterConfig(score="sigmoid", selection_bias=True, jitter=0.1),
)


def make_training(seed: int = 0, implementation: str = "xla") -> tuple[fm.MoE, nnx.Optimizer]:
    layer = fm.MoE(CONFIG, implementation=implementation, rngs=nnx.Rngs(seed))
    return layer, nnx.Optimizer(layer, optax.sgd(0.05, momentum=0.9), wrt=nnx.Param)


def tokens() -> jax.Array:
    return jax.random.normal(jax.random.key(7), (8, 4, 16))


@nnx.jit
def step(layer: fm.MoE, optimizer: nnx.Optimizer) -> None:
    """One training step, which changes everything in the state."""

    def loss(layer: fm.MoE) -> tuple[jax.Array, fm.MoEAux]:
        y, aux = layer(tokens())
        return jnp.mean((y - 1) ** 2), aux

    gradients, aux = nnx.grad(loss, has_aux=True)(layer)
    optimizer.update(layer, gradients)
    layer.update_selection_bias(aux, 0.05)


def save(path: Path, tree: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restore(path: Path, abstract: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, abstract)


def assert_same(got: Any, want: Any) -> None:
    """The same tree, bit for bit, wherever the arrays are."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def experts_per_device(array: jax.Array) -> int:
    return array.sharding.shard_shape(array.shape)[0]


def numbers(training: tuple[fm.MoE, nnx.Optimizer]) -> list[np.ndarray]:
    """All arrays of the state but those of random streams."""
    state = nnx.as_pure(nnx.state(training, nnx.Not(nnx.RngState)))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("num_pes", [8, 2])
def test_nnx_training_saved_with_8_pes(
    num_pes: int, kind: AxisType, tmp_path: Path, make_mesh: MeshMaker
) -> None:
    with jax.set_mesh(make_mesh(kind, expert=8)):
        saved = make_training()
        step(*saved)
        step(*saved)
        save(tmp_path / "state", nnx.state(saved))

    mesh = make_mesh(kind, expert=num_pes)
    graph, abstract = nnx.get_abstract_model(lambda: make_training(seed=1), mesh)
    restored = nnx.merge(graph, restore(tmp_path / "state", abstract))
    assert_same(nnx.as_pure(nnx.state(restored)), nnx.as_pure(nnx.state(saved)))
    layer, optimizer = restored
    for array in (layer.up, layer.down_bias, optimizer.opt_state[0].trace["down"]):
        assert experts_per_device(array) == 8 // num_pes
    assert layer.up.sharding.mesh == mesh

    # Both give the same outputs and go on alike: the random stream and the optimizer too. Other
    # devices sum in another order.
    before = numbers(saved)
    with jax.set_mesh(make_mesh(kind, expert=8)):
        want, want_aux = saved[0](tokens(), deterministic=True)
        step(*saved)
    with jax.set_mesh(mesh):
        got, got_aux = layer(tokens(), deterministic=True)
        step(*restored)
    np.testing.assert_array_equal(got_aux.tokens_per_expert, want_aux.tokens_per_expert)
    bound = {"rtol": 0, "atol": 0} if num_pes == 8 else {"rtol": 1e-4, "atol": 1e-6}
    np.testing.assert_allclose(got, want, **bound)
    for a, b, c in zip(numbers(restored), numbers(saved), before, strict=True):
        np.testing.assert_allclose(a, b, **bound)
        assert not np.array_equal(b, c)


def test_linen_variables_saved_with_8_pes(tmp_path: Path, make_mesh: MeshMaker) -> None:
    module = linen.MoE(CONFIG, implementation="xla", deterministic=True)
    with jax.set_mesh(make_mesh(expert=8)):
        saved = module.init(jax.random.key(0), tokens())
        want, aux = module.apply(saved, tokens())
        _, updated = module.apply(
            saved, aux, 0.05, method="update_selection_bias", mutable=["router_state"]
        )
        saved = {**saved, **updated}
        save(tmp_path / "variables", nn.unbox(saved))

    mesh = make_mesh(expert=2)
    abstract = jax.eval_shape(module.init, jax.random.key(1), tokens())
    shardings = nn.get_sharding(abstract, mesh)
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(abstract),
        shardings,
    )
    restored = restore(tmp_path / "variables", target)
    assert_same(restored, nn.unbox(saved))
    assert experts_per_device(restored["params"]["up"]) == 4
    assert np.any(np.asarray(restored["router_state"]["selection_bias"]))
    with jax.set_mesh(mesh):
        got, _ = module.apply(
            {**restored, "router_state": {"selection_bias": jnp.zeros(8)}}, tokens()
        )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.smoke
def test_linen_checkpoint_in_an_nnx_layer(tmp_path: Path, make_mesh: MeshMaker) -> None:
    module = linen.MoE(CONFIG, implementation="xla", deterministic=True)
    variables = nn.unbox(module.init(jax.random.key(0), tokens()))
    save(tmp_path / "params", variables["params"])

    with jax.set_mesh(make_mesh(expert=8)):
        layer, _ = make_training()
        abstract = nnx.as_pure(nnx.state(layer, nnx.Param))
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.to_pure_dict(abstract))
        nnx.update(layer, nnx.State(restore(tmp_path / "params", abstract)))
    assert experts_per_device(layer.up) == 1
    want = module.apply(variables, tokens())
    layer_elsewhere = layer(tokens(), deterministic=True)
    np.testing.assert_allclose(layer_elsewhere[0], want[0], rtol=1e-4, atol=1e-6)
