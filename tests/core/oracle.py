"""What the protocol prescribes, written row by row from its description and not from the C++.

Nothing here is clever: rows are walked one at a time in global token order, the cap is found by
trying every one, and the order of the tiles is the list of its stages. The functions that take
count matrices do the same arithmetic in 64 bits, for sizes too large to walk.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Row(NamedTuple):
    """A (token, k-slot) pair that chose an expert. Sorting rows gives the global token order."""

    pe: int
    token: int
    slot: int
    expert: int


def rows_in_global_order(indices: NDArray[np.int32]) -> list[Row]:
    """Lists the rows of a routing [P, T, K], masked slots (-1) left out: PE, then token, slot."""
    pes, tokens, slots = indices.shape
    return [
        Row(pe, token, slot, int(indices[pe, token, slot]))
        for pe in range(pes)
        for token in range(tokens)
        for slot in range(slots)
        if indices[pe, token, slot] != -1
    ]


def count_matrix(rows: Sequence[Row], num_pes: int, num_experts: int) -> NDArray[np.int32]:
    """Counts the rows of each source for each expert: [P, E]."""
    counts = np.zeros((num_pes, num_experts), np.int32)
    for row in rows:
        counts[row.pe, row.expert] += 1
    return counts


def received(wanted: NDArray[np.int64], cap: int, num_pes: int) -> NDArray[np.int64]:
    """Rows that each PE receives when every expert keeps at most `cap` of its `wanted` [E]."""
    return np.minimum(wanted, cap).reshape(num_pes, -1).sum(axis=1)


def row_cap(wanted: NDArray[np.int64], num_pes: int, capacity: int | None, max_rows: int) -> int:
    """The largest equal cap per expert that no PE receives too much with, by trying them all.

    No cap above the capacity or above what the largest expert wants is of interest.
    """
    high = int(wanted.max(initial=0))
    if capacity is not None:
        high = min(high, capacity)
    return max(c for c in range(high + 1) if (received(wanted, c, num_pes) <= max_rows).all())


def keep(rows: Sequence[Row], cap: int) -> list[Row]:
    """The rows that are not dropped: the first `cap` of each expert."""
    kept, seen = [], dict[int, int]()
    for row in rows:
        seen[row.expert] = seen.get(row.expert, 0) + 1
        if seen[row.expert] <= cap:
            kept.append(row)
    return kept


def places(
    kept: Sequence[Row], num_pes: int, num_experts: int, block_rows: int
) -> dict[Row, tuple[int, int]]:
    """Where each kept row goes: (owner, row of its receive buffer).

    A PE's buffer has the rows of its first expert, then those of the second, and so on, each expert
    starting on a row block of its own.
    """
    local = num_experts // num_pes
    place = {}
    for pe in range(num_pes):
        next_row = 0
        for expert in range(pe * local, (pe + 1) * local):
            while next_row % block_rows:
                next_row += 1
            for row in kept:
                if row.expert == expert:
                    place[row] = (pe, next_row)
                    next_row += 1
    return place


class CountPlan(NamedTuple):
    """The plan of a count matrix, in 64 bits."""

    start: NDArray[np.int64]  # [P, E]
    kept_of_source: NDArray[np.int64]  # [P, E]
    kept: NDArray[np.int64]  # [E]
    first_row: NDArray[np.int64]  # [E]
    blocks: NDArray[np.int64]  # [E]


def plan_counts(counts: NDArray[np.integer], cap: int, block_rows: int) -> CountPlan:
    """Plans a count matrix [P, E], given the cap."""
    num_pes = counts.shape[0]
    wide = counts.astype(np.int64)
    stop = wide.cumsum(axis=0)
    start = stop - wide
    kept_of_source = np.minimum(stop, cap) - np.minimum(start, cap)
    kept = kept_of_source.sum(axis=0)
    blocks = -(-kept // block_rows)
    of_pe = blocks.reshape(num_pes, -1)
    first_row = (of_pe.cumsum(axis=1) - of_pe).reshape(-1) * block_rows
    return CountPlan(start, kept_of_source, kept, first_row, blocks)


class Section(NamedTuple):
    """A part of the symmetric heap."""

    name: str
    length: int  # elements
    stride: int  # bytes of one element


def heap_sections(
    *,
    num_pes: int,
    num_experts: int,
    recv_rows: int,
    block_rows: int,
    tokens: int,
    experts_per_token: int,
    block_tokens: int,
    row_bytes: int,
    backward: bool,
    resend_rows: bool,
) -> list[Section]:
    """The sections of the heap, in the order in which the protocol lists them."""
    token_blocks = len(range(0, tokens, block_tokens))
    slots = tokens * experts_per_token
    return [
        Section("counts", 2 * num_pes * num_experts, 4),
        Section("counted", 2 * num_pes, 8),
        Section("recv", recv_rows, row_bytes),
        Section("recv_x", recv_rows if resend_rows else 0, row_bytes),
        Section("origin", recv_rows, 8),
        Section("weight", recv_rows if backward else 0, 4),
        Section("arrived", recv_rows // block_rows, 8),
        Section("returned", slots, row_bytes),
        Section("returned_weight", slots if backward else 0, 4),
        Section("came_back", token_blocks, 8),
    ]


FIRST, SECOND, WEIGHTS = "FIRST", "SECOND", "WEIGHTS"


class Tile(NamedTuple):
    """A tile of a PE. `expert` is a global index; `block` is -1 for weight gradients."""

    kind: str
    expert: int
    block: int
    column: int


class Stage(NamedTuple):
    """Consecutive tiles of one kind and expert: all blocks of column 0, then of column 1, ..."""

    kind: str
    expert: int
    first_block: int
    blocks: int
    columns: int

    def size(self) -> int:
        return self.blocks * self.columns

    def tile(self, i: int) -> Tile:
        block = -1 if self.kind == WEIGHTS else self.first_block + i % self.blocks
        return Tile(self.kind, self.expert, block, i // self.blocks)


def tile_stages(
    experts: Sequence[tuple[int, int, int]],
    first_columns: int,
    second_columns: int,
    weight_tiles: int,
    lag: int = 1,
) -> list[Stage]:
    """The stages of a PE whose experts are (global index, first block, blocks), in ticket order.

    With a lag of 1: first(0) first(1) second(0) first(2) second(1) ... first(n-1) second(n-2)
    second(n-1), where a second stage ends with the expert's weight gradients.
    """

    def first(expert: tuple[int, int, int]) -> list[Stage]:
        return [Stage(FIRST, *expert, first_columns)]

    def second(expert: tuple[int, int, int]) -> list[Stage]:
        return [
            Stage(SECOND, *expert, second_columns),
            Stage(WEIGHTS, expert[0], -1, 1, weight_tiles),
        ]

    stages: list[Stage] = []
    for after, before in itertools.zip_longest(experts, [None] * lag + list(experts)):
        stages += first(after) if after else []
        stages += second(before) if before else []
    return stages


def all_tiles(stages: Sequence[Stage]) -> Iterator[Tile]:
    """Every tile, in ticket order."""
    for stage in stages:
        for i in range(stage.size()):
            yield stage.tile(i)


def tile_at(stages: Sequence[Stage], ticket: int) -> Tile:
    """The tile of one ticket, without listing those before it."""
    for stage in stages:
        if ticket < stage.size():
            return stage.tile(ticket)
        ticket -= stage.size()
    raise IndexError(ticket)


def dispatch_order(me: int, num_pes: int, num_experts: int) -> list[tuple[int, int]]:
    """(PE, expert) of every step of PE `me`: local expert 0 of every PE first, own PE first."""
    local = num_experts // num_pes
    pes = [*range(me, num_pes), *range(me)]
    return [(pe, pe * local + i) for i in range(local) for pe in pes]
