"""The plan of an epoch against the oracle: places, drops and signals of every row."""

import dataclasses
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashmoe_jax import introspect

from . import oracle
from .cases import Case, cases, routings

Place = tuple[int, int]  # owner, row of its receive buffer


def sent_rows(case: Case, plan: introspect.Plan) -> list[tuple[oracle.Row, Place]]:
    """What the sources send, each knowing only its own rows and the plan.

    The rows of a source for an expert go, in token order, to consecutive places.
    """
    sent = []
    seen: Counter[tuple[int, int]] = Counter()
    for row in case.rows:
        source = plan.sources[row.pe, row.expert]
        i = seen[row.pe, row.expert]
        seen[row.pe, row.expert] += 1
        if i < source["kept"]:
            owner = int(plan.experts[row.expert]["pe"])
            sent.append((row, (owner, int(source["place"]) + i)))
    return sent


def check_rows(case: Case, plan: introspect.Plan) -> None:
    """Exactly the rows that the drop rule keeps are sent, each to a place of its own."""
    sent = sent_rows(case, plan)
    assert [row for row, _ in sent] == oracle.keep(case.rows, case.cap)
    at = [place for _, place in sent]
    assert len(set(at)) == len(at)
    assert all(0 <= index < plan.shape.recv_rows for _, index in at)
    local = case.num_experts // case.num_pes
    assert all(owner == row.expert // local for row, (owner, _) in sent)


def check_row_blocks(case: Case, plan: introspect.Plan) -> None:
    """A row block holds rows of one expert, in global token order, and its signal expects them all.

    They fill it from its first row on, so that a partly filled row block is a prefix.
    """
    landed: dict[Place, list[tuple[int, oracle.Row]]] = {}
    for row, (owner, index) in sent_rows(case, plan):
        block = (owner, index // case.block_rows)
        landed.setdefault(block, []).append((index % case.block_rows, row))
    expected = {(int(b["pe"]), int(b["block"])): b for b in plan.row_blocks}
    assert len(expected) == len(plan.row_blocks)
    assert landed.keys() == expected.keys()
    for place, rows in landed.items():
        rows.sort()
        assert {row.expert for _, row in rows} == {expected[place]["expert"]}
        assert len(rows) == expected[place]["rows"]
        assert [index for index, _ in rows] == list(range(len(rows)))
        assert [row for _, row in rows] == sorted(row for _, row in rows)


def check_oracle(case: Case, plan: introspect.Plan) -> None:
    """Every place is the one that the oracle finds by laying rows down one after the other."""
    kept = oracle.keep(case.rows, case.cap)
    at = oracle.places(kept, case.num_pes, case.num_experts, case.block_rows)
    assert dict(sent_rows(case, plan)) == at
    assert plan.cap == case.cap


@given(cases())
def test_each_kept_row_has_one_place(case: Case) -> None:
    event(f"drops rows: {case.cap < case.counts.sum(axis=0).max()}")
    check_rows(case, case.plan())


@given(cases())
def test_row_blocks_hold_one_expert_and_expect_what_is_sent(case: Case) -> None:
    check_row_blocks(case, case.plan())


@given(cases())
def test_places_and_cap_are_those_of_the_oracle(case: Case) -> None:
    check_oracle(case, case.plan())


@given(cases())
def test_came_back_expects_what_owners_return(case: Case) -> None:
    """A source expects its kept rows back, for each block of its tokens.

    Owners return one piece for each row they received, to the slot in its origin.
    """
    plan = case.plan()
    slots = case.indices.shape[2]
    buffer = {place: (row.pe, row.token * slots + row.slot) for row, place in sent_rows(case, plan)}
    returned: Counter[Place] = Counter()
    for block in plan.row_blocks:
        for i in range(block["rows"]):
            pe, slot = buffer[int(block["pe"]), int(block["block"]) * case.block_rows + i]
            returned[pe, slot // slots // case.block_tokens] += 1
    expected = Counter(
        (row.pe, row.token // case.block_tokens) for row in oracle.keep(case.rows, case.cap)
    )
    assert returned == expected
    assert all(block < plan.shape.token_blocks for _, block in expected)


@given(cases())
def test_accessors_agree_with_the_counts(case: Case) -> None:
    plan = case.plan()
    expected = oracle.plan_counts(case.counts, case.cap, case.block_rows)
    np.testing.assert_array_equal(plan.sources["start"], expected.start)
    np.testing.assert_array_equal(plan.sources["kept"], expected.kept_of_source)
    np.testing.assert_array_equal(plan.sources["place"], expected.first_row + expected.start)
    np.testing.assert_array_equal(plan.experts["kept"], expected.kept)
    np.testing.assert_array_equal(plan.experts["first_row"], expected.first_row)
    np.testing.assert_array_equal(plan.experts["first_block"] * case.block_rows, expected.first_row)
    np.testing.assert_array_equal(plan.experts["blocks"], expected.blocks)


@given(cases(), st.data())
def test_every_pe_computes_the_same_plan(case: Case, data: st.DataObject) -> None:
    """Whatever the order in which a PE gets the count rows, and whatever it planned before."""
    plans = []
    for _ in range(case.num_pes):
        counts = np.zeros_like(case.counts)
        for source in data.draw(st.permutations(range(case.num_pes))):
            counts[source] = case.counts[source]
        case.plan(np.roll(counts, 1, axis=1))
        plans.append(case.plan(counts))
    for plan in plans[1:]:
        assert plan.cap == plans[0].cap
        for name in ("experts", "sources", "row_blocks"):
            assert getattr(plan, name).tobytes() == getattr(plans[0], name).tobytes()


@given(st.data())
def test_what_is_kept_does_not_depend_on_the_number_of_pes(data: st.DataObject) -> None:
    """The same global stream of tokens, split over 1, 2, 4 and 8 PEs."""
    num_experts = data.draw(st.sampled_from([8, 16]))
    tokens = 8 * data.draw(st.integers(0, 4))
    stream = data.draw(routings(tokens, num_experts, num_pes=1))
    capacity = data.draw(st.none() | st.integers(1, 12))
    orders = []
    for num_pes in (1, 2, 4, 8):
        indices = stream.reshape(num_pes, tokens // num_pes, stream.shape[2])
        case = Case(indices, num_experts, capacity, indices.size, block_rows=4, block_tokens=2)
        plan = case.plan()
        order: dict[int, list[tuple[int, int, int]]] = {e: [] for e in range(num_experts)}
        for row, (_, index) in sent_rows(case, plan):
            token = row.pe * indices.shape[1] + row.token
            rank = index - int(plan.experts[row.expert]["first_row"])
            order[row.expert].append((rank, token, row.slot))
        orders.append({e: sorted(rows) for e, rows in order.items()})
    assert orders[1:] == orders[:-1]


@given(
    num_pes=st.sampled_from([1, 2, 4]),
    local=st.integers(1, 4),
    data=st.data(),
)
def test_the_cap_is_the_largest_that_fits(num_pes: int, local: int, data: st.DataObject) -> None:
    shape = (num_pes, num_pes * local)
    slots = 10**6
    rows = st.integers(0, slots // shape[1])
    counts = np.array(
        data.draw(st.lists(rows, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    ).reshape(shape)
    max_rows = data.draw(st.integers(0, int(counts.sum()) + 1))
    capacity = data.draw(st.none() | st.integers(1, int(counts.max()) * num_pes + 2))
    plan = plan_of(counts, tokens=slots, max_rows=max_rows, capacity=capacity)
    check_cap(plan)


def plan_of(
    counts: NDArray[np.integer],
    *,
    tokens: int,
    max_rows: int,
    capacity: int | None = None,
    experts_per_token: int = 1,
    block_rows: int = 1 << 18,
) -> introspect.Plan:
    return introspect.plan(
        counts,
        tokens=tokens,
        hidden=1,
        intermediate=1,
        experts_per_token=experts_per_token,
        capacity=capacity,
        max_rows=max_rows,
        block_rows=block_rows,
        block_tokens=64,
        block_columns=1,
    )


def check_cap(plan: introspect.Plan) -> None:
    shape = plan.shape
    wanted = plan.counts.sum(axis=0, dtype=np.int64)
    limit = int(wanted.max())
    if shape.capacity is not None:
        limit = min(limit, shape.capacity)
    assert 0 <= plan.cap <= limit
    assert (oracle.received(wanted, plan.cap, shape.num_pes) <= shape.max_rows).all()
    if plan.cap < limit:
        more = oracle.received(wanted, plan.cap + 1, shape.num_pes)
        assert (more > shape.max_rows).any()


def check_counts(plan: introspect.Plan) -> None:
    """The plan is that of the 64-bit oracle and stays inside its receive buffers."""
    shape = plan.shape
    check_cap(plan)
    expected = oracle.plan_counts(plan.counts, plan.cap, shape.block_rows)
    np.testing.assert_array_equal(plan.sources["start"], expected.start)
    np.testing.assert_array_equal(plan.sources["kept"], expected.kept_of_source)
    np.testing.assert_array_equal(plan.experts["kept"], expected.kept)
    np.testing.assert_array_equal(plan.experts["first_row"], expected.first_row)
    np.testing.assert_array_equal(plan.experts["blocks"], expected.blocks)
    sends = expected.kept_of_source > 0
    place = plan.sources["place"].astype(np.int64)
    np.testing.assert_array_equal(place[sends], (expected.first_row + expected.start)[sends])
    assert ((place + expected.kept_of_source)[sends] <= shape.recv_rows).all()
    assert (expected.first_row + expected.blocks * shape.block_rows <= shape.recv_rows).all()
    blocks = plan.row_blocks
    assert len(blocks) == expected.blocks.sum()
    assert ((blocks["rows"] > 0) & (blocks["rows"] <= shape.block_rows)).all()
    rows = np.zeros(shape.num_experts, np.int64)
    np.add.at(rows, blocks["expert"], blocks["rows"])
    np.testing.assert_array_equal(rows, expected.kept)
    used = blocks["pe"].astype(np.int64) * shape.row_blocks + blocks["block"]
    assert len(np.unique(used)) == len(used)
    assert ((blocks["block"] >= 0) & (blocks["block"] < shape.row_blocks)).all()


SIZES = [
    (num_pes, num_experts)
    for num_pes in (1, 2, 7, 8, 64)
    for num_experts in (1, 2, 7, 8, 64, 448, 512)
    if num_experts % num_pes == 0
]


def counts_like(kind: str, num_pes: int, num_experts: int, slots: int) -> NDArray[np.int64]:
    """Count matrices [P, E] of every source sending at most `slots` rows."""
    rng = np.random.default_rng(num_pes * 1000 + num_experts)
    counts = np.zeros((num_pes, num_experts), np.int64)
    if kind == "one expert":
        counts[:, num_experts // 2] = slots
    elif kind == "last expert":
        counts[:, -1] = slots
    elif kind != "nothing":
        share = np.full(num_experts, 1.0)
        if kind == "skewed":
            share = 1.0 / np.arange(1, num_experts + 1) ** 2
        if kind == "empty experts":
            share[::2] = 0.0
            share[-1] = 1.0
        counts = rng.multinomial(slots, share / share.sum(), size=num_pes)
        if kind == "masked PEs":
            counts[::2] = 0
    return counts


KINDS = ["uniform", "skewed", "empty experts", "one expert", "last expert", "masked PEs", "nothing"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_pes", "num_experts"), SIZES)
def test_bounds_at_every_size(num_pes: int, num_experts: int, kind: str) -> None:
    slots = 3000
    counts = counts_like(kind, num_pes, num_experts, slots)
    worst = num_pes * slots
    for max_rows in (worst, worst // num_pes, 1, 0):
        for capacity in (None, 1, 100):
            for block_rows in (1, 128):
                check_counts(
                    plan_of(
                        counts,
                        tokens=slots,
                        max_rows=max_rows,
                        capacity=capacity,
                        block_rows=block_rows,
                    )
                )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_pes", "num_experts"), [(1, 1), (1, 512), (8, 64), (64, 64), (64, 512)]
)
def test_bounds_at_the_end_of_32_bits(num_pes: int, num_experts: int, kind: str) -> None:
    """As many rows as 32 bits can count, dropless and with the largest caps."""
    slots = (2**31 - 1) // num_pes
    counts = counts_like(kind, num_pes, num_experts, slots)
    block_rows = 1 << 18
    # The most rows whose buffer, with its alignment, still has 32-bit indices.
    room = 2**31 - 1 - (num_experts // num_pes + 1) * block_rows
    for max_rows in (room, room // 2, 1):
        for capacity in (None, 2**31 - 1, 2**62, 2**20 + 1):
            check_counts(
                plan_of(
                    counts,
                    tokens=slots,
                    max_rows=max_rows,
                    capacity=capacity,
                    block_rows=block_rows,
                )
            )


def test_a_group_without_tokens_has_an_empty_plan() -> None:
    plan = plan_of(np.zeros((4, 8), np.int32), tokens=0, max_rows=0)
    shape = plan.shape
    assert (plan.cap, shape.recv_rows, shape.row_blocks, shape.token_blocks) == (0, 0, 0, 0)
    assert len(plan.row_blocks) == 0
    assert not plan.sources["kept"].any()


# What the checks above are worth: each of these faults must be seen by the check beside it.


def fault_case() -> Case:
    indices = np.random.default_rng(0).integers(-1, 4, (2, 8, 2)).astype(np.int32)
    return Case(indices, 4, capacity=5, max_rows=12, block_rows=4, block_tokens=2)


def change(
    plan: introspect.Plan, table: str, where: object, field: str, by: int
) -> introspect.Plan:
    copy = getattr(plan, table).copy()
    copy[field][where] += by
    return dataclasses.replace(plan, **{table: copy})


@pytest.mark.parametrize(
    ("check", "table", "where", "field", "by"),
    [
        (check_rows, "sources", (1, 2), "kept", 1),  # a row too many
        (check_rows, "sources", (0, 2), "kept", -1),  # a row too few
        (check_rows, "sources", (0, 2), "place", 1),  # on the next source's first row
        (check_rows, "sources", 0, "place", 1000),  # outside the buffer
        (check_rows, "experts", 3, "pe", -1),  # at another PE
        (check_row_blocks, "sources", (slice(None), 1), "place", -1),  # in another expert's block
        (check_row_blocks, "row_blocks", 1, "rows", 1),  # waits for a row that nobody sends
        (check_row_blocks, "row_blocks", 0, "rows", -1),  # starts before the last row is here
        (check_row_blocks, "row_blocks", 0, "expert", 1),  # with another expert's weights
        (check_oracle, "sources", 0, "place", 1),
    ],
)
def test_the_checks_see_a_planted_fault(
    check: Callable[[Case, introspect.Plan], None], table: str, where: object, field: str, by: int
) -> None:
    case = fault_case()
    plan = case.plan()
    check(case, plan)
    with pytest.raises(AssertionError):
        check(case, change(plan, table, where, field, by))


@pytest.mark.parametrize("by", [-1, 1])
def test_the_checks_see_another_cap(by: int) -> None:
    plan = fault_case().plan()
    check_cap(plan)
    with pytest.raises(AssertionError):
        check_cap(dataclasses.replace(plan, cap=plan.cap + by))
