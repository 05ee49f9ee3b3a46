"""The symmetric heap: sections in the protocol's order, apart from each other, large enough."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_jax import introspect

from . import oracle
from .cases import Case, cases

NAMES = (
    "counts",
    "counted",
    "recv",
    "recv_x",
    "origin",
    "weight",
    "arrived",
    "returned",
    "returned_weight",
    "came_back",
)
pytestmark = pytest.mark.smoke

Layout = tuple[dict[str, tuple[int, int, int]], int]  # (offset, count, stride) by name, and bytes


def layout_of(
    shape: introspect.Shape, *, element_bytes: int, backward: bool, resend_rows: bool
) -> Layout:
    layout = introspect.heap_layout(
        shape, element_bytes=element_bytes, backward=backward, resend_rows=resend_rows
    )
    assert layout.shape == ()
    assert layout.dtype.names == (*NAMES, "bytes")
    return {name: layout[name].item() for name in NAMES}, int(layout["bytes"])


def check_layout(layout: Layout) -> None:
    """Sections start aligned, do not overlap, and end inside the heap."""
    sections, total = layout
    assert total % introspect.SECTION_ALIGNMENT == 0
    extents = sorted(
        (offset, offset + count * stride) for offset, count, stride in sections.values() if count
    )
    assert all(0 <= begin < end <= total for begin, end in extents)
    assert all(begin % introspect.SECTION_ALIGNMENT == 0 for begin, _ in extents)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(extents))


@st.composite
def shapes(draw: st.DrawFn) -> introspect.Shape:
    num_pes = draw(st.integers(1, 64))
    num_experts = num_pes * draw(st.integers(1, 512 // num_pes))
    return introspect.Shape(
        num_pes=num_pes,
        tokens=draw(st.integers(0, 10**4)),
        hidden=draw(st.integers(1, 10**4)),
        intermediate=draw(st.integers(1, 10**4)),
        num_experts=num_experts,
        experts_per_token=draw(st.integers(1, min(16, num_experts))),
        max_rows=draw(st.integers(0, 10**6)),
        block_rows=draw(st.integers(1, 256)),
        block_tokens=draw(st.integers(1, 256)),
        block_columns=draw(st.integers(1, 256)),
        capacity=draw(st.none() | st.integers(1, 10**6)),
    )


traffics = st.sampled_from(
    [
        {"element_bytes": element_bytes, "backward": backward, "resend_rows": resend_rows}
        for element_bytes in (1, 2, 4, 8)
        for backward, resend_rows in ((False, False), (True, False), (True, True))
    ]
)


def expected_sections(
    shape: introspect.Shape, *, element_bytes: int, backward: bool, resend_rows: bool
) -> list[oracle.Section]:
    return oracle.heap_sections(
        num_pes=shape.num_pes,
        num_experts=shape.num_experts,
        recv_rows=shape.recv_rows,
        block_rows=shape.block_rows,
        tokens=shape.tokens,
        experts_per_token=shape.experts_per_token,
        block_tokens=shape.block_tokens,
        row_bytes=shape.hidden * element_bytes,
        backward=backward,
        resend_rows=resend_rows,
    )


@given(shapes(), traffics)
def test_sections_are_those_of_the_protocol(
    shape: introspect.Shape, traffic: dict[str, Any]
) -> None:
    sections, total = layout_of(shape, **traffic)
    end = 0
    for name, length, stride in expected_sections(shape, **traffic):
        end += -end % introspect.SECTION_ALIGNMENT
        assert sections[name] == (end, length, stride), name
        end += length * stride
    assert total == end + -end % introspect.SECTION_ALIGNMENT


@given(shapes(), traffics)
def test_sections_lie_apart_and_inside(shape: introspect.Shape, traffic: dict[str, Any]) -> None:
    check_layout(layout_of(shape, **traffic))


@given(shapes())
def test_derived_sizes(shape: introspect.Shape) -> None:
    assert shape.slots == shape.tokens * shape.experts_per_token
    assert shape.recv_rows == shape.row_blocks * shape.block_rows
    assert shape.token_blocks == len(range(0, shape.tokens, shape.block_tokens))
    assert shape.hidden_tiles == len(range(0, shape.hidden, shape.block_columns))
    assert shape.intermediate_tiles == len(range(0, shape.intermediate, shape.block_columns))


@given(shapes())
def test_the_receive_buffer_holds_the_worst_plan(shape: introspect.Shape) -> None:
    """The worst is when as many experts as can be have one row more than full row blocks."""
    experts = min(shape.local_experts, shape.max_rows)
    rows = np.zeros(shape.local_experts, np.int64)
    rows[:experts] = 1
    if experts:
        # Whole row blocks of the rest go to one expert, and what is left beside them too.
        rows[0] += shape.max_rows - experts
    assert rows.sum() == shape.max_rows
    blocks = -(-rows // shape.block_rows)
    assert blocks.sum() * shape.block_rows == shape.recv_rows


@given(cases(), traffics)
def test_every_place_of_a_plan_is_in_the_heap(case: Case, traffic: dict[str, Any]) -> None:
    plan = case.plan()
    sections, _ = layout_of(plan.shape, **traffic)
    ends = plan.sources["place"] + plan.sources["kept"]
    last_row = int(ends[plan.sources["kept"] > 0].max(initial=0))
    sized_by_rows = ["recv", "origin"]
    sized_by_slots = ["returned"]
    if traffic["backward"]:
        sized_by_rows.append("weight")
        sized_by_slots.append("returned_weight")
    if traffic["resend_rows"]:
        sized_by_rows.append("recv_x")
    assert all(sections[name][1] >= last_row for name in sized_by_rows)
    assert all(sections[name][1] == case.indices[0].size for name in sized_by_slots)
    last_block = int(plan.row_blocks["block"].max(initial=-1))
    assert last_block < sections["arrived"][1]
    token_blocks = {row.token // case.block_tokens for row in case.rows}
    assert max(token_blocks, default=-1) < sections["came_back"][1]


@pytest.mark.parametrize(
    ("tokens", "hidden", "max_rows"), [(2**21, 2**17 + 3, 2**30), (2**10, 2**30 + 3, 2**20)]
)
@pytest.mark.parametrize("backward", [False, True])
def test_heaps_beyond_32_bits(tokens: int, hidden: int, max_rows: int, backward: bool) -> None:
    """The numbers are right even where no machine has the memory: many rows, and wide rows."""
    shape = introspect.Shape(
        num_pes=64,
        tokens=tokens,
        hidden=hidden,
        intermediate=1,
        num_experts=512,
        experts_per_token=8,
        max_rows=max_rows,
        block_rows=128,
        block_tokens=64,
        block_columns=128,
    )
    traffic: dict[str, Any] = {"element_bytes": 4, "backward": backward, "resend_rows": backward}
    sections, total = layout_of(shape, **traffic)
    check_layout((sections, total))
    expected = expected_sections(shape, **traffic)
    assert [sections[s.name][1:] for s in expected] == [(s.length, s.stride) for s in expected]
    assert total > 2**48


def test_overlapping_sections_are_found() -> None:
    """The check of the layout sees the fault that it is there for."""
    shape = introspect.plan(
        [[1]],
        tokens=1,
        hidden=64,
        intermediate=1,
        experts_per_token=1,
        max_rows=1,
        block_rows=4,
        block_tokens=1,
        block_columns=1,
    ).shape
    sections, total = layout_of(shape, element_bytes=4, backward=False, resend_rows=False)
    check_layout((sections, total))
    offset, count, stride = sections["recv"]
    for fault in ((offset, count + 1, stride), (offset, count, stride * 2), (offset + 8, 1, 8)):
        with pytest.raises(AssertionError):
            check_layout((sections | {"recv": fault}, total))
    with pytest.raises(AssertionError):
        check_layout((sections, total - introspect.SECTION_ALIGNMENT))
