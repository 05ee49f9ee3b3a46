"""Every implementation computes what the oracle does: outputs, counts, and all gradients."""

import os

import pytest

from flashmoe_jax.api import Implementation

from . import cases, evaluate, suite
from .cases import CORNERS, COVERING, LOADS, Layer

SOAK = os.environ.get("FLASHMOE_SOAK", "0") != "0"


def _implementations(layer: Layer) -> list[Implementation]:
    """Those that compute in the dtype of the layer; the oracle itself does so in float32."""
    return ["fused", "xla", "dense"] if layer.dtype == "float32" else ["fused", "xla"]


def _check(layer: Layer, implementations: list[Implementation]) -> None:
    dropped = False
    for load in LOADS:
        want = evaluate.oracle_results(layer, load)
        suite.check_order_one(layer, want)
        dropped |= bool(want["dropped"])
        for implementation in implementations:
            got = evaluate.implementation_results(layer, load, implementation)
            fractions = suite.check(layer, load, got, want)
            print(f"{load}, {implementation}: at most {suite.largest(fractions)} of the bounds")
    # A limit that drops nothing would test nothing.
    assert dropped == (layer.limit != "dropless")


@pytest.mark.parametrize(
    ("layer", "implementation"),
    [
        pytest.param(
            layer,
            implementation,
            id=f"{layer}-{implementation}",
            marks=[pytest.mark.smoke] * (layer in COVERING[:4]),
        )
        for layer in (*COVERING, *CORNERS)
        for implementation in _implementations(layer)
    ],
)
def test_implementation_equals_the_oracle(layer: Layer, implementation: Implementation) -> None:
    _check(layer, [implementation])


@pytest.mark.parametrize(
    "layer",
    list(cases.complete_product())
    if SOAK
    else [
        pytest.param(
            None,
            marks=pytest.mark.skip(reason="takes about an hour: make soak"),
        )
    ],
    ids=str,
)
def test_complete_product_equals_the_oracle(layer: Layer) -> None:
    _check(layer, _implementations(layer))


def test_every_pair_of_values_occurs() -> None:
    occurring = set().union(*map(cases.pairs_of, COVERING))
    assert occurring == set(cases.all_pairs())
