"""The fused implementation gives the same bits for the same inputs.

Whatever the number of PEs, the rows of an expert lie in global token order and its row blocks begin
with its first row (kernels/core/plan.h). All products therefore have the same shapes and operands,
and every sum has the same order: results agree bitwise between 1, 2, 4 and 8 PEs, forward and, for
a caller's routing, backward.

They need not agree where XLA computes a part on each PE's own tokens, in products whose shapes
depend on P: the router and its gradient, and the shared experts, whose gradients are, besides,
summed over the PEs. With data-parallel groups, an expert has other row blocks. max_received_rows
means other rows to drop. Here the routing is therefore passed, and none of the others is used.
"""

import dataclasses

import pytest

from . import evaluate, inputs
from .cases import LOADS, Layer, Limit, Load
from .evaluate import Results

DTYPES = ("float32", "bfloat16", "float16")

# Products of two column tiles in one dimension, and experts with more than one block of rows.
_LAYER = Layer(
    num_pes=8,
    experts_per_token=2,
    dtype="float32",
    network=("silu", True),
    limit="dropless",
    router="caller",
    use_bias=True,
    num_shared_experts=0,
    save_rows=True,
    save_preactivations=True,
    size=(130, 600),
    num_experts=8,
    tokens=192,
)
LAYERS = {dtype: dataclasses.replace(_LAYER, dtype=dtype) for dtype in DTYPES}


def _assert_equal_bits(got: Results, want: Results) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].tobytes() == want[name].tobytes(), name


def _fused(layer: Layer, load: Load = "skewed", *, like: Layer | None = None) -> Results:
    """Results of a layer, with the inputs of another layer if `like` is given."""
    source = layer if like is None else like
    return evaluate.results(layer, "fused", inputs.batch(source, load), inputs.parameters(source))


@pytest.mark.parametrize("num_pes", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_agree(dtype: str, num_pes: int) -> None:
    layer = dataclasses.replace(LAYERS[dtype], num_pes=num_pes)
    other = dataclasses.replace(layer, num_pes=2, size=(40, 130), tokens=64)
    first = _fused(layer)
    for load in LOADS:
        _fused(other, load)  # Leaves other values in heaps and work buffers.
        _fused(layer, load)
        _assert_equal_bits(_fused(layer), first)


@pytest.mark.parametrize("limit", ["dropless", "capacity"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_pes_agree(dtype: str, limit: Limit) -> None:
    one, *others = (
        dataclasses.replace(LAYERS[dtype], num_pes=num_pes, limit=limit) for num_pes in (1, 2, 4, 8)
    )
    for load in LOADS:
        want = _fused(one, load)
        for layer in others:
            _assert_equal_bits(_fused(layer, load, like=one), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_kept_for_backward_changes_no_bit(dtype: str) -> None:
    """Rows that are sent again are the same; so are pre-activations, unless keeping rounds them."""
    want = _fused(LAYERS[dtype])
    for save_rows in (True, False):
        for save_preactivations in (True, False) if dtype == "float32" else (True,):
            layer = dataclasses.replace(
                LAYERS[dtype], save_rows=save_rows, save_preactivations=save_preactivations
            )
            _assert_equal_bits(_fused(layer, like=LAYERS[dtype]), want)
