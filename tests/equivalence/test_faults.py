"""The suite can fail: faults, planted in what an implementation is given or returns, are caught."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from flashmoe_jax.api import Implementation

from . import bounds, evaluate, inputs, suite
from .cases import Layer, Load
from .evaluate import Results
from .suite import NotEquivalent

DTYPES = ("float32", "bfloat16", "float16")
IMPLEMENTATIONS: tuple[Implementation, ...] = ("fused", "xla")
LOAD: Load = "uniform"

# Between them these have every result; the gradient of the selection bias is 0 and always must be.
_ROUTED = Layer(
    num_pes=4,
    experts_per_token=2,
    dtype="float32",
    network=("silu", True),
    limit="capacity",
    router="softmax",
    use_bias=True,
    num_shared_experts=1,
    save_rows=True,
    save_preactivations=True,
    size=(24, 40),
)
_CALLER = dataclasses.replace(_ROUTED, router="caller", num_shared_experts=0)
LAYERS = {
    (router, dtype): dataclasses.replace(layer, dtype=dtype)
    for router, layer in (("softmax", _ROUTED), ("caller", _CALLER))
    for dtype in DTYPES
}

GRADIENTS = {
    "softmax": (
        "d_x",
        "d_router",
        "d_gate",
        "d_up",
        "d_down",
        "d_gate_bias",
        "d_up_bias",
        "d_down_bias",
        "d_shared.gate",
        "d_shared.up",
        "d_shared.down",
    ),
    "caller": ("d_weights",),
}


def _results(layer: Layer, implementation: Implementation) -> Results:
    """Right results, as the check confirms."""
    got = evaluate.implementation_results(layer, LOAD, implementation)
    suite.check(layer, LOAD, got, evaluate.oracle_results(layer, LOAD))
    return dict(got)


def _faulty_names(layer: Layer, got: Results) -> set[str]:
    """The results of which the check says that they are wrong."""
    with pytest.raises(NotEquivalent) as caught:
        suite.check(layer, LOAD, got, evaluate.oracle_results(layer, LOAD))
    return caught.value.names


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda result: 0 * result, id="zeroed"),
        pytest.param(lambda result: -result, id="sign_flipped"),
        pytest.param(lambda result: 2 * result, id="doubled"),
        pytest.param(lambda result: np.nan * result, id="nan"),
    ],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("router", GRADIENTS)
def test_a_wrong_result_is_caught(
    fault: Callable[[np.ndarray], np.ndarray],
    router: str,
    dtype: str,
    implementation: Implementation,
) -> None:
    layer = LAYERS[router, dtype]
    right = _results(layer, implementation)
    assert set(GRADIENTS[router]) <= right.keys()
    for name in ("y", *GRADIENTS[router]):
        assert _faulty_names(layer, {**right, name: fault(right[name])}) == {name}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("router", GRADIENTS)
def test_a_scale_that_no_rounding_explains_is_caught(
    router: str, dtype: str, implementation: Implementation
) -> None:
    layer = LAYERS[router, dtype]
    right = _results(layer, implementation)
    for name in ("y", *GRADIENTS[router]):
        scale = 1 + 2 * bounds.error_bounds(layer)[name]
        scaled = scale * right[name].astype(np.float64)
        assert _faulty_names(layer, {**right, name: scaled}) == {name}


@pytest.mark.parametrize("name", suite.COUNTS)
def test_a_wrong_count_is_caught(name: str) -> None:
    layer = LAYERS["softmax", "float32"]
    right = _results(layer, "xla")
    assert _faulty_names(layer, {**right, name: right[name] + 1}) == {name}


def test_a_missing_result_is_caught() -> None:
    layer = LAYERS["softmax", "float32"]
    right = _results(layer, "xla")
    del right["d_gate"]
    assert _faulty_names(layer, right) == {"d_gate"}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
class TestWrongOperator:
    """An operator that computes something else, made by giving it other inputs."""

    def test_missing_expert(self, dtype: str, implementation: Implementation) -> None:
        layer = LAYERS["caller", dtype]
        params = inputs.parameters(layer)
        down, down_bias = (_without_expert(part, 3) for part in (params.down, params.down_bias))
        got = evaluate.results(
            layer,
            implementation,
            inputs.batch(layer, LOAD),
            dataclasses.replace(params, down=down, down_bias=down_bias),
        )
        assert _faulty_names(layer, got) >= {"y", "d_x", "d_weights", "d_gate", "d_up"}

    def test_dropped_slot(self, dtype: str, implementation: Implementation) -> None:
        layer = LAYERS["caller", dtype]
        weights = _caller_weights(layer)
        token, slot = np.argwhere(evaluate.oracle_results(layer, LOAD)["d_weights"] != 0)[0]
        weights[token, slot] = 0
        got = _with_weights(layer, implementation, weights)
        assert _faulty_names(layer, got) >= {"y", "d_x"}

    def test_unweighted_combine(self, dtype: str, implementation: Implementation) -> None:
        layer = LAYERS["caller", dtype]
        got = _with_weights(layer, implementation, np.ones_like(_caller_weights(layer)))
        assert "y" in _faulty_names(layer, got)

    def test_swapped_gate_and_up(self, dtype: str, implementation: Implementation) -> None:
        layer = LAYERS["softmax", dtype]
        params = inputs.parameters(layer)
        assert params.gate is not None
        got = evaluate.results(
            layer,
            implementation,
            inputs.batch(layer, LOAD),
            dataclasses.replace(
                params,
                gate=params.up,
                up=params.gate,
                gate_bias=params.up_bias,
                up_bias=params.gate_bias,
            ),
        )
        for name in ("", "_bias"):
            got[f"d_gate{name}"], got[f"d_up{name}"] = got[f"d_up{name}"], got[f"d_gate{name}"]
        assert _faulty_names(layer, got) >= {"y", "d_x", "d_gate", "d_up", "d_gate_bias"}


def _without_expert(part: Any, expert: int) -> Any:
    part = np.array(part)
    part[expert] = 0
    return part


def _caller_weights(layer: Layer) -> np.ndarray:
    routing = inputs.batch(layer, LOAD).routing
    assert routing is not None
    return np.array(routing.weights)


def _with_weights(layer: Layer, implementation: Implementation, weights: np.ndarray) -> Results:
    batch = inputs.batch(layer, LOAD)
    routing = dataclasses.replace(batch.routing, weights=weights)  # type: ignore[type-var]
    return evaluate.results(
        layer,
        implementation,
        dataclasses.replace(batch, routing=routing),
        inputs.parameters(layer),
    )


def _small_faults(right: Results) -> Iterator[tuple[str, np.ndarray]]:
    """A wrong output or gradient of one token; of a weight, of one expert or in one entry."""
    for name in ("y", "d_x", "d_router", "d_gate", "d_up", "d_down", "d_gate_bias", "d_up_bias"):
        wrong = right[name].copy()
        wrong[5] = 2 * wrong[5]
        yield name, wrong
    for name in ("d_gate", "d_up", "d_down", "d_router"):
        wrong = right[name].copy()
        wrong.flat[np.abs(wrong).argmax()] = 0
        yield name, wrong


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_fault_exceeds_the_peak_measure(dtype: str) -> None:
    layer = LAYERS["softmax", dtype]
    right, want = _results(layer, "xla"), evaluate.oracle_results(layer, LOAD)
    eps = bounds.error_bounds(layer)
    for name, wrong in _small_faults(right):
        distance = bounds.distance(wrong, want[name])
        assert distance.peak > bounds.bound(eps[name], want[name]).peak
        assert _faulty_names(layer, {**right, name: wrong}) == {name}
