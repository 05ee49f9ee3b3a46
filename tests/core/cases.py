"""Routings and sizes that the property tests of the core draw."""

import dataclasses
import functools

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from flashmoe_jax import introspect

from . import oracle


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A routing of every PE's tokens, and the sizes that a plan needs beside it."""

    indices: NDArray[np.int32]  # [P, T, K]
    num_experts: int
    capacity: int | None
    max_rows: int
    block_rows: int
    block_tokens: int

    @property
    def num_pes(self) -> int:
        return len(self.indices)

    @functools.cached_property
    def rows(self) -> list[oracle.Row]:
        return oracle.rows_in_global_order(self.indices)

    @functools.cached_property
    def counts(self) -> NDArray[np.int32]:
        return oracle.count_matrix(self.rows, self.num_pes, self.num_experts)

    @functools.cached_property
    def cap(self) -> int:
        wanted = self.counts.sum(axis=0, dtype=np.int64)
        return oracle.row_cap(wanted, self.num_pes, self.capacity, self.max_rows)

    def plan(self, counts: NDArray[np.int32] | None = None) -> introspect.Plan:
        """The core's plan of the case's counts, or of another copy of them."""
        return introspect.plan(
            self.counts if counts is None else counts,
            tokens=self.indices.shape[1],
            hidden=8,
            intermediate=8,
            experts_per_token=self.indices.shape[2],
            capacity=self.capacity,
            max_rows=self.max_rows,
            block_rows=self.block_rows,
            block_tokens=self.block_tokens,
            block_columns=4,
        )


@st.composite
def routings(draw: st.DrawFn, tokens: int, num_experts: int, num_pes: int) -> NDArray[np.int32]:
    """Draws [P, T, K]: skewed towards a few experts, with masked slots and masked PEs."""
    slots = draw(st.integers(1, min(3, num_experts)))
    # -1 comes last: the shrinker prefers early elements, and an example without masks is simpler.
    chosen = draw(
        st.lists(st.integers(0, num_experts - 1), min_size=1, max_size=num_experts, unique=True)
    )
    indices = draw(
        hnp.arrays(
            np.int32,
            (num_pes, tokens, slots),
            elements=st.sampled_from([*chosen, -1]),
            fill=st.nothing(),  # draw every slot by itself
        )
    )
    masked = draw(st.lists(st.integers(0, num_pes - 1), unique=True, max_size=num_pes - 1))
    indices[masked] = -1
    return indices


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draws a case of 1 to 8 PEs, dropless or not, with enough room on every PE or not."""
    num_pes = draw(st.sampled_from([1, 2, 3, 4, 8]))
    num_experts = num_pes * draw(st.integers(1, 3))
    indices = draw(routings(draw(st.integers(0, 6)), num_experts, num_pes))
    worst = indices.size
    return Case(
        indices,
        num_experts,
        capacity=draw(st.none() | st.integers(1, 12)),
        max_rows=draw(st.just(worst) | st.integers(0, worst)),
        block_rows=draw(st.sampled_from([1, 2, 3, 4, 8])),
        block_tokens=draw(st.integers(1, 4)),
    )
