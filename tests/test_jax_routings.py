"""The kernel's gate chooses as JAX does: a table of what `route` answers, which the emulator reads.

`python tests/test_jax_routings.py` writes the table, tests/emulator/jax_routings.h, anew. The test
here shows that JAX still answers so; the gate's cases in the emulator, that the kernel does.
"""

import dataclasses
import re
import textwrap
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

import flashmoe_jax as fm

TABLE = Path(__file__).parent / "emulator" / "jax_routings.h"
# T = H, so that tokens that are rows of the identity have the router's rows as logits.
TOKENS, EXPERTS, K = 16, 16, 4
# Logits are whole multiples of this: few enough bits for products and sums to be exact.
STEP = 1 / 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router:
    """A router of the table; the fields are those of `RouterConfig`."""

    score: Literal["softmax", "sigmoid"]
    renormalize: bool
    scaling_factor: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    selection_bias: bool = False

    @property
    def config(self) -> fm.MoEConfig:
        return fm.MoEConfig(
            num_experts=EXPERTS,
            experts_per_token=K,
            hidden_size=TOKENS,
            intermediate_size=8,
            router=fm.RouterConfig(**dataclasses.asdict(self)),
        )


ROUTERS = (
    Router(score="softmax", renormalize=True),
    Router(score="softmax", renormalize=False, scaling_factor=0.5, selection_bias=True),
    Router(score="sigmoid", renormalize=True, scaling_factor=2.5, num_groups=4, groups_per_token=2),
    Router(
        score="sigmoid", renormalize=False, num_groups=8, groups_per_token=3, selection_bias=True
    ),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """Inputs of a router, in steps, and what it answers."""

    logits: NDArray[np.int32]  # [T, E]
    bias: NDArray[np.int32]  # [E], or [0]
    indices: NDArray[np.int32]  # [T, K]
    weights: NDArray[np.float32]  # [T, K]


def inputs(number: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Logits and biases for a router; every other token has many equal logits."""
    random = np.random.default_rng(number)
    logits = random.integers(-1000, 1000, (TOKENS, EXPERTS), np.int32)
    logits[::2] = logits[::2] // 250 * 250
    bias = random.integers(-64, 64, EXPERTS, np.int32)
    return logits, bias if ROUTERS[number].selection_bias else bias[:0]


def answer(router: Router, logits: NDArray[np.int32], bias: NDArray[np.int32]) -> Row:
    nothing = jnp.zeros((EXPERTS, 0, 0))
    params = fm.MoEParams(
        router=jnp.asarray(logits * STEP, jnp.float32),
        selection_bias=jnp.asarray(bias * STEP, jnp.float32) if bias.size else None,
        gate=nothing,
        up=nothing,
        down=nothing,
    )
    routing = fm.route(jnp.eye(TOKENS), params, router.config)
    np.testing.assert_array_equal(routing.logits, logits * STEP)
    return Row(logits, bias, np.asarray(routing.indices), np.asarray(routing.weights))


def text_of(row: Row, router: Router) -> str:
    def block(values: NDArray[np.generic]) -> str:
        words = ", ".join(repr(v.item()) for v in values.ravel())
        return "{\n" + textwrap.indent(textwrap.fill(words, 90), "     ") + "}"

    def word(value: bool) -> str:
        return str(value).lower()

    return (
        f"    {{{word(router.score == 'softmax')}, {word(router.renormalize)}, "
        f"{router.scaling_factor}f, {router.num_groups}, {router.groups_per_token},\n     "
        + ",\n     ".join(map(block, (row.logits, row.bias, row.indices, row.weights)))
        + "},\n"
    )


def write() -> None:
    """Writes the table."""
    rows = [(answer(router, *inputs(i)), router) for i, router in enumerate(ROUTERS)]
    TABLE.write_text(
        "// Written by tests/test_jax_routings.py: what flashmoe_jax.route answers.\n"
        "#pragma once\n\n#include <cstdint>\n#include <vector>\n\n"
        "namespace flashmoe::testing {\n\n"
        "struct JaxRouting {\n"
        "  bool softmax, renormalize;\n"
        "  float scaling_factor;\n"
        "  int groups, groups_per_token;\n"
        "  std::vector<int> logits;       // [T, E], in steps\n"
        "  std::vector<int> bias;         // [E], in steps; may be empty\n"
        "  std::vector<int32_t> indices;  // [T, K]\n"
        "  std::vector<float> weights;    // [T, K]\n"
        "};\n\n"
        f"inline constexpr int kJaxTokens = {TOKENS}, kJaxExperts = {EXPERTS}, kJaxK = {K};\n"
        f"inline constexpr float kJaxStep = {STEP}f;\n\n"
        "// clang-format off\n"
        "inline const std::vector<JaxRouting> kJaxRoutings = {\n"
        + "".join(text_of(row, router) for row, router in rows)
        + "};\n// clang-format on\n\n}  // namespace flashmoe::testing\n"
    )


def table() -> list[list[str]]:
    """The numbers of the table, a list for each router: settings, inputs and answers."""
    body = TABLE.read_text().split("kJaxRoutings = {\n")[1].split("};\n")[0]
    return [re.findall(r"[-\w.+]+", row) for row in body.split("},\n    {")]


@pytest.mark.smoke
@pytest.mark.parametrize("number", range(len(ROUTERS)))
def test_jax_answers_as_the_table_says(number: int) -> None:
    router, row = ROUTERS[number], table()[number]
    expected = answer(router, *inputs(number))
    parts = (expected.logits, expected.bias, expected.indices)
    whole = np.concatenate([part.ravel() for part in parts])
    settings, numbers, weights = row[:5], row[5 : 5 + whole.size], row[5 + whole.size :]
    assert settings == re.findall(r"[-\w.+]+", text_of(expected, router))[:5]
    np.testing.assert_array_equal(np.array(numbers, np.int64), whole)
    # Versions of XLA differ in the last bits of a score.
    np.testing.assert_allclose(np.array(weights, np.float32), expected.weights.ravel(), rtol=1e-6)


def test_the_table_has_ties_and_all_routers() -> None:
    assert len(table()) == len(ROUTERS)
    for number in range(len(ROUTERS)):
        logits, _ = inputs(number)
        assert any(len(set(token)) < EXPERTS for token in logits.tolist())


if __name__ == "__main__":
    write()
