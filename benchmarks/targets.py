"""What the fused operator must reach, as data, and whether a run reached it."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

from benchmarks import suites
from benchmarks.cases import Group
from benchmarks.comparisons import (
    GrowthOverWork,
    Linearity,
    Measure,
    MemoryOfLayout,
    OverCase,
    ShareOfCeiling,
    Speedup,
)
from benchmarks.results import Results, TargetResult, Verdict

BF16_INSTRUCTIONS = "avx512_bf16"


@dataclasses.dataclass(frozen=True)
class Target:
    """A number to reach.

    Attributes:
        statement: In words.
        sense: Whether the number must be at least or at most `wanted`.
        wanted: The bound.
        measure: Its number.
        machine: On which CPUs it is meant: "any", or those "with" or "without" products of bfloat16
            in AVX-512.
    """

    statement: str
    sense: Literal["at least", "at most"]
    wanted: float
    measure: Measure
    machine: Literal["any", "with bf16", "without bf16"] = "any"

    def evaluate(self, results: Results) -> TargetResult:
        """Whether the run reached it."""
        has_bf16 = BF16_INSTRUCTIONS in results.machine.features
        meant = self.machine == "any" or has_bf16 == (self.machine == "with bf16")
        found = self.measure.of(results) if meant else None
        missing = "not in this run" if meant else f"meant for CPUs {self.machine} products"
        verdict: Verdict = "-"
        if found is not None:
            enough = found.value >= self.wanted
            exact = found.value == self.wanted
            verdict = "met" if enough == (self.sense == "at least") or exact else "MISSED"
        return TargetResult(
            statement=self.statement,
            wanted=self.wanted,
            sense=self.sense,
            measured=None if found is None else found.value,
            low=None if found is None else found.low,
            high=None if found is None else found.high,
            detail=missing if found is None else found.detail,
            verdict=verdict,
        )


_AGAINST_CAPACITY = (("fused-capacity", suites.XLA_CAPACITY),)
_AGAINST_DROPLESS = (("fused", suites.XLA_DROPLESS),)
_FEW_TOKENS = tuple(
    (group.name, group.cases[0]) for group in suites.few_tokens(*suites.FEW_TOKENS_PER_PE)
)
_MANY_TOKENS = suites.tokens(*suites.MANY_TOKENS)
_ONE_PE = suites.one_pe()
_EXPERTS = suites.experts()
_ROUTING = suites.routing()


def _of_directions(forward: float, forward_backward: float) -> Iterable[tuple[Group, float]]:
    """The groups of both directions in float32, with a bound for each."""
    return zip(suites.float32(), (forward, forward_backward), strict=True)


def _of_bf16(group: Group) -> Iterable[Target]:
    case, own = group.cases
    yield Target(
        f"{group.name}: over the best XLA path with a capacity, in bfloat16",
        "at least",
        1.5,
        Speedup(((group.name, case),), _AGAINST_CAPACITY),
        "with bf16",
    )
    yield Target(
        f"{group.name}: over our own float32",
        "at least",
        1.5,
        OverCase(group.name, own, case, suites.FUSED, "smallest"),
        "with bf16",
    )
    yield Target(
        f"{group.name}: time over that of our own float32",
        "at most",
        1.2,
        OverCase(group.name, case, own, suites.FUSED, "largest"),
        "without bf16",
    )


TARGETS: Sequence[Target] = (
    *(
        Target(
            f"{group.name}: over the best XLA path with a capacity",
            "at least",
            wanted,
            Speedup(((group.name, group.cases[0]),), _AGAINST_CAPACITY),
        )
        for group, wanted in _of_directions(1.7, 1.5)
    ),
    Target(
        "forward: over the best dropless path",
        "at least",
        15.0,
        Speedup((("forward", suites.reference()),), _AGAINST_DROPLESS),
    ),
    *(
        Target(
            f"{group.name}: share of the ceiling",
            "at least",
            wanted,
            ShareOfCeiling(group.name, group.cases[0]),
        )
        for group, wanted in _of_directions(0.75, 0.65)
    ),
    *(target for group in suites.sixteen_bits("bfloat16") for target in _of_bf16(group)),
    *(
        Target(
            f"one PE, {case.direction}: share of the ceiling",
            "at least",
            0.8,
            ShareOfCeiling(_ONE_PE.name, case),
        )
        for case in _ONE_PE.cases
    ),
    *(
        Target(
            f"{case.load} routing: growth of the time over that of the work of {whose}",
            "at most",
            1.15,
            GrowthOverWork(_ROUTING.name, _ROUTING.cases[0], case, count_cores),
        )
        for case in _ROUTING.cases[1:]
        for whose, count_cores in (("the busiest PE", False), ("the busiest PE or core", True))
    ),
    Target(
        "1 to 16 tokens per PE: over the best XLA path of the same kind",
        "at least",
        1.0,
        Speedup(_FEW_TOKENS, (*_AGAINST_CAPACITY, ("fused", ("xla", "ragged-dot")))),
    ),
    *(
        Target(
            f"{_MANY_TOKENS.name}, {opponent}: change of the time for a token",
            "at most",
            0.1,
            Linearity(_MANY_TOKENS.name, _MANY_TOKENS.cases, opponent),
        )
        for opponent in suites.FUSED
    ),
    Target(
        f"{_MANY_TOKENS.name}: peak memory over that of the layout",
        "at most",
        1.1,
        MemoryOfLayout(_MANY_TOKENS.name, _MANY_TOKENS.cases),
    ),
    *(
        Target(
            f"{case.shape.num_experts} experts: time over that of 32",
            "at most",
            1.25,
            OverCase(_EXPERTS.name, case, _EXPERTS.cases[0], suites.FUSED, "largest"),
        )
        for case in _EXPERTS.cases[1:]
    ),
)


def evaluate(results: Results) -> tuple[TargetResult, ...]:
    """All targets, whether measured or not."""
    return tuple(target.evaluate(results) for target in TARGETS)
