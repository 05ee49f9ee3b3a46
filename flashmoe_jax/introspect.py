"""What the core of the protocol computes, as NumPy structured arrays.

For tests, debugging and tools: which row goes where (`plan`), where everything lies in the
symmetric heap (`heap_layout`), in which order tiles are handed out (`tile_order`) and rows are sent
(`dispatch_order`), and how PEs tell one epoch from the next (`parity`, `counted_word`,
`judge_counted`). All of it runs the C++ that the engine runs (kernels/core), on any machine.

Sizes: P PEs, T tokens of one PE, H hidden, D intermediate, E experts, K experts per token, R rows
of the receive buffer, El = E / P.
"""

import dataclasses
import functools
import numbers
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

try:
    from flashmoe_jax import _introspect
except ImportError as error:
    raise ImportError(
        f"flashmoe_jax.introspect needs the extension module flashmoe_jax._introspect ({error}); "
        "wheels do not contain it: install from a source checkout with `pip install -e .`"
    ) from error

Counted = _introspect.Counted
TileKind = _introspect.TileKind

SECTION_ALIGNMENT: Final = _introspect.SECTION_ALIGNMENT
"""Every section of the heap starts at a multiple of this, in bytes."""

_INT32_MAX: Final = 2**31 - 1
_UINT32_MAX: Final = 2**32 - 1
_UINT64_MAX: Final = 2**64 - 1
# Bounds that keep products of sizes inside 64 bits.
_MAX_HEAP_BYTES: Final = 2**62
_MAX_TILES: Final = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of one call of the operator, equal on every PE of an expert group.

    Attributes:
        num_pes: P.
        tokens: T, of one PE; may be 0.
        hidden: H.
        intermediate: D.
        num_experts: E, of all PEs; divisible by P.
        experts_per_token: K, at most E.
        max_rows: Rows that one PE accepts, not counting the alignment to row blocks.
        block_rows: Rows of one row block.
        block_tokens: Tokens of one combine block.
        block_columns: Output columns of one tile.
        capacity: Rows that one expert keeps, or None for dropless.

    Raises:
        ValueError: A size is out of its range, or a product of sizes (P*E, P*T*K or R) does not fit
            the 32-bit integers that the core counts rows with.
    """

    num_pes: int
    tokens: int
    hidden: int
    intermediate: int
    num_experts: int
    experts_per_token: int
    max_rows: int
    block_rows: int
    block_tokens: int
    block_columns: int
    capacity: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "max_rows"):
            _require_int(name, getattr(self, name), 0, _INT32_MAX)
        for name in (
            "num_pes",
            "hidden",
            "intermediate",
            "num_experts",
            "experts_per_token",
            "block_rows",
            "block_tokens",
            "block_columns",
        ):
            _require_int(name, getattr(self, name), 1, _INT32_MAX)
        if self.capacity is not None:
            _require_int("capacity", self.capacity, 1, 2**63 - 1)
        if self.num_experts % self.num_pes:
            raise ValueError(
                f"num_experts={self.num_experts} does not divide by num_pes={self.num_pes}; every "
                "PE owns the same number of experts"
            )
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than num_experts="
                f"{self.num_experts}"
            )
        for name, value in (
            ("num_pes * num_experts", self.num_pes * self.num_experts),
            ("num_pes * tokens * experts_per_token", self.num_pes * self.slots),
            ("the receive buffer, in rows,", self.recv_rows),
        ):
            if value > _INT32_MAX:
                raise ValueError(
                    f"{name} is {value}, more than {_INT32_MAX}, with {self}; rows are counted in "
                    "32-bit integers: use fewer tokens per call or a smaller max_rows"
                )

    @functools.cached_property
    def _core(self) -> _introspect.Shape:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.capacity is None:
            fields["capacity"] = _introspect.NO_CAPACITY
        return _introspect.Shape(**fields)

    @property
    def local_experts(self) -> int:
        """El, experts that one PE owns."""
        return self.num_experts // self.num_pes

    @property
    def slots(self) -> int:
        """T * K, pairs of a token of one PE and one of its choices."""
        return self._core.slots

    @property
    def recv_rows(self) -> int:
        """R, rows of the receive buffer of one PE: a multiple of `block_rows`."""
        return self._core.recv_rows

    @property
    def row_blocks(self) -> int:
        """R / block_rows."""
        return self._core.row_blocks

    @property
    def token_blocks(self) -> int:
        """Combine blocks of one PE's tokens; the last one may be smaller than the others."""
        return self._core.token_blocks

    @property
    def intermediate_tiles(self) -> int:
        """Column tiles of a product whose result is D wide."""
        return self._core.intermediate_tiles

    @property
    def hidden_tiles(self) -> int:
        """Column tiles of a product whose result is H wide."""
        return self._core.hidden_tiles


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Where every row of an epoch goes. Every PE computes the same one.

    Attributes:
        shape: The sizes it was made for.
        counts: int32 [P, E]. Rows that each source wants to send to each expert.
        cap: Rows that any expert keeps at most: the capacity, or less where a PE would receive
            more than `max_rows`, and never more than the largest expert was sent.
        experts: [E] of (pe, kept, first_row, first_block, blocks), int32: the owner, rows kept of
            all sources together, and where they lie in the owner's receive buffer.
        sources: [P, E] of (start, kept, place), int32: rows of the expert that come from lower PEs,
            rows of this source that are kept (its first ones), and the row of the owner's receive
            buffer where the first of them goes.
        row_blocks: [row blocks in use] of (pe, block, expert, rows), int32: `rows` is what the
            `arrived` signal of row block `block` on PE `pe` must reach.
    """

    shape: Shape
    counts: NDArray[np.int32]
    cap: int
    experts: NDArray[np.void]
    sources: NDArray[np.void]
    row_blocks: NDArray[np.void]
    _core: _introspect.Plan = dataclasses.field(repr=False)


def plan(
    counts: ArrayLike,
    *,
    tokens: int,
    hidden: int,
    intermediate: int,
    experts_per_token: int,
    capacity: int | None = None,
    max_rows: int,
    block_rows: int,
    block_tokens: int,
    block_columns: int,
) -> Plan:
    """Plans an epoch from its count matrix.

    Args:
        counts: Integers [P, E]. Rows that each source wants to send to each expert; at most T * K
            of one source.
        tokens: T, of one PE.
        hidden: H.
        intermediate: D.
        experts_per_token: K.
        capacity: Rows that one expert keeps, or None.
        max_rows: Rows that one PE accepts.
        block_rows: Rows of one row block.
        block_tokens: Tokens of one combine block.
        block_columns: Output columns of one tile.

    Returns:
        The plan.

    Raises:
        ValueError: `counts` is not such a matrix, or the sizes do not make a `Shape`.
    """
    matrix = np.asarray(counts)
    if matrix.ndim != 2 or matrix.size == 0 or not np.issubdtype(matrix.dtype, np.integer):
        raise ValueError(
            f"counts has shape {matrix.shape} and dtype {matrix.dtype}; it must be integers "
            "[P, E], rows of each source PE for each expert"
        )
    shape = Shape(
        num_pes=matrix.shape[0],
        tokens=tokens,
        hidden=hidden,
        intermediate=intermediate,
        num_experts=matrix.shape[1],
        experts_per_token=experts_per_token,
        max_rows=max_rows,
        block_rows=block_rows,
        block_tokens=block_tokens,
        block_columns=block_columns,
        capacity=capacity,
    )
    # One by one before the sum, which could overflow with them.
    bad = np.argwhere((matrix < 0) | (matrix > shape.slots))
    if bad.size:
        pe, expert = bad[0]
        raise ValueError(
            f"counts[{pe}, {expert}] is {matrix[pe, expert]}; it must be in 0..{shape.slots} "
            "(tokens * experts_per_token)"
        )
    sent = matrix.sum(axis=1, dtype=np.int64)
    if (sent > shape.slots).any():
        pe = int(sent.argmax())
        raise ValueError(
            f"counts[{pe}] sums to {sent[pe]} rows; one PE sends at most {shape.slots} "
            "(tokens * experts_per_token)"
        )
    matrix = matrix.astype(np.int32)
    core = _introspect.Plan(shape._core, matrix)
    return Plan(shape, matrix, core.cap, core.experts, core.sources, core.row_blocks, core)


def heap_layout(
    shape: Shape, *, element_bytes: int, backward: bool = False, resend_rows: bool = False
) -> NDArray[np.void]:
    """Where everything lies in the symmetric heap of a PE.

    Args:
        shape: The sizes of the call.
        element_bytes: Bytes of one element of a row: 1, 2, 4 or 8.
        backward: Gradients of the outputs travel, with the weights of their slots.
        resend_rows: Backward only: the rows of x travel again.

    Returns:
        A structured array [] with one field (offset, count, stride) for each section and `bytes`,
        all int64: the section has `count` elements of `stride` bytes from byte `offset`.

    Raises:
        ValueError: `element_bytes` is none of these, rows are sent again in a forward pass, or the
            heap is too large for 64-bit offsets.
    """
    if element_bytes not in (1, 2, 4, 8):
        raise ValueError(f"element_bytes={element_bytes!r} must be 1, 2, 4 or 8")
    if resend_rows and not backward:
        raise ValueError("resend_rows=True needs backward=True: a forward pass sends its rows once")
    rows = 2 * shape.recv_rows + shape.slots
    if rows * shape.hidden * element_bytes > _MAX_HEAP_BYTES:
        raise ValueError(
            f"{rows} rows of hidden={shape.hidden} elements of {element_bytes} bytes are more than "
            f"{_MAX_HEAP_BYTES} bytes; use fewer tokens per call or a smaller max_rows"
        )
    return _introspect.heap_layout(
        shape._core, element_bytes=element_bytes, backward=backward, resend_rows=resend_rows
    )


def num_tiles(
    plan: Plan, pe: int, *, first_columns: int, second_columns: int, weight_tiles: int = 0
) -> int:
    """Counts the tiles of a PE: the length of its whole `tile_order`.

    Args:
        plan: The plan of the epoch.
        pe: The PE whose tiles are counted, 0 <= pe < P.
        first_columns: First-stage tiles of a row block.
        second_columns: Second-stage tiles of a row block.
        weight_tiles: Weight-gradient tiles of an expert; 0 in a forward pass.

    Raises:
        ValueError: An argument is out of its range.
    """
    _require_int("pe", pe, 0, plan.shape.num_pes - 1)
    _require_int("first_columns", first_columns, 1, _MAX_TILES)
    _require_int("second_columns", second_columns, 1, _MAX_TILES)
    _require_int("weight_tiles", weight_tiles, 0, _MAX_TILES)
    return plan._core.num_tiles(
        pe, first_columns=first_columns, second_columns=second_columns, weight_tiles=weight_tiles
    )


def tile_order(
    plan: Plan,
    pe: int,
    *,
    first_columns: int,
    second_columns: int,
    weight_tiles: int = 0,
    lag: int = 1,
    start: int = 0,
    stop: int | None = None,
) -> NDArray[np.void]:
    """Lists the tiles of a PE in the order in which its ticket counter hands them out.

    Args:
        plan: The plan of the epoch.
        pe: The PE whose tiles are listed, 0 <= pe < P.
        first_columns: First-stage tiles of a row block.
        second_columns: Second-stage tiles of a row block.
        weight_tiles: Weight-gradient tiles of an expert; 0 in a forward pass.
        lag: An expert's second stage comes after the first stage of the expert that is so many
            further on.
        start: First ticket.
        stop: One past the last ticket; None: the number of tiles.

    Returns:
        [stop - start] of (kind, expert, block, column), int32. `kind` is a `TileKind`; `block` is a
        row block of the PE's receive buffer, or -1 for weight gradients.

    Raises:
        ValueError: An argument is out of its range.
    """
    columns = {
        "first_columns": first_columns,
        "second_columns": second_columns,
        "weight_tiles": weight_tiles,
    }
    size = num_tiles(plan, pe, **columns)
    _require_int("lag", lag, 1, _MAX_TILES)
    _require_int("start", start, 0, size)
    stop = size if stop is None else stop
    _require_int("stop", stop, start, size)
    return plan._core.tiles(pe, **columns, lag=lag, start=start, stop=stop)


def dispatch_order(shape: Shape) -> NDArray[np.void]:
    """Lists to whom every PE sends, step by step.

    Args:
        shape: The sizes of the call; only P and E matter.

    Returns:
        [P, E] of (pe, expert), int32: what PE p sends in step i goes to `expert` of `pe`.
    """
    return _introspect.dispatch_order(shape._core)


def parity(epoch: int) -> int:
    """Returns which of the two count matrices an epoch uses, 0 or 1.

    Args:
        epoch: The epoch, 0 <= epoch < 2**32. The first one of a heap is 1; the last is followed by
            0 again.

    Raises:
        ValueError: The epoch is out of its range.
    """
    _require_int("epoch", epoch, 0, _UINT32_MAX)
    return _introspect.parity(epoch)


def counted_word(tag: int, epoch: int) -> int:
    """Returns the word that tells a peer which counts have arrived.

    Args:
        tag: Tag of the call site, 0 <= tag < 2**32.
        epoch: The epoch, as in `parity`.

    Raises:
        ValueError: An argument is out of its range.
    """
    _require_int("tag", tag, 0, _UINT32_MAX)
    _require_int("epoch", epoch, 0, _UINT32_MAX)
    return _introspect.counted_word(tag, epoch)


def epoch_of(word: int) -> int:
    """Returns the epoch of a `counted_word`.

    Raises:
        ValueError: The word is not in 0 <= word < 2**64.
    """
    _require_int("word", word, 0, _UINT64_MAX)
    return _introspect.epoch_of(word)


def tag_of(word: int) -> int:
    """Returns the call-site tag of a `counted_word`.

    Raises:
        ValueError: The word is not in 0 <= word < 2**64.
    """
    _require_int("word", word, 0, _UINT64_MAX)
    return _introspect.tag_of(word)


def judge_counted(seen: int, *, tag: int, epoch: int) -> _introspect.Counted:
    """Judges what a PE sees in `counted` of a peer while it waits for the peer's counts.

    Args:
        seen: The word seen, 0 in a new heap.
        tag: Tag of the waiter's call site.
        epoch: The waiter's epoch.

    Returns:
        `Counted.HERE`, `NOT_YET`, or `OTHER_CALL` if the peer is in another call of the program.

    Raises:
        ValueError: An argument is out of its range.
    """
    _require_int("seen", seen, 0, _UINT64_MAX)
    _require_int("tag", tag, 0, _UINT32_MAX)
    _require_int("epoch", epoch, 0, _UINT32_MAX)
    return _introspect.judge_counted(seen, tag, epoch)


def _require_int(name: str, value: object, low: int, high: int) -> None:
    is_int = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_int or not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} must be an int in {low}..{high}")
