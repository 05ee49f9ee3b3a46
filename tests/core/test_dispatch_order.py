"""The order in which PEs send: everybody to somebody else."""

import pytest

from flashmoe_jax import introspect

from . import oracle

SIZES = [(p, e) for p in (1, 2, 3, 7, 8, 64) for e in (1, 2, 3, 7, 8, 21, 64, 512) if e % p == 0]


def order_of(num_pes: int, num_experts: int) -> list[list[tuple[int, int]]]:
    """[P][E] of (PE, expert)."""
    shape = introspect.Shape(
        num_pes=num_pes,
        tokens=1,
        hidden=1,
        intermediate=1,
        num_experts=num_experts,
        experts_per_token=1,
        max_rows=1,
        block_rows=1,
        block_tokens=1,
        block_columns=1,
    )
    return [
        [(pe, expert) for pe, expert in row] for row in introspect.dispatch_order(shape).tolist()
    ]


@pytest.mark.parametrize(("num_pes", "num_experts"), SIZES)
def test_order_is_that_of_the_oracle(num_pes: int, num_experts: int) -> None:
    expected = [oracle.dispatch_order(me, num_pes, num_experts) for me in range(num_pes)]
    assert order_of(num_pes, num_experts) == expected


@pytest.mark.parametrize(("num_pes", "num_experts"), SIZES)
def test_each_expert_is_visited_once_at_its_owner(num_pes: int, num_experts: int) -> None:
    local = num_experts // num_pes
    for steps in order_of(num_pes, num_experts):
        assert sorted(expert for _, expert in steps) == list(range(num_experts))
        assert all(pe == expert // local for pe, expert in steps)


@pytest.mark.parametrize(("num_pes", "num_experts"), SIZES)
def test_own_pe_first_and_local_experts_in_order(num_pes: int, num_experts: int) -> None:
    """So that a PE can start at once, and tiles can start while later experts are on the wire."""
    local = num_experts // num_pes
    for me, steps in enumerate(order_of(num_pes, num_experts)):
        assert steps[0] == (me, me * local)
        ranks = [expert % local for _, expert in steps]
        assert ranks == sorted(ranks)


@pytest.mark.parametrize(("num_pes", "num_experts"), SIZES)
def test_in_each_step_all_send_to_different_pes(num_pes: int, num_experts: int) -> None:
    for step in zip(*order_of(num_pes, num_experts), strict=True):
        assert len({pe for pe, _ in step}) == num_pes
