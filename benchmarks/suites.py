"""Named sets of cases."""

import dataclasses
import re
from collections.abc import Sequence

from benchmarks.cases import Case, Direction, Dtype, Group, Load
from benchmarks.shapes import MODELS, REFERENCE, WIDTH_DIVISORS, Shape

# The engine keeps as many idle heaps for later calls. A group that alternates between more of them
# would measure how they are made anew, which a program with layers of one size never sees.
IDLE_HEAPS = 8

REFERENCE_TOKENS = 2048
FEW_TOKENS_PER_PE = (1, 2, 4, 8, 16)
MANY_TOKENS = (2048, 8192, 32768)
OTHER_TOKENS = ((256, 512, 1024), (4096, 16384))
EXPERT_COUNTS = (32, 128, 256)
PE_COUNTS = (1, 2, 4, 8)
LOADS: tuple[Load, ...] = ("uniform", "zipf", "hot")
DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")

FUSED = ("fused", "fused-capacity")
XLA_CAPACITY = ("xla-capacity", "xla-capacity-one-device", "xla-all-to-all")
XLA_DROPLESS = ("xla", "ragged-dot", "dense")
TORCH = ("torch-loop", "torch-grouped")
ALL = (*FUSED, *XLA_CAPACITY, *XLA_DROPLESS, *TORCH)
# Whose cost does not grow with the product of experts and rows.
SCALABLE = (*FUSED, *XLA_CAPACITY)
# On one PE, other paths come to one of these.
ONE_PE = (*FUSED, "xla-capacity", "ragged-dot", *TORCH)


def reference(
    direction: Direction = "forward",
    dtype: Dtype = "float32",
    *,
    tokens: int = REFERENCE_TOKENS,
    num_pes: int = 8,
    num_experts: int = REFERENCE.num_experts,
    load: Load = "uniform",
    opponents: tuple[str, ...] = ALL,
) -> Case:
    """The reference layer or a variant of it."""
    return Case(
        shape=dataclasses.replace(REFERENCE, num_experts=num_experts),
        tokens=tokens,
        num_pes=num_pes,
        dtype=dtype,
        direction=direction,
        load=load,
        opponents=opponents,
    )


def sixteen_bits(dtype: Dtype) -> tuple[Group, ...]:
    """The reference in both directions, beside the operator's own float32."""
    return tuple(
        Group(
            name=f"{dtype} {direction}",
            cases=(
                reference(direction, dtype),
                reference(direction, opponents=FUSED if direction == "forward" else FUSED[1:]),
            ),
        )
        for direction in DIRECTIONS
    )


def float32() -> tuple[Group, ...]:
    """The reference in both directions."""
    return tuple(
        Group(name=direction, cases=(reference(direction),), timeline=True)
        for direction in DIRECTIONS
    )


def few_tokens(*per_pe: int) -> tuple[Group, ...]:
    """A few tokens on each of 8 PEs: latency."""
    opponents = (*FUSED, *XLA_CAPACITY, "xla", "ragged-dot", *TORCH)
    return tuple(
        Group(
            name=f"{count} token{'s' if count > 1 else ''} per PE",
            cases=(reference(tokens=8 * count, opponents=opponents),),
            ceiling=False,
            floor=True,
        )
        for count in per_pe
    )


def one_pe(dtype: Dtype = "float32") -> Group:
    """The reference on one PE that has all cores."""
    return Group(
        name=f"one PE {dtype}",
        cases=tuple(
            reference(direction, dtype, num_pes=1, opponents=ONE_PE) for direction in DIRECTIONS
        ),
    )


def routing() -> Group:
    """The reference under even and uneven loads."""
    opponents = (*FUSED, "xla-capacity", "xla")
    return Group(
        name="routing", cases=tuple(reference(load=load, opponents=opponents) for load in LOADS)
    )


def tokens(*counts: int) -> Group:
    """The reference with other numbers of tokens."""
    return Group(
        name=f"{counts[0]} to {counts[-1]} tokens",
        cases=tuple(reference(tokens=count, opponents=SCALABLE) for count in counts),
    )


def experts() -> Group:
    """The reference with more experts and as many rows."""
    return Group(
        name="experts",
        cases=tuple(reference(num_experts=count, opponents=SCALABLE) for count in EXPERT_COUNTS),
    )


