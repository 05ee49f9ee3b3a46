"""Numbers that follow from the results of a run.

All are ratios of medians, and only of calls whose repetitions were interleaved. With each comes its
range: the ratio of the less favourable quartiles, and that of the more favourable ones.
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal, NamedTuple, Protocol

from benchmarks import suites
from benchmarks.cases import Case
from benchmarks.results import CaseResult, Machine, Results, Run, Timing


class Measurement(NamedTuple):
    """A number for a target.

    Attributes:
        value: From medians.
        low: From the quartiles that make it smaller.
        high: From the quartiles that make it larger.
        detail: What it is made of.
    """

    value: float
    low: float
    high: float
    detail: str = ""


class Measure(Protocol):
    """How a target's number follows from the results."""

    def of(self, results: Results) -> Measurement | None:
        """The number; None if the run did not measure what it needs."""


@dataclasses.dataclass(frozen=True)
class Speedup:
    """Time of the fastest of some opponents over that of another one.

    Attributes:
        where: Names of groups, each with a case; of several, the smallest speedup counts.
        ours: The opponent, and with which it is compared; of several pairs, the smallest counts.
    """

    where: tuple[tuple[str, Case], ...]
    ours: tuple[tuple[str, tuple[str, ...]], ...]

    def of(self, results: Results) -> Measurement | None:
        """See `Measure`."""
        found = []
        for group, case in self.where:
            for result in _cases(results, group, (case,)):
                for name, others in self.ours:
                    mine = result.run(name)
                    theirs = [run for other in others if (run := result.run(other)) is not None]
                    if mine is None or not theirs:
                        continue
                    best = min(theirs, key=lambda run: _timing(run).median)
                    detail = f"{name} over {best.opponent}, {case.tokens} tokens"
                    found.append(_ratio(best, mine, detail))
        return min(found, default=None)


@dataclasses.dataclass(frozen=True)
class OverCase:
    """Time of an opponent in one case over its time in another.

    Attributes:
        group: Name of the group.
        numerator: The one case.
        denominator: The other.
        opponents: Of all these, the worst counts.
        worst: Which is the worst.
    """

    group: str
    numerator: Case
    denominator: Case
    opponents: tuple[str, ...]
    worst: Literal["smallest", "largest"]

    def of(self, results: Results) -> Measurement | None:
        """See `Measure`."""
        cases = _cases(results, self.group, (self.numerator, self.denominator))
        if len(cases) < 2:
            return None
        found = [
            _ratio(above, below, name)
            for name in self.opponents
            if (above := cases[0].run(name)) and (below := cases[1].run(name))
        ]
        return (min if self.worst == "smallest" else max)(found, default=None)


@dataclasses.dataclass(frozen=True)
class ShareOfCeiling:
    """Useful operations per second over the rate of the best large product.

    Attributes:
        group: Name of the group.
        case: The case.
        opponents: Of all these, the smallest share counts.
    """

    group: str
    case: Case
    opponents: tuple[str, ...] = suites.FUSED

    def of(self, results: Results) -> Measurement | None:
        """See `Measure`."""
        group = results.group(self.group)
        result = None if group is None else group.case(self.case.name)
        ceiling = None if group is None else group.ceiling(self.case.dtype)
        if result is None or ceiling is None:
            return None
        found = []
        for name in self.opponents:
            run = result.run(name)
            if run is not None:
                timing = _timing(run)
                fast, slow = timing.quartiles
                value, low, high = (
                    run.useful_flops / seconds / ceiling for seconds in (timing.median, slow, fast)
                )
                found.append(
                    Measurement(value, low, high, f"{name}, of {ceiling / 1e9:.0f} Gflop/s")
                )
        return min(found, default=None)


