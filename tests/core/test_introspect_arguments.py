"""Bad arguments of the introspection functions: each with a message that says what is allowed."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flashmoe_jax import introspect

pytestmark = pytest.mark.smoke

GOOD: dict[str, Any] = {
    "tokens": 4,
    "hidden": 8,
    "intermediate": 8,
    "experts_per_token": 2,
    "capacity": None,
    "max_rows": 16,
    "block_rows": 4,
    "block_tokens": 2,
    "block_columns": 4,
}
COUNTS = [[3, 1], [2, 4]]


def good_plan() -> introspect.Plan:
    return introspect.plan(COUNTS, **GOOD)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", -1),
        ("hidden", 0),
        ("intermediate", 0),
        ("experts_per_token", 0),
        ("capacity", 0),
        ("capacity", 2**63),
        ("max_rows", -1),
        ("max_rows", 2**31),
        ("block_rows", 0),
        ("block_rows", 2.0),
        ("block_tokens", 0),
        ("block_columns", 0),
        ("block_columns", True),
        ("hidden", "8"),
        ("hidden", None),
    ],
)
def test_a_size_out_of_range(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name}={re.escape(repr(value))} must be an int in"):
        introspect.plan(COUNTS, **GOOD | {name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_pes": 3}, "num_experts=4 does not divide by num_pes=3"),
        ({"experts_per_token": 5}, "experts_per_token=5 is more than num_experts=4"),
        ({"num_pes": 2**16, "num_experts": 2**16}, "num_pes [*] num_experts is 4294967296"),
        ({"tokens": 2**30, "experts_per_token": 2}, "experts_per_token is 4294967296"),
        ({"max_rows": 2**31 - 1}, "the receive buffer, in rows, is 2147483652"),
        ({"max_rows": 2, "block_rows": 2**31 - 1}, "the receive buffer, in rows, is 4294967294"),
    ],
)
def test_sizes_that_do_not_go_together(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        introspect.Shape(**GOOD | {"num_pes": 2, "num_experts": 4} | changes)


def test_the_largest_receive_buffer_is_allowed() -> None:
    sizes = {"num_pes": 2, "num_experts": 4, "max_rows": 1, "block_rows": 2**31 - 1}
    assert introspect.Shape(**GOOD | sizes).recv_rows == 2**31 - 1


def test_numpy_integers_are_integers() -> None:
    sizes: dict[str, Any] = {
        name: value if value is None else np.int64(value) for name, value in GOOD.items()
    }
    assert introspect.plan(np.array(COUNTS, np.uint8), **sizes).shape == good_plan().shape


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([3, 1], r"counts has shape \(2,\)"),
        (np.zeros((0, 2), np.int32), r"counts has shape \(0, 2\)"),
        (np.zeros((2, 0), np.int32), r"counts has shape \(2, 0\)"),
        ([[3.0, 1.0]], "dtype float64"),
        ([[True, False]], "dtype bool"),
        ([[3, 1], [2, -4]], r"counts\[1, 1\] is -4; it must be in 0..8"),
        ([[3, 9], [2, 4]], r"counts\[0, 1\] is 9; it must be in 0..8"),
        ([[3, 1], [5, 4]], r"counts\[1\] sums to 9 rows; one PE sends at most 8"),
        (np.array([[2**64 - 1, 0]], np.uint64), r"counts\[0, 0\] is 18446744073709551615"),
        ([[1, 1, 1], [1, 1, 1]], "num_experts=3 does not divide by num_pes=2"),
    ],
)
def test_bad_counts(counts: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        introspect.plan(counts, **GOOD)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"element_bytes": 3}, "element_bytes=3 must be 1, 2, 4 or 8"),
        ({"element_bytes": 2, "resend_rows": True}, "resend_rows=True needs backward=True"),
    ],
)
def test_bad_traffic(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        introspect.heap_layout(good_plan().shape, **changes)


def test_a_heap_beyond_64_bits() -> None:
    shape = introspect.Shape(
        **GOOD | {"num_pes": 1, "num_experts": 2, "max_rows": 2**30, "hidden": 2**31 - 1}
    )
    with pytest.raises(ValueError, match="are more than 4611686018427387904 bytes"):
        introspect.heap_layout(shape, element_bytes=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pe": 2}, "pe=2 must be an int in 0..1"),
        ({"pe": -1}, "pe=-1 must be an int in 0..1"),
        ({"first_columns": 0}, "first_columns=0 must be an int in 1.."),
        ({"second_columns": 0}, "second_columns=0 must be an int in 1.."),
        ({"weight_tiles": -1}, "weight_tiles=-1 must be an int in 0.."),
        ({"weight_tiles": 2**30 + 1}, "weight_tiles=1073741825 must be an int in 0..1073741824"),
    ],
)
@pytest.mark.parametrize("function", [introspect.tile_order, introspect.num_tiles])
def test_bad_tiles(function: Callable[..., object], changes: dict[str, int], message: str) -> None:
    arguments = {"pe": 0, "first_columns": 1, "second_columns": 1, "weight_tiles": 0} | changes
    with pytest.raises(ValueError, match=message):
        function(good_plan(), **arguments)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"start": -1}, "start=-1 must be an int in 0..4"),
        ({"start": 5}, "start=5 must be an int in 0..4"),
        ({"stop": 5}, "stop=5 must be an int in 0..4"),
        ({"lag": 0}, "lag=0 must be an int in 1.."),
        ({"start": 3, "stop": 2}, "stop=2 must be an int in 3..4"),
    ],
)
def test_bad_tickets(part: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        introspect.tile_order(good_plan(), 0, first_columns=1, second_columns=1, **part)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: introspect.parity(-1), "epoch=-1 must be"),
        (lambda: introspect.parity(2**32), "epoch=4294967296 must be an int in 0..4294967295"),
        (lambda: introspect.counted_word(2**32, 1), "tag=4294967296 must be"),
        (lambda: introspect.counted_word(1, 2**32), "epoch=4294967296 must be"),
        (lambda: introspect.epoch_of(2**64), "word=18446744073709551616 must be"),
        (lambda: introspect.tag_of(-1), "word=-1 must be"),
        (lambda: introspect.judge_counted(2**64, tag=1, epoch=1), "seen=18446744073709551616"),
        (lambda: introspect.judge_counted(0, tag=-1, epoch=1), "tag=-1 must be"),
        (lambda: introspect.judge_counted(0, tag=1, epoch=-1), "epoch=-1 must be"),
    ],
)
def test_bad_words(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
