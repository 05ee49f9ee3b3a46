"""The order of the tiles of a PE: complete, and such that any number of workers ends."""

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_jax import introspect

from . import oracle
from .cases import Case, cases
from .oracle import FIRST, SECOND, WEIGHTS, Tile

lags = st.integers(1, 5)
columns = st.fixed_dictionaries(
    {
        "first_columns": st.integers(1, 3),
        "second_columns": st.integers(1, 3),
        "weight_tiles": st.integers(0, 3),
    }
)


def tiles_of(plan: introspect.Plan, pe: int, **arguments: int) -> list[Tile]:
    kinds = {kind.value: kind.name for kind in introspect.TileKind}
    return [
        Tile(kinds[kind], expert, block, column)
        for kind, expert, block, column in introspect.tile_order(plan, pe, **arguments).tolist()
    ]


def stages_of(plan: introspect.Plan, pe: int, **arguments: int) -> list[oracle.Stage]:
    """The oracle's stages of a PE, from the row blocks in use."""
    local = plan.shape.local_experts
    blocks = plan.row_blocks[plan.row_blocks["pe"] == pe]
    experts, next_block = [], 0
    for expert in range(pe * local, (pe + 1) * local):
        count = int((blocks["expert"] == expert).sum())
        experts.append((expert, next_block, count))
        next_block += count
    return oracle.tile_stages(experts, **arguments)


@given(cases(), columns, lags)
def test_order_is_that_of_the_oracle(case: Case, columns: dict[str, int], lag: int) -> None:
    plan = case.plan()
    for pe in range(case.num_pes):
        tiles = tiles_of(plan, pe, **columns, lag=lag)
        assert tiles == list(oracle.all_tiles(stages_of(plan, pe, **columns, lag=lag)))
        assert len(tiles) == introspect.num_tiles(plan, pe, **columns)


@given(cases(), columns)
def test_each_tile_is_handed_out_once(case: Case, columns: dict[str, int]) -> None:
    """All tiles of all row blocks in use, and the weight gradients of every expert.

    Also of one without rows: its gradient is zero, and somebody has to write the zeros.
    """
    plan = case.plan()
    expected = [
        Tile(kind, int(block["expert"]), int(block["block"]), column)
        for block in plan.row_blocks
        for kind, count in ((FIRST, "first_columns"), (SECOND, "second_columns"))
        for column in range(columns[count])
    ] + [
        Tile(WEIGHTS, expert, -1, part)
        for expert in range(case.num_experts)
        for part in range(columns["weight_tiles"])
    ]
    found = [(pe, t) for pe in range(case.num_pes) for t in tiles_of(plan, pe, **columns)]
    assert Counter(tile for _, tile in found if tile.kind == WEIGHTS) == Counter(
        tile for tile in expected if tile.kind == WEIGHTS
    )
    owner = plan.experts["pe"]
    assert Counter(found) == Counter((int(owner[tile.expert]), tile) for tile in expected)


def needs(tile: Tile, other: Tile) -> bool:
    """True if `tile` reads what `other` writes."""
    if other.kind != FIRST or tile.kind == FIRST:
        return False
    return tile.expert == other.expert if tile.kind == WEIGHTS else tile.block == other.block


def check_tickets(tiles: Sequence[Tile]) -> None:
    for tile, later in itertools.combinations(tiles, 2):
        assert not needs(tile, later), f"{tile} waits for {later}, which has a later ticket"


def run_workers(tiles: Sequence[Tile], workers: int, rng: random.Random) -> None:
    """Runs workers that take tickets and wait for what their tile needs.

    Each time, some worker that can go on does, and a row block can land at any moment: a worker is
    as slow as `rng` makes it. Fails if tiles are left and nobody can go on.
    """
    waiting_for = {tile: sum(needs(tile, other) for other in tiles) for tile in tiles}
    to_land = {tile.block for tile in tiles if tile.kind == FIRST}
    tickets = iter(tiles)
    held: list[Tile | None] = [None] * workers
    done = 0
    while done < len(tiles) or any(held):
        if to_land and rng.random() < 0.3:
            to_land.remove(rng.choice(sorted(to_land)))
        able = [
            w
            for w, tile in enumerate(held)
            if (tile is None and done + sum(map(bool, held)) < len(tiles))
            or (tile is not None and not waiting_for[tile] and tile.block not in to_land)
        ]
        if not able:
            assert to_land, f"nobody can go on; held: {held}"
            to_land.pop()
            continue
        worker = rng.choice(able)
        tile = held[worker]
        if tile is None:
            held[worker] = next(tickets)
            continue
        held[worker] = None
        done += 1
        for other in tiles:
            waiting_for[other] -= needs(other, tile)


