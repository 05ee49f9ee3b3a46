"""What the fused operator does, task by task: a trace for Perfetto, a summary, a timeline.

    with profiling.trace() as recorded:
        jax.block_until_ready(step(state, batch))
    print(recorded.summary())
    recorded.save("moe.json")  # open in https://ui.perfetto.dev or chrome://tracing
    recorded.plot("moe.png")

The engine records every task of every worker (kernels/core/trace.h): when it began, when it stopped
waiting for what it needs, when it was done. While nobody traces, that costs nothing. The engine is
that of CPUs: the CUDA kernel records nothing.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from flashmoe_jax import _ffi

PHASES: Final = ("enter", "route", "plan", "dispatch", "first", "second", "weights", "combine")
"""Names of the phases, in the order of `flashmoe::core::Phase`:

    enter      from a PE's entry into the call until its worker starts; waits for the other PEs
    route      groups the PE's slots by expert
    plan       exchanges the counts, and computes where every row goes
    dispatch   puts the PE's rows for one expert into the heap of the expert's PE
    first      forward: up-projection and activation of a tile; backward: gradients of the
               pre-activations
    second     forward: down-projection of a tile, put back; backward: gradients of its rows
    weights    backward: gradients of the weights of an expert
    combine    sums the results of a block of tokens
