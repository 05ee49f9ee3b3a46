"""Layers of both Flax APIs, and what their tests share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType

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


def assert_same(got: Any, want: Any) -> None:
    """The same tree of arrays, bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def biased(layer: fm.MoE) -> fm.MoE:
    """The layer with biases that are not zero, as they are after some training."""
    for number, name in enumerate(sorted(nnx_arrays(layer))):
        if name.endswith("bias"):
            variable = getattr(layer, name)
            variable[...] = jax.random.normal(jax.random.key(number), variable.shape)
    return layer
