"""Where the operator's time goes: traces of calls that are not timed."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.results import Timeline, TracedCalls, TracedPhase
from flashmoe_jax import profiling

_CALLS = 5


def record(call: Callable[[], Any]) -> profiling.Trace:
    """A trace of a few calls."""
    with profiling.trace() as recorded:
        for _ in range(_CALLS):
            call()
    return recorded


def summarise(recorded: profiling.Trace) -> tuple[TracedCalls, ...]:
    """The means over all calls, forward and backward."""
    return tuple(
        TracedCalls(
            direction=direction.name,
            seconds=direction.seconds,
            entering_seconds=direction.entering_seconds,
            busy_cores=direction.busy_cores,
            overlap=direction.overlap,
            slowest_pe=direction.slowest_pe,
            slowest_pe_share=direction.slowest_pe_share,
            phases=tuple(
                TracedPhase(
                    phase=phase.phase,
                    tasks=phase.tasks / direction.calls,
                    busy_seconds=phase.busy_seconds / direction.calls,
                    waiting_seconds=phase.waiting_seconds / direction.calls,
                )
                for phase in direction.phases
            ),
        )
        for direction in recorded.summary().directions
    )


def last_call(recorded: profiling.Trace) -> Timeline:
    """The tasks of the last call of those that `record` makes."""
    records = recorded.records
    operator_calls = np.unique(records["call"])
    last = records[records["call"] >= operator_calls[-len(operator_calls) // _CALLS]]
    origin = last["begin"].min()

    def microseconds(field: str) -> tuple[float, ...]:
        return tuple(round(time / 1e3, 1) for time in (last[field] - origin).tolist())

    def column(field: str) -> tuple[int, ...]:
        return tuple(last[field].tolist())

    return Timeline(
        backward=column("backward"),
        pe=column("pe"),
        worker=column("worker"),
        phase=column("phase"),
        begin=microseconds("begin"),
        ready=microseconds("ready"),
        end=microseconds("end"),
    )


def to_trace(timeline: Timeline) -> profiling.Trace:
    """A trace of one call, to be drawn."""
    trace = profiling.Trace()
    records: NDArray[np.void] = np.zeros(len(timeline.pe), trace.records.dtype)
    for field in ("backward", "pe", "worker", "phase"):
        records[field] = getattr(timeline, field)
    for field in ("begin", "ready", "end"):
        records[field] = np.round(1e3 * np.array(getattr(timeline, field)))
    trace.records = records
    return trace