@dataclasses.dataclass(frozen=True)
class GrowthOverWork:
    """Growth of the time under a load, over that of the work that bounds the time.

    That is the busiest PE's. Where PEs outnumber the cores, an even load is bounded by the work of
    all PEs for each core instead: `count_cores` takes the larger of the two, which asks for more.

    Attributes:
        group: Name of the group.
        even: The case with an even load.
        uneven: The case with the load.
        count_cores: Whether there are fewer cores than PEs matters.
        opponent: Dropless.
    """

    group: str
    even: Case
    uneven: Case
    count_cores: bool
    opponent: str = "fused"

    def of(self, results: Results) -> Measurement | None:
        """See `Measure`."""
        cases = _cases(results, self.group, (self.uneven, self.even))
        runs = [case.run(self.opponent) for case in cases]
        if len(runs) < 2 or runs[0] is None or runs[1] is None:
            return None
        growth = _ratio(runs[0], runs[1], "")
        uneven, even = (self._rows(case, results.machine) for case in cases)
        work = uneven / even
        detail = f"time x {growth.value:.2f}, work x {work:.2f}"
        return Measurement(growth.value / work, growth.low / work, growth.high / work, detail)

    def _rows(self, result: CaseResult, machine: Machine) -> float:
        on_cores = self.count_cores and machine.platform == "cpu"
        each = result.case.rows / machine.cores if on_cores else 0.0
        return max(float(result.busiest_pe_rows), each)


@dataclasses.dataclass(frozen=True)
class Linearity:
    """How far the time for one token changes between some cases: larger over smaller, less 1.

    Attributes:
        group: Name of the group.
        cases: They.
        opponent: Whose time.
    """

    group: str
    cases: tuple[Case, ...]
    opponent: str

    def of(self, results: Results) -> Measurement | None:
        """See `Measure`."""
        measured = [
            (result.case.tokens, run)
            for result in _cases(results, self.group, self.cases)
            if (run := result.run(self.opponent)) is not None
        ]
        if len(measured) < 2:
            return None
        measured.sort(key=lambda pair: _timing(pair[1]).median / pair[0])
        (few, fast), (many, slow) = measured[0], measured[-1]
        scale = few / many
        ratio = _ratio(slow, fast, "")
        detail = f"{few} tokens are the cheapest for each, {many} the dearest"
        return Measurement(
            ratio.value * scale - 1, ratio.low * scale - 1, ratio.high * scale - 1, detail
        )


@dataclasses.dataclass(frozen=True)
class MemoryOfLayout:
    """Growth of the peak memory over what heaps and XLA's buffers should take.

    Attributes:
        group: Name of the group.
        cases: Of all these, the largest ratio counts.
        opponents: Of all these too.
    """

    group: str
    cases: tuple[Case, ...]
    opponents: tuple[str, ...] = suites.FUSED

    def of(self, results: Results) -> Measurement | None:
        """See `Measure`."""
        found = []
        for result in _cases(results, self.group, self.cases):
            for name in self.opponents:
                run = result.run(name)
                if run is None or run.memory is None or not run.memory.layout_bytes:
                    continue
                ratio = run.memory.growth_bytes / run.memory.layout_bytes
                detail = f"{name}, {result.case.tokens} tokens"
                found.append(Measurement(ratio, ratio, ratio, detail))
        return max(found, default=None)


def _cases(results: Results, group: str, cases: Iterable[Case]) -> list[CaseResult]:
    """Those of the cases that were measured, in this order."""
    found = results.group(group)
    if found is None:
        return []
    return [result for case in cases if (result := found.case(case.name)) is not None]


def _timing(run: Run) -> Timing:
    assert run.timing is not None  # CaseResult.run gives only those that were measured
    return run.timing


def _ratio(above: Run, below: Run, detail: str) -> Measurement:
    """Time over time."""
    a, b = _timing(above), _timing(below)
    (a_low, a_high), (b_low, b_high) = a.quartiles, b.quartiles
    return Measurement(a.median / b.median, a_low / b_high, a_high / b_low, detail)
