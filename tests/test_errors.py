"""Bad input: each is refused before anything runs, and the message says what to do."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MeshMaker
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import flashmoe_jax as fm
from flashmoe_jax.params import partition_specs

E, K, H, D = 8, 2, 12, 20
pytestmark = pytest.mark.smoke

CONFIG = fm.MoEConfig(num_experts=E, experts_per_token=K, hidden_size=H, intermediate_size=D)
X = np.ones((16, H), np.float32)
PARAMS = fm.MoEParams(
    router=np.ones((H, E), np.float32),
    selection_bias=None,
    gate=np.ones((E, H, D), np.float32),
    up=np.ones((E, H, D), np.float32),
    down=np.ones((E, D, H), np.float32),
)
INDICES = np.zeros((16, K), np.int32)
WEIGHTS = np.ones((16, K), np.float32)


def call(x: Any = X, params: Any = PARAMS, config: fm.MoEConfig = CONFIG, **kwargs: Any) -> Any:
    return fm.moe(x, params, config, **{"implementation": "xla", **kwargs})


def changed(**fields: Any) -> fm.MoEParams:
    return dataclasses.replace(PARAMS, **fields)


def routing(
    indices: np.ndarray = INDICES, weights: np.ndarray = WEIGHTS, logits: Any = None
) -> dict[str, fm.Routing]:
    return {"routing": fm.Routing(indices, weights, logits)}


def at(array: np.ndarray, place: tuple[int, ...], value: float) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


def with_config(**fields: Any) -> dict[str, fm.MoEConfig]:
    return {"config": dataclasses.replace(CONFIG, **fields)}


ARRAYS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x is no array": ({"x": [[1.0] * H]}, TypeError, "x is a list; pass an array"),
    "x of integers": (
        {"x": X.astype(np.int32)},
        TypeError,
        "x has dtype int32; cast it to one of float32, bfloat16, float16, float64",
    ),
    "x of rank 1": ({"x": X[0]}, ValueError, r"x has shape \(12,\).* pass x\[None\]"),
    "x of another width": (
        {"x": X[:, :8]},
        ValueError,
        r"x has shape \(16, 8\), so its tokens are 8 wide; config.hidden_size=12",
    ),
    "x of another dtype than the experts": (
        {"x": X.astype(jnp.bfloat16)},
        TypeError,
        r"params\.\w+ has dtype float32 and x has bfloat16; cast one of them",
    ),
    "one bias of another dtype": (
        {
            "params": changed(
                gate_bias=np.ones((E, D), np.float32),
                up_bias=np.ones((E, D), np.float16),
                down_bias=np.ones((E, H), np.float32),
            ),
            **with_config(use_bias=True),
        },
        TypeError,
        r"params\.up_bias has dtype float16 and x has float32",
    ),
    "params of another type": ({"params": {}}, TypeError, "params is a dict; pass .*MoEParams"),
    "an expert too many": (
        {"params": changed(up=np.ones((E + 1, H, D), np.float32))},
        ValueError,
        r"params.up has shape \(9, 12, 20\); it must be \(8, 12, 20\) \(the config\)",
    ),
    "a transposed weight": (
        {"params": changed(down=np.ones((E, H, D), np.float32))},
        ValueError,
        r"params.down has shape \(8, 12, 20\); it must be \(8, 20, 12\)",
    ),
    "a router of another width": (
        {"params": changed(router=np.ones((H, E - 1), np.float32))},
        ValueError,
        r"params.router has shape \(12, 7\); it must be \(12, 8\)",
    ),
    "a router of integers": (
        {"params": changed(router=np.ones((H, E), np.int32))},
        TypeError,
        "params.router has dtype int32; it must be floating",
    ),
    "no gate": (
        {"params": changed(gate=None)},
        ValueError,
        r"params.gate is None, but the config asks for shape \(8, 12, 20\)",
    ),
    "a gate that nobody reads": (
        with_config(gated=False),
        ValueError,
        r"params.gate has shape \(8, 12, 20\), but the config has no such parameter; pass None",
    ),
    "no shared experts": (
        with_config(num_shared_experts=2),
        ValueError,
        r"params.shared.\w+ is None, but the config asks for shape",
    ),
    "no selection bias": (
        with_config(router=fm.RouterConfig(selection_bias=True)),
        ValueError,
        r"params.selection_bias is None, but the config asks for shape \(8,\)",
    ),
    "a mask of integers": (
        {"mask": np.ones(16, np.int32)},
        TypeError,
        "mask has dtype int32; pass booleans",
    ),
    "a mask of another shape": (
        {"mask": np.ones((16, 1), bool)},
        ValueError,
        r"mask has shape \(16, 1\); it must be \(16,\) \(the leading dimensions of x\)",
    ),
    "routing as a tuple": (
        {"routing": (INDICES, WEIGHTS)},
        TypeError,
        "routing is a tuple; pass flashmoe_jax.Routing",
    ),
    "a routing of another K": (
        routing(INDICES[:, :1], WEIGHTS[:, :1]),
        ValueError,
        r"routing.indices has shape \(16, 1\); it must be \(16, 2\)",
    ),
    "a flat routing of folded tokens": (
        {"x": X.reshape(4, 4, H), **routing()},
        ValueError,
        r"routing.indices has shape \(16, 2\); it must be \(4, 4, 2\)",
    ),
    "weights of another shape": (
        routing(weights=WEIGHTS[:8]),
        ValueError,
        r"routing.weights has shape \(8, 2\); it must be \(16, 2\)",
    ),
    "floating indices": (
        routing(INDICES.astype(np.float32)),
        TypeError,
        "routing.indices has dtype float32; pass int32",
    ),
    "integer weights": (
        routing(weights=INDICES),
        TypeError,
        "routing.weights has dtype int32; pass float32",
    ),
    "logits of another shape": (
        routing(logits=WEIGHTS),
        ValueError,
        r"routing.logits has shape \(16, 2\); it must be \(16, 8\)",
    ),
    "integer logits": (
        routing(logits=np.zeros((16, E), np.int32)),
        TypeError,
        "routing.logits has dtype int32; pass float32",
    ),
    "an index beyond the experts": (
        routing(at(INDICES, (3, 1), E)),
        ValueError,
        r"routing.indices\[3, 1\] is 8; it must be an expert from 0 to 7, or -1",
    ),
    "an index below -1": (
        routing(at(INDICES, (15, 0), -2)),
        ValueError,
        r"routing.indices\[15, 0\] is -2",
    ),
    "a weight that is NaN": (
        routing(weights=at(WEIGHTS, (2, 0), np.nan)),
        ValueError,
        r"routing.weights\[2, 0\] is nan; it must be finite unless .* masks the slot",
    ),
    "a weight that is infinite": (
        routing(weights=at(WEIGHTS, (2, 1), np.inf)),
        ValueError,
        r"routing.weights\[2, 1\] is inf",
    ),
    "an unknown implementation": (
        {"implementation": "cuda"},
        ValueError,
        "implementation='cuda' must be one of .*'auto', 'fused', 'xla', 'dense'",
    ),
    "no room for a row of each expert": (
        with_config(max_received_rows=7),
        ValueError,
        "max_received_rows=7 is less than the 8 experts of a PE",
    ),
}


@pytest.mark.parametrize(("kwargs", "error", "message"), ARRAYS.values(), ids=ARRAYS)
def test_arrays(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**kwargs)


def test_what_is_refused_is_so_for_its_fault_alone() -> None:
    y, _ = call(**routing(at(INDICES, (3, 1), -1), at(WEIGHTS, (3, 1), np.nan)))
    assert np.isfinite(y).all()


def test_shapes_are_checked_while_tracing() -> None:
    with pytest.raises(ValueError, match=r"config\.hidden_size=12"):
        jax.jit(call)(X[:, :8])


MESHES: dict[str, tuple[dict[str, int], dict[str, Any], type[Exception], str]] = {
    "experts that do not divide": (
        {"expert": 3},
        {},
        ValueError,
        "num_experts=8 is not divisible by the 3 PEs of mesh axis 'expert'",
    ),
    "no expert axis": (
        {"data": 2},
        {},
        ValueError,
        r"the mesh has no axis 'expert', its axes are \('data',\); pass expert_axis",
    ),
    "an unknown token axis": (
        {"expert": 2},
        {"token_axes": ("batch", "expert")},
        ValueError,
        "the mesh has no axis 'batch'",
    ),
    "tokens that are not sharded over the experts' axis": (
        {"data": 2, "expert": 2},
        {"token_axes": ("data",)},
        ValueError,
        r"token_axes=\('data',\) must contain expert_axis='expert'",
    ),
    "an axis twice": (
        {"expert": 2},
        {"token_axes": ("expert", "expert")},
        ValueError,
        "names an axis twice",
    ),
    "one name for the token axes": (
        {"expert": 2},
        {"token_axes": "expert"},
        TypeError,
        r"token_axes='expert' is a name; pass a tuple, \('expert',\)",
    ),
    "no room for a row of each expert": (
        {"expert": 2},
        with_config(max_received_rows=3),
        ValueError,
        "max_received_rows=3 is less than the 4 experts of a PE",
    ),
}


@pytest.mark.parametrize(("sizes", "kwargs", "error", "message"), MESHES.values(), ids=MESHES)
def test_meshes(
    sizes: dict[str, int],
    kwargs: dict[str, Any],
    error: type[Exception],
    message: str,
    make_mesh: MeshMaker,
) -> None:
    with pytest.raises(error, match=message):
        call(mesh=make_mesh(**sizes), **kwargs)


def test_mesh_of_set_mesh_is_checked_too(make_mesh: MeshMaker) -> None:
    with jax.set_mesh(make_mesh(data=2)), pytest.raises(ValueError, match="no axis 'expert'"):
        call()


def test_two_meshes(make_mesh: MeshMaker) -> None:
    with (
        jax.set_mesh(make_mesh(expert=4)),
        pytest.raises(ValueError, match=r"\{'expert': 2\}, but jax.set_mesh made \{'expert': 4\}"),
    ):
        call(mesh=make_mesh(expert=2))


def in_shard_map(
    function: Callable[[Any, Any], Any], mesh: Any, axis_names: set[str], **kwargs: Any
) -> Any:
    experts = partition_specs(CONFIG, "expert")
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(P("expert"), experts),
        out_specs=P("expert"),
        axis_names=axis_names,
        **kwargs,
    )(jnp.asarray(X), jax.tree.map(jnp.asarray, PARAMS))


def local(**kwargs: Any) -> Callable[[Any, Any], Any]:
    kwargs = {"expert_axis": "expert", "implementation": "xla", **kwargs}
    return lambda x, params: fm.moe_local(x, params, CONFIG, **kwargs)[0]


def test_moe_inside_a_shard_map(make_mesh: MeshMaker) -> None:
    with pytest.raises(ValueError, match=r"inside a shard_map over \('expert',\); call moe_local"):
        in_shard_map(lambda x, p: call(x, p)[0], make_mesh(expert=2), {"expert"})


def test_moe_local_outside_of_a_shard_map() -> None:
    with pytest.raises(ValueError, match="outside of a shard_map; call moe there"):
        local()(X, PARAMS)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_moe_local_in_a_partially_manual_shard_map(
    axis_type: AxisType, make_mesh: MeshMaker
) -> None:
    mesh = make_mesh(axis_type, data=2, expert=2)
    message = r"manual over \('expert',\) but not over \('data',\); leave axis_names out"
    x, params = jnp.asarray(X), jax.tree.map(jnp.asarray, PARAMS)
    with jax.set_mesh(mesh):
        specs = P("expert"), partition_specs(CONFIG, "expert")
        if axis_type == AxisType.Explicit:
            x, params = jax.tree.map(jax.sharding.reshard, (x, params), (specs[0], specs[1]))

        def run(x: Any, params: Any) -> Any:
            return jax.shard_map(
                local(), in_specs=specs, out_specs=P("expert"), axis_names={"expert"}
            )(x, params)

        with pytest.raises(ValueError, match=message):
            jax.jit(run)(x, params)


def test_moe_local_without_check_vma_needs_token_axes(make_mesh: MeshMaker) -> None:
    with pytest.raises(ValueError, match="check_vma=False; pass token_axes"):
        in_shard_map(local(), make_mesh(expert=2), {"expert"}, check_vma=False)


def test_moe_local_of_tokens_that_do_not_vary_over_the_expert_axis(make_mesh: MeshMaker) -> None:
    def replicated(x: jax.Array, params: fm.MoEParams) -> jax.Array:
        return local()(jnp.ones(x.shape), params)

    with pytest.raises(ValueError, match=r"token_axes=\(\) must contain expert_axis='expert'"):
        in_shard_map(replicated, make_mesh(expert=2), {"expert"})


def test_moe_local_has_no_dense(make_mesh: MeshMaker) -> None:
    with pytest.raises(ValueError, match="computes on global arrays; use 'xla' here"):
        in_shard_map(local(implementation="dense"), make_mesh(expert=2), {"expert"})


def test_moe_local_with_the_experts_of_all(make_mesh: MeshMaker) -> None:
    def run(x: jax.Array, _: fm.MoEParams) -> jax.Array:
        return local()(x, jax.tree.map(jnp.asarray, PARAMS))

    with pytest.raises(ValueError, match=r"params.\w+ has shape \(8, .*; it must be \(4, "):
        in_shard_map(run, make_mesh(expert=2), {"expert"})


def test_fused_where_it_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashmoe_jax._ffi.unavailable_reason", lambda platform: f"no {platform}")
    message = "implementation='fused' is not available: no cpu; use implementation='xla'"
    with pytest.raises(ValueError, match=message):
        call(implementation="fused")


def test_fused_in_float64() -> None:
    with jax.enable_x64(True), pytest.raises(ValueError, match="it does not compute float64"):
        call(
            X.astype(np.float64),
            jax.tree.map(lambda leaf: leaf.astype(np.float64), PARAMS),
            implementation="fused",
        )


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FLASHMOE_CPU_ISA", "mmx", "FLASHMOE_CPU_ISA is 'mmx', but this CPU supports: portable"),
        *(
            (
                "FLASHMOE_CPU_THREADS",
                value,
                f"FLASHMOE_CPU_THREADS is '{value}', but must be a whole number from 1 to 4096",
            )
            for value in ("0", "two", "2.5", "")
        ),
    ],
)
def test_environment_variables_of_the_engine(variable: str, value: str, message: str) -> None:
    program = """
import jax, flashmoe_jax as fm
config = fm.MoEConfig(num_experts=2, experts_per_token=1, hidden_size=4, intermediate_size=4)
params = fm.init_params(jax.random.key(0), config)
fm.moe(jax.numpy.ones((2, 4)), params, config, implementation="fused")
"""
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, variable: value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1
    assert message in process.stderr