@given(cases(), columns, lags)
def test_a_tile_needs_lower_tickets_only(case: Case, columns: dict[str, int], lag: int) -> None:
    plan = case.plan()
    for pe in range(case.num_pes):
        check_tickets(tiles_of(plan, pe, **columns, lag=lag))


@pytest.mark.parametrize("workers", range(1, 9))
def test_any_number_of_workers_ends(workers: int) -> None:
    rng = random.Random(workers)
    for _ in range(20):
        local = rng.randint(1, 4)
        counts = np.array([[rng.choice([0, 1, 2, 5]) for _ in range(local)]])
        plan = introspect.plan(
            counts,
            tokens=5 * local,
            hidden=1,
            intermediate=1,
            experts_per_token=1,
            max_rows=5 * local,
            block_rows=2,
            block_tokens=1,
            block_columns=1,
        )
        tiles = tiles_of(
            plan,
            0,
            first_columns=rng.randint(1, 3),
            second_columns=rng.randint(1, 3),
            weight_tiles=rng.randint(0, 2),
            lag=rng.randint(1, local + 1),
        )
        run_workers(tiles, workers, rng)


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_an_order_that_needs_a_later_ticket_is_found(workers: int) -> None:
    """The two checks above see the fault that they are there for."""
    tiles = list(oracle.all_tiles(oracle.tile_stages([(0, 0, 2), (1, 2, 9)], 1, 2, 1)))
    run_workers(tiles, workers, random.Random(0))
    tiles.sort(key=lambda tile: tile.kind == FIRST)
    with pytest.raises(AssertionError, match="later ticket"):
        check_tickets(tiles)
    with pytest.raises(AssertionError, match="nobody can go on"):
        run_workers(tiles, workers, random.Random(0))


@given(cases(), columns, st.data())
def test_a_part_of_the_order_is_that_part(
    case: Case, columns: dict[str, int], data: st.DataObject
) -> None:
    plan = case.plan()
    pe = data.draw(st.integers(0, case.num_pes - 1))
    tiles = tiles_of(plan, pe, **columns)
    start = data.draw(st.integers(0, len(tiles)))
    stop = data.draw(st.integers(start, len(tiles)))
    assert tiles_of(plan, pe, **columns, start=start, stop=stop) == tiles[start:stop]


@pytest.mark.parametrize(
    ("num_pes", "num_experts"), [(1, 1), (1, 512), (8, 64), (64, 64), (64, 512)]
)
@pytest.mark.parametrize("kind", ["even", "one expert", "nothing"])
def test_tickets_beyond_32_bits(num_pes: int, num_experts: int, kind: str) -> None:
    slots = (2**31 - 1) // num_pes
    counts = np.zeros((num_pes, num_experts), np.int64)
    if kind == "even":
        counts[:] = slots // num_experts
    if kind == "one expert":
        counts[:, -1] = slots
    block_rows = 1 << 16
    plan = introspect.plan(
        counts,
        tokens=slots,
        hidden=1,
        intermediate=1,
        experts_per_token=1,
        max_rows=2**31 - 1 - (num_experts // num_pes + 1) * block_rows,
        block_rows=block_rows,
        block_tokens=64,
        block_columns=1,
    )
    columns = {"first_columns": 2**20, "second_columns": 2**20 - 3, "weight_tiles": 2**30}
    rng = random.Random(0)
    for pe in {0, num_pes // 2, num_pes - 1}:
        size = introspect.num_tiles(plan, pe, **columns)
        stages = stages_of(plan, pe, **columns)
        ends = [0, *itertools.accumulate(stage.size() for stage in stages)]
        assert size == ends[-1] >= 2**30
        near_ends = {end + i for end in ends for i in (-1, 0, 1)}
        for ticket in sorted(near_ends | {rng.randrange(size) for _ in range(100)}):
            if 0 <= ticket < size:
                (tile,) = tiles_of(plan, pe, **columns, start=ticket, stop=ticket + 1)
                assert tile == oracle.tile_at(stages, ticket)