"""

_ENTER: Final = PHASES.index("enter")
_DISPATCH: Final = PHASES.index("dispatch")
_COMPUTE: Final = tuple(PHASES.index(name) for name in ("first", "second", "weights"))
_COLOURS: Final = {
    "enter": "#bbbbbb",
    "route": "#cc79a7",
    "plan": "#882255",
    "dispatch": "#e69f00",
    "first": "#0072b2",
    "second": "#56b4e9",
    "weights": "#009e73",
    "combine": "#d55e00",
}
_WAITING: Final = "#dddddd"


class Trace:
    """What was recorded. Empty until the `with` block of `trace` has ended.

    Attributes:
        records: A structured array, one element for each task, sorted by their begin. Fields:
            `call` (of the process, counted from 0), `begin`, `ready`, `end` (nanoseconds of a
            monotonic clock; the task waited from `begin` to `ready`), `backward` (0 or 1), `group`
            (expert group), `pe` (rank in the group), `worker` (of the PE), `phase` (index into
            `PHASES`), `expert` (global index or -1), `row_block` (of the receive buffer, or -1; of
            "combine" the token block), `rows` (that the task treats).
        lost: Tasks for which there was no room.
    """

    records: NDArray[np.void]
    lost: int

    def __init__(self) -> None:
        self.records = np.empty(0, np.dtype(_ffi.extension().trace_dtype()))
        self.lost = 0

    def save(self, path: str | Path) -> None:
        """Writes the Trace Event Format that Perfetto and chrome://tracing read.

        A process of the trace is an expert group, a track a worker of a PE.

        Args:
            path: Of the JSON file.
        """
        Path(path).write_text(json.dumps({"traceEvents": list(self._events())}))

    def summary(self) -> "Summary":
        """Where the time went, for forward and backward."""
        return Summary(
            directions=tuple(
                _summarise(self.records[self.records["backward"] == backward], name)
                for backward, name in enumerate(("forward", "backward"))
                if (self.records["backward"] == backward).any()
            ),
            lost=self.lost,
        )

    def plot(self, path: str | Path, *, call: int | None = None) -> None:
        """Draws a timeline, one bar for each worker of each PE, as a picture.

        Args:
            path: Of the picture; its ending chooses the format.
            call: Which call; None: all that were recorded.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: There is nothing to draw.
        """
        records = self.records if call is None else self.records[self.records["call"] == call]
        if len(records) == 0:
            what = "no call was recorded" if call is None else f"call {call} was not recorded"
            raise ValueError(f"nothing to draw: {what}")
        _plot(records, Path(path))

    def _events(self) -> Iterator[dict[str, Any]]:
        workers = 1 + max(self.records["worker"].tolist(), default=0)
        tracks = np.unique(self.records[["group", "pe", "worker"]])
        for group in np.unique(tracks["group"]).tolist():
            name = {"name": f"expert group {group}"}
            yield {"ph": "M", "name": "process_name", "pid": group, "args": name}
        for group, pe, worker in tracks.tolist():
            track = {"pid": group, "tid": pe * workers + worker}
            name = {"name": f"PE {pe}" + (f" worker {worker}" if workers > 1 else "")}
            yield {"ph": "M", "name": "thread_name", **track, "args": name}
            order = {"sort_index": track["tid"]}
            yield {"ph": "M", "name": "thread_sort_index", **track, "args": order}
        origin = int(self.records["begin"].min(initial=np.iinfo(np.int64).max))
        for record in self.records:
            task = {name: record[name].item() for name in ("call", "expert", "row_block", "rows")}
            event = {
                "ph": "X",
                "pid": record["group"].item(),
                "tid": record["pe"].item() * workers + record["worker"].item(),
                "cat": "backward" if record["backward"] else "forward",
                "args": {name: value for name, value in task.items() if value >= 0},
            }
            phase = PHASES[record["phase"]]
            begin, ready, end = (record[name].item() - origin for name in ("begin", "ready", "end"))
            if ready > begin:
                waiting = {
                    "name": f"wait ({phase})",
                    "ts": begin / 1e3,
                    "dur": (ready - begin) / 1e3,
                }
                yield {**event, **waiting}
            yield {**event, "name": phase, "ts": ready / 1e3, "dur": (end - ready) / 1e3}


@contextlib.contextmanager
def trace(max_records: int = 1_000_000) -> Iterator[Trace]:
    """Records the tasks of all fused calls on CPUs that start inside the `with` block.

    Calls on GPUs record nothing. JAX dispatches asynchronously: call `jax.block_until_ready` on
    the results before the block ends. What is not done by then is missing.

    Args:
        max_records: Room, of 72 bytes for each task. Further tasks are counted in `Trace.lost`.

    Yields:
        The trace, filled when the block ends.

    Raises:
        ValueError: `max_records` is not positive.
        ImportError: The extension module was not built.
    """
    if max_records < 1:
        raise ValueError(f"max_records is {max_records}; it must be at least 1")
    extension = _ffi.extension()
    result = Trace()
    extension.start_trace(max_records)
    try:
        yield result
    finally:
        recorded, result.lost = extension.stop_trace()
        records = np.frombuffer(recorded, result.records.dtype)
        result.records = records[np.argsort(records["begin"], kind="stable")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseTime:
    """One phase of all calls in one direction.

    Attributes:
        phase: One of `PHASES`.
        tasks: How many.
        busy_seconds: Time of workers that did it.
        waiting_seconds: Time of workers that waited for what it needs.
    """

    phase: str
    tasks: int
    busy_seconds: float
    waiting_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Direction:
    """All calls of one direction.

    A call lasts from the entry of its first PE to the end of its last task; it runs from the end of
    its last "enter".

    Attributes:
        name: "forward" or "backward".
        calls: How many; those of several expert groups count by themselves.
        seconds: Mean duration of a call.
        entering_seconds: Mean share of it in which its PEs entered and its workers woke.
        phases: Where the workers' time went.
        busy_cores: How many workers were busy at a time, mean over the running time: of as many as
            there are cores (see "Settings" in the README).
        idle_share: Share of the running time in which a worker did nothing, mean over the workers.
            Large where PEs take turns on fewer cores.
        worst_idle_share: The same of the idlest worker, and
        idlest_worker: which that is: (PE, worker).
        slowest_pe: The PE that ends last most often, and
        slowest_pe_share: in what share of the calls.
        overlap: Share of the time in which rows were being dispatched, in which experts computed.
    """

    name: str
    calls: int
    seconds: float
    entering_seconds: float
    phases: tuple[PhaseTime, ...]
    busy_cores: float
    idle_share: float
    worst_idle_share: float
    idlest_worker: tuple[int, int]
    slowest_pe: int
    slowest_pe_share: float
    overlap: float

    def __str__(self) -> str:
        pe, worker = self.idlest_worker
        lines = [
            f"{self.name}: {self.calls} calls of {_time(self.seconds)}, "
            f"{_time(self.entering_seconds)} of it until all PEs had entered and woken",
            f"  {'phase':10}{'tasks':>8}{'busy':>12}{'waiting':>12}{'share':>8}",
        ]
        busy = sum(phase.busy_seconds for phase in self.phases if phase.phase != "enter")
        for phase in self.phases:
            share = "" if phase.phase == "enter" else f"{phase.busy_seconds / busy:8.1%}"
            lines.append(
                f"  {phase.phase:10}{phase.tasks:8}{_time(phase.busy_seconds / self.calls):>12}"
                f"{_time(phase.waiting_seconds / self.calls):>12}{share}"
            )
        lines += [
            f"  cores: {self.busy_cores:.2f} busy on average",
            f"  idle: {self.idle_share:.1%} of a worker's time; most, {self.worst_idle_share:.1%}, "
            f"worker {worker} of PE {pe}",
            f"  slowest: PE {self.slowest_pe}, last in {self.slowest_pe_share:.0%} of the calls",
            f"  overlap: experts computed in {self.overlap:.1%} of the time of dispatch",
        ]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Where the time went; `print` it.

    Attributes:
        directions: Forward, backward, or both. Times in the printed table are means of a call, of
            all its workers together.
        lost: Tasks that were not recorded for lack of room.
    """

    directions: tuple[Direction, ...]
    lost: int

    def __str__(self) -> str:
        parts = [str(direction) for direction in self.directions] or ["no call was recorded"]
        if self.lost:
            parts.append(f"{self.lost} tasks found no room and are missing: raise max_records")
        return "\n".join(parts)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _summarise(records: NDArray[np.void], name: str) -> Direction:
    busy, waiting = records["end"] - records["ready"], records["ready"] - records["begin"]
    phases = []
    for index, phase in enumerate(PHASES):
        of_phase = records["phase"] == index
        if of_phase.any():
            phases.append(
                PhaseTime(
                    phase=phase,
                    tasks=int(of_phase.sum()),
                    busy_seconds=float(busy[of_phase].sum()) / 1e9,
                    waiting_seconds=float(waiting[of_phase].sum()) / 1e9,
                )
            )
    calls = [records[records["call"] == call] for call in np.unique(records["call"])]
    workers = np.unique(records[["pe", "worker"]])
    idle = np.array([[_idle_share(call, *worker) for worker in workers.tolist()] for call in calls])
    idle = idle.mean(0)
    last = np.array([call["pe"][np.argmax(call["end"])] for call in calls])
    slowest = int(np.bincount(last).argmax())
    dispatching, overlapped = np.sum([_overlap(call) for call in calls], axis=0)
    return Direction(
        name=name,
        calls=len(calls),
        seconds=float(np.mean([c["end"].max() - c["begin"].min() for c in calls])) / 1e9,
        entering_seconds=float(np.mean([_start(c) - c["begin"].min() for c in calls])) / 1e9,
        phases=tuple(phases),
        busy_cores=float((1 - idle).sum()),
        idle_share=float(idle.mean()),
        worst_idle_share=float(idle.max()),
        idlest_worker=workers[idle.argmax()].item(),
        slowest_pe=slowest,
        slowest_pe_share=float(np.mean(last == slowest)),
        overlap=float(overlapped / dispatching) if dispatching else 0.0,
    )


