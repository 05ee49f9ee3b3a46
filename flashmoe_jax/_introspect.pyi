import enum
from typing import Final

import numpy as np
from numpy.typing import NDArray

NO_CAPACITY: Final[int]
SECTION_ALIGNMENT: Final[int]

class Counted(enum.Enum):
    NOT_YET = 0
    HERE = 1
    OTHER_CALL = 2

class TileKind(enum.IntEnum):
    FIRST = 0
    SECOND = 1
    WEIGHTS = 2

class Shape:
    def __init__(
        self,
        *,
        num_pes: int,
        tokens: int,
        hidden: int,
        intermediate: int,
        num_experts: int,
        experts_per_token: int,
        capacity: int,
        max_rows: int,
        block_rows: int,
        block_tokens: int,
        block_columns: int,
    ) -> None: ...
    @property
    def slots(self) -> int: ...
    @property
    def recv_rows(self) -> int: ...
    @property
    def row_blocks(self) -> int: ...
    @property
    def token_blocks(self) -> int: ...
    @property
    def intermediate_tiles(self) -> int: ...
    @property
    def hidden_tiles(self) -> int: ...

class Plan:
    def __init__(self, shape: Shape, counts: NDArray[np.int32]) -> None: ...
    @property
    def cap(self) -> int: ...
    @property
    def experts(self) -> NDArray[np.void]: ...
    @property
    def sources(self) -> NDArray[np.void]: ...
    @property
    def row_blocks(self) -> NDArray[np.void]: ...
    def num_tiles(
        self, pe: int, *, first_columns: int, second_columns: int, weight_tiles: int
    ) -> int: ...
    def tiles(
        self,
        pe: int,
        *,
        first_columns: int,
        second_columns: int,
        weight_tiles: int,
        lag: int,
        start: int,
        stop: int,
    ) -> NDArray[np.void]: ...

def heap_layout(
    shape: Shape, *, element_bytes: int, backward: bool, resend_rows: bool
) -> NDArray[np.void]: ...
def dispatch_order(shape: Shape) -> NDArray[np.void]: ...
def parity(epoch: int) -> int: ...
def counted_word(tag: int, epoch: int) -> int: ...
def epoch_of(word: int) -> int: ...
def tag_of(word: int) -> int: ...
def judge_counted(seen: int, tag: int, epoch: int) -> Counted: ...
