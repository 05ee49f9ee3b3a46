"""The process that measures: `python -m benchmarks.measure`, started by `cli`.

It reads a `Request` from standard input, and appends to the file that its argument names a line of
JSON about the machine and then one for every group, as soon as it is done.
"""

import dataclasses
import functools
import gc
import importlib.metadata
import json
import platform as python_platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import flashmoe_jax
from benchmarks import oracle, platform, probes, program, suites, timing, traces, traffic
from benchmarks.cases import Case, Group, Semantics
from benchmarks.check import check
from benchmarks.inputs import inputs
from benchmarks.opponents import OPPONENTS, Opponent
from benchmarks.request import Options, Request, Setting
from benchmarks.results import CaseResult, GroupResult, Run, RunStatus, Timing, decode

_PACKAGES = ("jax", "jaxlib", "numpy", "torch")


class WrongResultError(Exception):
    """An opponent computes something else than it should."""


@dataclasses.dataclass
class _Entry:
    """An opponent on its way through a case."""

    run: Run
    timed: timing.Timed | None = None

    def update(self, **changes: Any) -> None:
        self.run = dataclasses.replace(self.run, **changes)

    def stop(self, status: RunStatus, reason: str) -> None:
        self.update(status=status, reason=reason)
        self.timed = None


def measure_group(group: Group, options: Options, *, progress: bool = False) -> GroupResult:
    """Checks all opponents of all cases of a group, then times them interleaved.

    Args:
        group: The group.
        options: How thoroughly.
        progress: Show progress bars on standard error.
    """
    begin = time.perf_counter()
    try:
        result = _measure(group, options, functools.partial(_bar, group.name, progress))
    finally:
        program.clear()
        jax.clear_caches()
        gc.collect()
    return dataclasses.replace(result, seconds=time.perf_counter() - begin)


def _measure(group: Group, options: Options, bar: Callable[[str, int], tqdm]) -> GroupResult:
    skipped: dict[str, CaseResult] = {}
    entries: dict[str, list[_Entry]] = {}
    with bar("compile and check", sum(len(case.opponents) for case in group.cases)) as done:
        for case in group.cases:
            reason = _why_skipped(case)
            if reason is None:
                entries[case.name] = list(_prepare_case(case, options, done.update))
                _refuse_together(entries[case.name])
            else:
                skipped[case.name] = CaseResult(case=case, status="skipped", reason=reason)
                done.update(len(case.opponents))
    live = [entry for prepared in entries.values() for entry in prepared if entry.timed is not None]
    measured = [c for c in group.cases if any(e.timed for e in entries.get(c.name, ()))]
    probe_calls = _probe_calls(group, measured)
    found, foreign = _time(live, probe_calls, options, bar)
    for entry, taken in zip(live, found[: len(live)], strict=True):
        entry.update(status="measured", timing=taken)
        _trace(entry, group.timeline and entry.run.opponent == suites.FUSED[0])
    return GroupResult(
        name=group.name,
        cases=tuple(
            skipped.get(case.name) or _case_result(case, entries[case.name]) for case in group.cases
        ),
        probes=tuple(
            probe.result(taken)
            for probe, taken in zip(probe_calls, found[len(live) :], strict=True)
        ),
        foreign_load=foreign,
    )


def _bar(name: str, progress: bool, what: str, total: int) -> tqdm:
    return tqdm(total=total, desc=f"{name}: {what}", disable=not progress, leave=False)


def _why_skipped(case: Case) -> str | None:
    if case.num_pes > jax.device_count():
        return f"it needs {case.num_pes} devices; there are {jax.device_count()}"
    # Random numbers, the arrays on all devices and on one, results, and the oracle's in float32.
    copies = 6 if case.backward else 3
    need, have = copies * 4 * case.shape.parameters, platform.available_bytes()
    if need > have:
        return f"it needs about {need / 2**30:.0f} GiB; {have / 2**30:.0f} GiB are available"
    return None


def _prepare_case(case: Case, options: Options, done: Callable[[], Any]) -> Iterator[_Entry]:
    """Compiles, calls once and checks every opponent of a case."""
    given = inputs(case)
    # By which rows are kept: where a capacity drops none, it changes nothing.
    expected: dict[bytes, dict[str, np.ndarray]] = {}
    for name in case.opponents:
        opponent = OPPONENTS[name]
        keep = oracle.kept_rows(given.indices, case, opponent.semantics)
        kept = int(keep.sum())
        entry = _Entry(
            Run(
                opponent=name,
                semantics=opponent.semantics,
                status="not measured",
                kept_rows=kept,
                useful_flops=case.useful_flops(kept),
            )
        )
        reason = opponent.unavailable(case)
        if reason is not None:
            entry.stop("unavailable", reason)
        else:
            rows = keep.tobytes()
            if rows not in expected:
                expected[rows] = oracle.expected(case, given, keep)
            try:
                _prepare(entry, opponent, case, expected[rows], options)
            except WrongResultError as error:
                entry.stop("refused", str(error))
            except Exception as error:  # One opponent's failure must not hide the others' times.
                traceback.print_exc()
                entry.stop("failed", f"{type(error).__name__}: {error}")
        done()
        yield entry


