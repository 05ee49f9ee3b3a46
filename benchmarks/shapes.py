"""Sizes of one layer: those of real models, at any width, and the reference."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a layer.

    Attributes:
        name: Whose sizes they are.
        hidden: H, width of a token.
        intermediate: D, width inside an expert.
        num_experts: E.
        experts_per_token: K.
        gated: Three matrices for each expert instead of two.
    """

    name: str
    hidden: int
    intermediate: int
    num_experts: int
    experts_per_token: int
    gated: bool = True

    @property
    def matrices(self) -> int:
        """Products for each row, each with a matrix of H * D elements."""
        return 3 if self.gated else 2

    @property
    def parameters(self) -> int:
        """Parameters of all experts."""
        return self.num_experts * self.matrices * self.hidden * self.intermediate

    def narrowed(self, divisor: int) -> "Shape":
        """The same layer with H and D divided by `divisor`, and as many experts.

        Raises:
            ValueError: A width does not divide.
        """
        if self.hidden % divisor or self.intermediate % divisor:
            raise ValueError(f"the widths of {self} do not divide by {divisor}")
        if divisor == 1:
            return self
        return dataclasses.replace(
            self,
            name=f"{self.name}@1/{divisor}",
            hidden=self.hidden // divisor,
            intermediate=self.intermediate // divisor,
        )


REFERENCE = Shape(
    name="reference", hidden=512, intermediate=1024, num_experts=32, experts_per_token=2
)

# From the configuration that each model was published with.
MODELS = (
    Shape(
        name="mixtral-8x7b",
        hidden=4096,
        intermediate=14336,
        num_experts=8,
        experts_per_token=2,
    ),
    Shape(
        name="qwen3-30b-a3b",
        hidden=2048,
        intermediate=768,
        num_experts=128,
        experts_per_token=8,
    ),
    Shape(
        name="deepseek-v3",
        hidden=7168,
        intermediate=2048,
        num_experts=256,
        experts_per_token=8,
    ),
    Shape(
        name="olmoe",
        hidden=2048,
        intermediate=1024,
        num_experts=64,
        experts_per_token=8,
    ),
    Shape(
        name="llama-4-scout",
        hidden=5120,
        intermediate=8192,
        num_experts=16,
        experts_per_token=1,
    ),
)

WIDTH_DIVISORS = (16, 8, 4, 1)