def _start(call: NDArray[np.void]) -> int:
    """When a call's last PE began to run."""
    entered = call[call["phase"] == _ENTER]
    return int(entered["end"].max()) if len(entered) else int(call["begin"].min())


def _idle_share(call: NDArray[np.void], pe: int, worker: int) -> float:
    begin, end = _start(call), int(call["end"].max())
    mine = call[(call["pe"] == pe) & (call["worker"] == worker) & (call["phase"] != _ENTER)]
    busy = np.clip(mine["end"], begin, end) - np.clip(mine["ready"], begin, end)
    return 1 - float(busy.sum()) / max(1, end - begin)


def _overlap(call: NDArray[np.void]) -> tuple[int, int]:
    """Nanoseconds in which rows were dispatched, and those of them in which experts computed."""
    dispatching = _union(call[call["phase"] == _DISPATCH])
    computing = _union(call[np.isin(call["phase"], _COMPUTE)])
    both = sum(
        max(0, min(end, other_end) - max(begin, other_begin))
        for begin, end in dispatching
        for other_begin, other_end in computing
    )
    return sum(end - begin for begin, end in dispatching), both


def _union(records: NDArray[np.void]) -> Sequence[tuple[int, int]]:
    """The times in which any of the tasks was done, as disjoint intervals."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(zip(records["ready"].tolist(), records["end"].tolist(), strict=True)):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _plot(records: NDArray[np.void], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("Trace.plot needs matplotlib: pip install matplotlib") from error

    tracks = [track.item() for track in np.unique(records[["group", "pe", "worker"]])]
    several_groups = len({group for group, _, _ in tracks}) > 1
    several_workers = max(worker for _, _, worker in tracks) > 0
    figure = Figure(figsize=(12, 1.2 + 0.35 * len(tracks)), layout="constrained")
    axes = figure.subplots()
    origin = records["begin"].min()
    used = []
    for index, phase in enumerate(PHASES):
        of_phase = records[records["phase"] == index]
        if len(of_phase) == 0:
            continue
        used.append(Patch(color=_COLOURS[phase], label=phase))
        for row, (group, pe, worker) in enumerate(tracks):
            mine = of_phase[
                (of_phase["group"] == group)
                & (of_phase["pe"] == pe)
                & (of_phase["worker"] == worker)
            ]
            begin, ready, end = ((mine[name] - origin) / 1e6 for name in ("begin", "ready", "end"))
            waits = list(zip(begin, ready - begin, strict=True))
            axes.broken_barh(waits, (row - 0.15, 0.3), color=_WAITING)
            tasks = list(zip(ready, end - ready, strict=True))
            axes.broken_barh(tasks, (row - 0.4, 0.8), color=_COLOURS[phase])
    used.append(Patch(color=_WAITING, label="waiting"))
    labels = [
        (f"group {group} " if several_groups else "")
        + f"PE {pe}"
        + (f" worker {worker}" if several_workers else "")
        for group, pe, worker in tracks
    ]
    axes.set_yticks(range(len(tracks)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.legend(
        handles=used,
        ncols=len(used),
        fontsize="small",
        loc="upper center",
        bbox_to_anchor=(0.5, -0.25 if len(tracks) < 4 else -0.12),
    )
    figure.savefig(path, dpi=150)