def _prepare(
    entry: _Entry,
    opponent: Opponent,
    case: Case,
    expected: dict[str, np.ndarray],
    options: Options,
) -> None:
    computation = opponent.build(case)
    begin = time.perf_counter()
    computation.compile()
    compiled = time.perf_counter()
    outputs = computation()
    called = time.perf_counter()
    entry.update(
        compile_seconds=compiled - begin,
        first_call_seconds=called - compiled,
        xla_bytes=computation.xla_bytes(),
        checks=check(case, computation.results(outputs), expected),
        **_moved(opponent, case, computation.moved_bytes()),
    )
    del outputs
    wrong = [c for c in entry.run.checks if not c.passed]
    if wrong:
        raise WrongResultError("; ".join(map(str, wrong)))
    if called - compiled > options.slowest_call:
        seconds = called - compiled
        entry.stop("not measured", f"a call takes {seconds:.0f} s, over {options.slowest_call:g} s")
        return
    entry.timed = timing.Timed(computation, timing.warm_up(computation), opponent.settle_seconds)


def _moved(opponent: Opponent, case: Case, by_collectives: int | None) -> dict[str, int]:
    """Bytes between PEs, if the opponent uses several."""
    if opponent.one_device or case.num_pes == 1:
        return {}
    leaving = traffic.rows_leaving(inputs(case).indices, case, opponent.semantics)
    moved = by_collectives
    if opponent.family == "fused":
        moved = traffic.fused_bytes(leaving, case)
    found = {"least_bytes": traffic.least_bytes(leaving, case)}
    return found if moved is None else {**found, "moved_bytes": moved}


def _probe_calls(group: Group, measured: list[Case]) -> list[probes.ProbeCall]:
    calls = []
    if group.ceiling and measured:
        calls += probes.ceilings(case.dtype for case in measured)
    if group.floor:
        calls += [probe for case in measured for probe in probes.floors(case)]
    return calls


def _time(
    entries: list[_Entry],
    probe_calls: list[probes.ProbeCall],
    options: Options,
    bar: Callable[[str, int], tqdm],
) -> tuple[list[Timing], float | None]:
    """Times of all entries and then of all probes, and the load by others meanwhile."""
    repetitions = timing.Repetitions(options.budget, options.least, options.most)
    with platform.single_threaded_blas():
        timed = [entry.timed for entry in entries if entry.timed is not None]
        timed += [timing.Timed(probe.call, timing.warm_up(probe.call)) for probe in probe_calls]
        order = timing.schedule([one.sample_seconds for one in timed], repetitions)
        meter = platform.LoadMeter()
        with bar("measure", len(order)) as done:
            found = timing.interleave(timed, order, done.update)
        return found, meter.foreign_share()


def _trace(entry: _Entry, keep_timeline: bool) -> None:
    """Looks where the operator's time goes, in calls that are not timed."""
    if entry.timed is None or OPPONENTS[entry.run.opponent].family != "fused":
        return
    recorded = traces.record(entry.timed.call)
    entry.update(traced=traces.summarise(recorded))
    if keep_timeline:
        entry.update(timeline=traces.last_call(recorded))


def _refuse_together(entries: list[_Entry]) -> None:
    """Times of a case are comparable only if all opponents compute the same."""
    if any(entry.run.status == "refused" for entry in entries):
        for entry in entries:
            if entry.timed is not None:
                entry.stop("not measured", "another opponent's results are wrong")


def _case_result(case: Case, entries: list[_Entry]) -> CaseResult:
    runs = tuple(entry.run for entry in entries)
    refused = [run for run in runs if run.status == "refused"]
    indices = inputs(case).indices

    def busiest(semantics: Semantics) -> int:
        keep = oracle.kept_rows(indices, case, semantics)
        return int(oracle.rows_between_pes(indices, keep, case).sum(0).max())

    return CaseResult(
        case=case,
        status="refused" if refused else "measured",
        reason="; ".join(f"{run.opponent}: {run.reason}" for run in refused),
        busiest_pe_rows=busiest("dropless"),
        busiest_pe_kept_rows=busiest("capacity"),
        runs=runs,
    )


def setting() -> Setting:
    """Where this process measures."""
    versions = {"python": python_platform.python_version()}
    versions["flashmoe_jax"] = flashmoe_jax.__version__
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Setting(
        machine=platform.machine(),
        versions=versions,
        environment=platform.relevant_environment(),
    )


def main() -> None:
    """Measures what standard input asks for."""
    request = decode(Request, json.load(sys.stdin))
    answers = Path(sys.argv[1])

    def answer(value: Any) -> None:
        with answers.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(value)) + "\n")

    answer(setting())
    for group in request.groups:
        answer(measure_group(group, request.options, progress=True))


if __name__ == "__main__":
    main()
