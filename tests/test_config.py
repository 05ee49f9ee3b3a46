import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

import flashmoe_jax as fm
from flashmoe_jax._compat import check_jax_version
from flashmoe_jax.local_call import local_call
from flashmoe_jax.params import abstract_params, partition_specs

pytestmark = pytest.mark.smoke

SIZES: dict[str, Any] = {
    "num_experts": 8,
    "experts_per_token": 2,
    "hidden_size": 12,
    "intermediate_size": 20,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts=0 must be an int >= 1"),
        ({"num_experts": 8.0}, "num_experts=8.0 must be an int"),
        ({"experts_per_token": True}, "experts_per_token=True must be an int"),
        ({"hidden_size": -1}, "hidden_size=-1"),
        ({"intermediate_size": 0}, "intermediate_size=0"),
        ({"experts_per_token": 9}, "experts_per_token=9 is more than num_experts=8"),
        ({"activation": "tanh"}, "activation='tanh' must be one of 'silu', 'gelu'"),
        ({"num_shared_experts": -1}, "num_shared_experts=-1"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 must be a finite number > 0"),
        ({"capacity_factor": float("inf")}, "capacity_factor=inf"),
        ({"max_received_rows": 0}, "max_received_rows=0"),
        ({"deadline_seconds": float("nan")}, "deadline_seconds=nan"),
        ({"router": fm.RouterConfig(num_groups=3)}, "does not divide into num_groups=3"),
        (
            {"router": fm.RouterConfig(num_groups=8)},
            "experts_per_token=2 is more than the 1 experts of groups_per_token=1",
        ),
    ],
)
def test_layer_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fm.MoEConfig(**{**SIZES, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "tanh"}, "score='tanh' must be one of 'softmax', 'sigmoid'"),
        ({"scaling_factor": 0.0}, "scaling_factor=0.0"),
        ({"num_groups": 0}, "num_groups=0"),
        ({"groups_per_token": 2}, "groups_per_token=2 is more than num_groups=1"),
        ({"jitter": 1.0}, r"jitter=1.0 must be in \[0, 1\)"),
        ({"jitter": -0.1}, "jitter=-0.1"),
    ],
)
def test_router_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fm.RouterConfig(**changes)


def test_configs_are_frozen_and_hash_by_value() -> None:
    config = fm.MoEConfig(**SIZES)
    assert hash(config) == hash(fm.MoEConfig(**SIZES))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_experts = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("factor", "tokens", "capacity"),
    [(None, 64, None), (1.0, 64, 16), (1.25, 64, 20), (1.01, 64, 17), (0.001, 64, 1), (1.0, 0, 1)],
)
def test_capacity(factor: float | None, tokens: int, capacity: int | None) -> None:
    assert fm.MoEConfig(**SIZES, capacity_factor=factor).capacity(tokens) == capacity


@pytest.mark.parametrize(
    ("num_pes", "caller_routing", "bound", "rows"),
    [
        (1, False, None, 32),
        (8, False, None, 128),  # One expert on a PE: a token comes at most once.
        (8, True, None, 256),  # A caller's token may name it twice.
        (8, False, 100, 100),
        (8, False, 1000, 128),
    ],
)
def test_rows_that_a_pe_accepts(
    num_pes: int, caller_routing: bool, bound: int | None, rows: int
) -> None:
    call = local_call(
        fm.MoEConfig(**SIZES, max_received_rows=bound),
        axis="expert",
        num_pes=num_pes,
        tokens_per_pe=16,
        group_tokens=16 * num_pes,
        caller_routing=caller_routing,
    )
    assert call.max_rows == rows
    assert call.local_experts == 8 // num_pes
    assert call.may_drop == (bound is not None)


def test_params_have_only_what_the_config_asks_for() -> None:
    plain = abstract_params(fm.MoEConfig(**SIZES, gated=False))
    assert [plain.gate, plain.gate_bias, plain.up_bias, plain.down_bias] == [None] * 4
    assert plain.selection_bias is None
    assert plain.shared is None

    config = fm.MoEConfig(
        **SIZES,
        use_bias=True,
        num_shared_experts=3,
        router=fm.RouterConfig(selection_bias=True),
    )
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_params(config))
    assert shapes == fm.MoEParams(
        router=(12, 8),
        selection_bias=(8,),
        gate=(8, 12, 20),
        up=(8, 12, 20),
        down=(8, 20, 12),
        gate_bias=(8, 20),
        up_bias=(8, 20),
        down_bias=(8, 12),
        shared=fm.SharedParams(gate=(12, 60), up=(12, 60), down=(60, 12)),
    )
    assert abstract_params(config, num_experts=2).up.shape == (2, 12, 20)


def test_initial_values() -> None:
    config = fm.MoEConfig(
        num_experts=16,
        experts_per_token=2,
        hidden_size=64,
        intermediate_size=144,
        use_bias=True,
        num_shared_experts=2,
    )
    params = fm.init_params(jax.random.key(0), config, jnp.bfloat16)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract_params(config, jnp.bfloat16)
    )
    assert params.router.dtype == jnp.float32
    # Three standard errors of the standard deviation of the fewest values, 64 * 16.
    near = 3 / (2 * 64 * 16) ** 0.5
    for weight, fan_in in (
        (params.router, 64),
        (params.gate, 64),
        (params.up, 64),
        (params.down, 144),
        (params.shared.up, 64),
        (params.shared.down, 288),
    ):
        assert jnp.std(weight.astype(jnp.float32)) * fan_in**0.5 == pytest.approx(1.0, abs=near)
    assert not jnp.any(params.up_bias)
    assert not jnp.array_equal(params.gate, params.up)


def test_partition_specs_shard_the_experts_alone() -> None:
    config = fm.MoEConfig(**SIZES, use_bias=True, num_shared_experts=1)
    specs = partition_specs(config, "expert")
    assert jax.tree.structure(specs) == jax.tree.structure(abstract_params(config))
    of_experts = (specs.gate, specs.up, specs.down, specs.gate_bias, specs.up_bias, specs.down_bias)
    assert set(of_experts) == {PartitionSpec("expert")}
    assert set(jax.tree.leaves((specs.router, specs.shared))) == {PartitionSpec()}
    assert set(jax.tree.leaves(partition_specs(config, None))) == {PartitionSpec()}


def test_old_jax_is_refused() -> None:
    with pytest.raises(ImportError, match=r"needs jax >= 0.10.1, but jax 0.9.2 is installed"):
        check_jax_version("0.9.2")


def test_new_jax_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"tested with jax 0.10.1 to 0.12, but jax 0.13.0"):
        check_jax_version("0.13.0")


@pytest.mark.parametrize("version", ["0.10.1", "0.12.9", "0.12.0.1", "0.11.0.dev20260101"])
def test_supported_jax_is_silent(version: str, recwarn: pytest.WarningsRecorder) -> None:
    check_jax_version(version)
    assert not recwarn.list


def test_public_names() -> None:
    for name in fm.__all__:
        assert hasattr(fm, name), name
    with pytest.raises(AttributeError, match="no attribute 'Moe'"):
        _ = fm.Moe
