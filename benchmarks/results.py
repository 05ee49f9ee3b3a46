"""What a run found, as it is written to JSON and read back."""

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from benchmarks.cases import Case, Dtype, Semantics

SCHEMA = 1

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Repetitions of one call.

    Attributes:
        seconds: Of one call, for every sample.
        calls_per_sample: Calls, one after the other, that a sample is the mean of.
        cores_busy: Median over the samples of processor time over time.
    """

    seconds: tuple[float, ...]
    calls_per_sample: int
    cores_busy: float

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds that a quarter and three quarters of the samples do not exceed."""
        low, high = np.quantile(self.seconds, (0.25, 0.75))
        return float(low), float(high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """How far one result is from what it must be, and how far it may be.

    Attributes:
        result: Its name.
        signal: |a - b|^2 / (|a|^2 + |b|^2).
        peak: max |a - b| / rms(b).
        signal_bound: Of signal.
        peak_bound: Of peak.
    """

    result: str
    signal: float
    peak: float
    signal_bound: float
    peak_bound: float

    @property
    def passed(self) -> bool:
        """Whether both distances are within their bounds; NaN is not."""
        return self.signal <= self.signal_bound and self.peak <= self.peak_bound

    def __str__(self) -> str:
        return (
            f"{self.result} is off by {self.signal:.1e} of the signal (allowed "
            f"{self.signal_bound:.1e}) and by up to {self.peak:.1e} rms (allowed "
            f"{self.peak_bound:.1e})"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedPhase:
    """One phase of the operator's calls, see `profiling.PHASES`; means of a call, of all workers.

    Attributes:
        phase: Its name.
        tasks: How many.
        busy_seconds: Time that workers computed.
        waiting_seconds: Time that workers waited, for rows or for a core.
    """

    phase: str
    tasks: float
    busy_seconds: float
    waiting_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedCalls:
    """Calls of the operator in one direction, as `profiling.Direction` has them.

    Attributes:
        direction: "forward" or "backward".
        seconds: Mean duration, from the first PE's entry to the last task's end.
        entering_seconds: Mean share of it until all PEs had entered.
        busy_cores: Workers that computed at a time, mean.
        overlap: Share of the time of dispatch in which experts computed.
        slowest_pe: That ended last most often.
        slowest_pe_share: In what share of the calls.
        phases: Where the time went.
    """

    direction: str
    seconds: float
    entering_seconds: float
    busy_cores: float
    overlap: float
    slowest_pe: int
    slowest_pe_share: float
    phases: tuple[TracedPhase, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """The tasks of one call, as columns; see `profiling.Trace.records`. Times in microseconds."""

    backward: tuple[int, ...]
    pe: tuple[int, ...]
    worker: tuple[int, ...]
    phase: tuple[int, ...]
    begin: tuple[float, ...]
    ready: tuple[float, ...]
    end: tuple[float, ...]


RunStatus = Literal["measured", "unavailable", "failed", "refused", "not measured"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Of one opponent in a process of its own.

    Attributes:
        growth_bytes: Peak memory during the calls over that before the first one.
        layout_bytes: What the operator's heaps and XLA's buffers should take; None if unknown.
    """

    growth_bytes: int
    layout_bytes: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One opponent in one case.

    Attributes:
        opponent: Its name.
        semantics: Which rows it keeps.
        status: "measured"; "unavailable" here; "failed" with an exception; "refused", its results
            are wrong; "not measured", because of another opponent or of the time it would take.
        reason: Why it was not measured.
        kept_rows: Rows that its semantics keep.
        useful_flops: Operations that these need.
        timing: None if it was not measured.
        compile_seconds: To trace and compile.
        first_call_seconds: The first call, which may allocate and start threads.
        checks: Of its results.
        xla_bytes: Sizes that XLA reports for one device, by kind.
        moved_bytes: Bytes that leave a PE for another; None if unknown or on one device.
        least_bytes: Bytes of the kept rows that must leave their PE, each way.
        memory: Measured on request.
        traced: The operator's own calls, in repetitions beside those that were timed.
        timeline: One of them, task by task, where the group asks for it.
    """

    opponent: str
    semantics: Semantics
    status: RunStatus
    reason: str = ""
    kept_rows: int
    useful_flops: int
    timing: Timing | None = None
    compile_seconds: float | None = None
    first_call_seconds: float | None = None
    checks: tuple[Check, ...] = ()
    xla_bytes: dict[str, int] | None = None
    moved_bytes: int | None = None
    least_bytes: int | None = None
    memory: Memory | None = None
    traced: tuple[TracedCalls, ...] = ()
    timeline: Timeline | None = None


CaseStatus = Literal["measured", "refused", "skipped"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaseResult:
    """A case and its opponents.

    Attributes:
        case: The case.
        status: "refused": an opponent computed something else, so no times are reported.
        reason: Why it was not measured.
        busiest_pe_rows: Rows that the PE with the most of them computes, dropless.
        busiest_pe_kept_rows: The same with the capacity.
        runs: Of its opponents.
    """

    case: Case
    status: CaseStatus
    reason: str = ""
    busiest_pe_rows: int = 0
    busiest_pe_kept_rows: int = 0
    runs: tuple[Run, ...] = ()

    def run(self, opponent: str) -> Run | None:
        """The run of an opponent, if it was measured."""
        found = (r for r in self.runs if r.opponent == opponent and r.timing is not None)
        return next(found, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """A measurement of the machine, interleaved with the cases of a group.

    Attributes:
        name: What was called.
        kind: "ceiling", a large matrix product; "floor", a call that computes next to nothing.
        dtype: Of the operands.
        case: Name of the case whose floor it is; empty for a ceiling.
        flops: Of one call; 0 for a floor.
        timing: Its times.
    """

    name: str
    kind: Literal["ceiling", "floor"]
    dtype: Dtype
    case: str = ""
    flops: int = 0
    timing: Timing


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupResult:
    """Cases that were measured together.

    Attributes:
        name: Of the group.
        cases: Its cases.
        probes: Of the machine.
        foreign_load: Share of all processor time that other processes used meanwhile; None if
            unknown.
        seconds: How long the group took, checks and compilation included.
    """

    name: str
    cases: tuple[CaseResult, ...]
    probes: tuple[Probe, ...] = ()
    foreign_load: float | None = None
    seconds: float = 0.0

    def case(self, name: str) -> CaseResult | None:
        """The case of this name, if it was measured."""
        found = (c for c in self.cases if c.case.name == name and c.status == "measured")
        return next(found, None)

    def ceiling(self, dtype: Dtype) -> float | None:
        """The best rate of a large product of `dtype` operands, in operations per second.

        Operands of 16 bits may be multiplied as float32 too, if that is faster.
        """
        rates = [
            probe.flops / probe.timing.median
            for probe in self.probes
            if probe.kind == "ceiling" and probe.dtype in (dtype, "float32")
        ]
        return max(rates, default=None)

    def share_of_ceiling(self, case: Case, run: Run) -> float | None:
        """Useful operations per second over the ceiling; None if there is no ceiling."""
        ceiling = self.ceiling(case.dtype)
        if ceiling is None or run.timing is None:
            return None
        return run.useful_flops / run.timing.median / ceiling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a run was measured.

    Attributes:
        platform: JAX's name of it: "cpu", "gpu".
        processor: Name of the CPU, or of the card.
        devices: JAX's devices.
        cores: CPU cores that the process may use.
        memory_bytes: Of the machine.
        features: Instruction sets that make a difference.
    """

    platform: str
    processor: str
    devices: int
    cores: int
    memory_bytes: int
    features: tuple[str, ...]


Verdict = Literal["met", "MISSED", "-"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetResult:
    """A target and what was measured of it.

    Attributes:
        statement: What is wanted, in words.
        wanted: The number.
        sense: Whether it is to be exceeded.
        measured: None if this run did not measure it, or it is not meant for this machine.
        low: `measured` with the less favourable quartiles.
        high: `measured` with the more favourable quartiles.
        detail: What the number was made of, or why there is none.
        verdict: "met", "MISSED" or "-".
    """

    statement: str
    wanted: float
    sense: Literal["at least", "at most"]
    measured: float | None
    low: float | None
    high: float | None
    detail: str
    verdict: Verdict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """One run of the benchmarks.

    Attributes:
        schema: Version of this format.
        command: That measured it.
        date: When it began, UTC, ISO 8601.
        commit: Of the sources; "-dirty" is appended if they were changed. Empty if unknown.
        machine: Where.
        versions: Of Python and of the packages that matter.
        environment: Variables that matter, as the measuring process saw them.
        warnings: What makes the numbers doubtful.
        options: Of the measurement.
        groups: What was measured.
        targets: What was to be reached.
    """

    schema: int = SCHEMA
    command: str
    date: str
    commit: str
    machine: Machine
    versions: dict[str, str]
    environment: dict[str, str]
    warnings: tuple[str, ...]
    options: dict[str, float]
    groups: tuple[GroupResult, ...]
    targets: tuple[TargetResult, ...] = ()

    def group(self, name: str) -> GroupResult | None:
        """The group of this name, if it is there."""
        return next((group for group in self.groups if group.name == name), None)

    def runs(self) -> Iterator[tuple[GroupResult, CaseResult, Run]]:
        """All runs that were measured."""
        for group in self.groups:
            for case in group.cases:
                for run in case.runs:
                    if run.timing is not None:
                        yield group, case, run

    def save(self, path: Path) -> None:
        """Writes JSON; makes the folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def load(path: Path) -> Results:
    """Reads what `Results.save` wrote.

    Raises:
        ValueError: It has another schema.
    """
    data = json.loads(path.read_text())
    if data.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} has schema {data.get('schema')!r}; this version reads {SCHEMA}: measure again"
        )
    return decode(Results, data)


def decode(kind: type[T], data: Any) -> T:
    """A value of type `kind` from the JSON of its `dataclasses.asdict`.

    Args:
        kind: A dataclass of dataclasses, tuples, dictionaries with text keys, optional values and
            JSON's own types.
        data: As `json.loads` gives it.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    result: Any = data
    if origin in (types.UnionType, typing.Union):
        (inner,) = (a for a in arguments if a is not types.NoneType)
        result = None if data is None else decode(inner, data)
    elif origin is tuple:
        result = tuple(decode(arguments[0], item) for item in data)
    elif dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        result = kind(**{name: decode(hints[name], value) for name, value in data.items()})
    return typing.cast(T, result)