def pes() -> Group:
    """The reference on fewer PEs."""
    return Group(
        name="PEs",
        cases=tuple(reference(num_pes=count, opponents=SCALABLE) for count in PE_COUNTS),
        ceiling=False,
    )


def ungated() -> Group:
    """The reference with two matrices for each expert."""
    shape = dataclasses.replace(REFERENCE, name="reference-ungated", gated=False)
    return Group(
        name="ungated",
        cases=tuple(
            dataclasses.replace(reference(direction, opponents=SCALABLE), shape=shape)
            for direction in DIRECTIONS
        ),
    )


def model(shape: Shape, dtype: Dtype) -> Group:
    """A real model's layer."""
    return Group(
        name=f"{shape.name} {dtype}",
        cases=tuple(
            Case(
                shape=shape,
                tokens=REFERENCE_TOKENS,
                num_pes=8,
                dtype=dtype,
                direction=direction,
                opponents=SCALABLE,
            )
            for direction in DIRECTIONS
        ),
    )


def heaps(group: Group) -> int:
    """Heaps that the operator alternates between in a group: two for a case with backward."""
    of_cases = sum(
        (2 if case.backward else 1) * len({*case.opponents} & {*FUSED}) for case in group.cases
    )
    of_ceilings = len({"float32", *(case.dtype for case in group.cases)})
    return of_cases + (of_ceilings if group.ceiling else 0)


_MODEL_DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")

_SMOKE = Shape(name="smoke", hidden=32, intermediate=48, num_experts=8, experts_per_token=2)


def smoke() -> tuple[Group, ...]:
    """Seconds: that everything works here."""
    return (
        Group(
            name="smoke",
            cases=tuple(
                Case(
                    shape=_SMOKE,
                    tokens=64,
                    num_pes=4,
                    dtype="float32",
                    direction=direction,
                    opponents=ALL,
                )
                for direction in DIRECTIONS
            ),
            floor=True,
            timeline=True,
        ),
    )


def quick() -> tuple[Group, ...]:
    """Minutes: the reference, and a look at few tokens, one PE and uneven loads."""
    return (
        *float32(),
        *sixteen_bits("bfloat16"),
        *few_tokens(1, 16),
        one_pe(),
        routing(),
    )


def reference_layer() -> tuple[Group, ...]:
    """Half an hour: all that there is a target for."""
    return (
        *float32(),
        *sixteen_bits("bfloat16"),
        *few_tokens(*FEW_TOKENS_PER_PE),
        one_pe(),
        routing(),
        tokens(*MANY_TOKENS),
        experts(),
        pes(),
    )


def full() -> tuple[Group, ...]:
    """Hours: everything."""
    return (
        *reference_layer(),
        *sixteen_bits("float16"),
        one_pe("bfloat16"),
        *(tokens(*counts) for counts in OTHER_TOKENS),
        ungated(),
        *(
            model(shape.narrowed(divisor), dtype)
            for divisor in WIDTH_DIVISORS
            for shape in MODELS
            for dtype in _MODEL_DTYPES
        ),
    )


SUITES = {"smoke": smoke, "quick": quick, "reference": reference_layer, "full": full}


def select(
    groups: Sequence[Group], patterns: Sequence[str], opponents: Sequence[str] = ()
) -> tuple[Group, ...]:
    """The groups with those cases whose "group: case" any of the patterns is found in.

    Args:
        groups: To choose from.
        patterns: Regular expressions; none: all cases.
        opponents: Names of those that stay; none: all.
    """

    def wanted(group: Group, case: Case) -> bool:
        return not patterns or any(re.search(p, f"{group.name}: {case.name}") for p in patterns)

    def reduced(case: Case) -> Case:
        stay = (name for name in case.opponents if not opponents or name in opponents)
        return dataclasses.replace(case, opponents=tuple(stay))

    chosen = []
    for group in groups:
        cases = (reduced(case) for case in group.cases if wanted(group, case))
        chosen.append(
            dataclasses.replace(group, cases=tuple(case for case in cases if case.opponents))
        )
    return tuple(group for group in chosen if group.cases)
