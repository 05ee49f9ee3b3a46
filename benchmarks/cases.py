"""What is measured: a layer, a batch, and who competes."""

import dataclasses
import math
from typing import Literal

from benchmarks.shapes import Shape

Dtype = Literal["float32", "bfloat16", "float16"]
Direction = Literal["forward", "forward+backward"]
Load = Literal["uniform", "zipf", "hot"]
Semantics = Literal["dropless", "capacity", "capacity per source"]

ELEMENT_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One computation that several opponents do.

    Attributes:
        shape: The layer.
        tokens: N, of all PEs together; divisible by the PEs.
        num_pes: P.
        dtype: Of tokens, expert parameters, and results.
        direction: The layer alone, or with the gradients of its tokens and of all its parameters.
        load: How the rows spread over the experts: "uniform" (at random), "zipf" (the logits of
            expert i are lower by log(i + 1), so that PE 0 has the most work), or "hot" (nearly
            every token chooses expert 0).
        capacity_factor: Of the opponents that have a capacity.
        opponents: Names in `opponents.OPPONENTS`.
    """

    shape: Shape
    tokens: int
    num_pes: int
    dtype: Dtype
    direction: Direction
    load: Load = "uniform"
    capacity_factor: float = 1.25
    opponents: tuple[str, ...]

    @property
    def name(self) -> str:
        """Unique within a group."""
        sizes = f"{self.shape.name} E{self.shape.num_experts} T{self.tokens} P{self.num_pes}"
        return f"{sizes} {self.dtype} {self.direction} {self.load}"

    @property
    def backward(self) -> bool:
        """Whether gradients are computed."""
        return self.direction == "forward+backward"

    @property
    def rows(self) -> int:
        """N * K, routed rows."""
        return self.tokens * self.shape.experts_per_token

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of H elements."""
        return self.shape.hidden * ELEMENT_BYTES[self.dtype]

    def capacity(self, semantics: Semantics) -> int | None:
        """Rows that an expert keeps: of all tokens, or of those of each PE; None: dropless."""
        if semantics == "dropless":
            return None
        sources = self.num_pes if semantics == "capacity per source" else 1
        mean_rows = self.rows / sources / self.shape.num_experts
        return max(1, math.ceil(self.capacity_factor * mean_rows))

    def useful_flops(self, kept_rows: int) -> int:
        """Floating-point operations that the kept rows need; padding is not useful.

        A row passes `matrices` products of 2 H D operations. Backward has two products for each of
        forward: the gradients of its row and of its matrix.
        """
        forward = 2 * kept_rows * self.shape.hidden * self.shape.intermediate * self.shape.matrices
        return 3 * forward if self.backward else forward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Cases whose repetitions are interleaved, so that they may be compared with each other.

    Attributes:
        name: Unique in a suite.
        cases: They.
        ceiling: Interleave large matrix products: what the machine can do.
        floor: Interleave calls that do nothing but what every call has to do.
        timeline: Keep the tasks of one dropless call of the operator, to draw them.
    """

    name: str
    cases: tuple[Case, ...]
    ceiling: bool = True
    floor: bool = False
    timeline: bool = False
