"""Tables of the results, for the terminal and for the documentation."""

import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.results import CaseResult, GroupResult, Results, Run, TargetResult
from flashmoe_jax import profiling

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

# Above this share of the machine's processor time, what others did shows in the times.
QUIET_LOAD = 0.05

_WIDTH = 200
# Those in which workers compute.
_PHASES = tuple(phase for phase in profiling.PHASES if phase != "enter")
# Whom an opponent is compared with.
_FUSED_OF = {
    "dropless": "fused",
    "capacity": "fused-capacity",
    "capacity per source": "fused-capacity",
}


def to_terminal(results: Results) -> None:
    """Prints everything to standard output, what was to be reached last."""
    console, style = Console(width=_WIDTH, highlight=False), box.SIMPLE_HEAD
    _print_heading(results, console)
    _print_groups(results, console, style)
    _print_losses(results, console)
    _print_targets(results, console, style)


def to_markdown(results: Results, pictures: Iterable[str] = ()) -> str:
    """Everything as Markdown, what was to be reached first, with pictures before the tables."""
    text = io.StringIO()
    console, style = Console(file=text, width=_WIDTH, highlight=False), box.MARKDOWN
    _print_heading(results, console)
    _print_targets(results, console, style)
    _print_losses(results, console)
    for picture in pictures:
        _text(console, f"\n{picture}")
    _print_groups(results, console, style)
    lines = "\n".join(line.rstrip() for line in text.getvalue().splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip() + "\n"


def update_document(path: Path, results: Results, plots: Iterable[Path]) -> None:
    """Replaces what stands between the two markers of a document.

    Args:
        path: The document.
        results: To be shown.
        plots: Pictures to be shown.

    Raises:
        ValueError: There is no such document, or not exactly one pair of markers in it.
    """
    text = path.read_text() if path.exists() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} needs one line {BEGIN!r} and, after it, one line {END!r}")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    pictures = "\n".join(f"![{_caption(plot)}]({_relative(plot, path.parent)})\n" for plot in plots)
    path.write_text(f"{before}{BEGIN}\n{to_markdown(results)}\n{pictures}{END}{after}")


def doubts(results: Results) -> Iterator[str]:
    """What makes the times doubtful."""
    yield from results.warnings
    loads = {
        group.name: group.foreign_load
        for group in results.groups
        if group.foreign_load is not None and group.foreign_load > QUIET_LOAD
    }
    if loads:
        shares = ", ".join(f"{load:.0%} during {name!r}" for name, load in loads.items())
        yield f"Other processes used the machine ({shares}): these times are no results"
    if results.commit.endswith("-dirty"):
        yield "The sources were changed after the commit"


def _print_heading(results: Results, console: Console) -> None:
    for line in _heading(results):
        _text(console, line)


def _print_groups(results: Results, console: Console, style: box.Box) -> None:
    for group in results.groups:
        _title(console, group.name[0].upper() + group.name[1:])
        if any(run.timing for case in group.cases for run in case.runs):
            console.print(_times(group, style))
        for line in _notes(group):
            _text(console, line)
        if any(run.memory for case in group.cases for run in case.runs):
            console.print(_memory(group, style))
        if any(run.traced for case in group.cases for run in case.runs):
            _text(console, "\nWhere the operator's time goes, from its own trace:\n")
            console.print(_traced(group, style))


def _print_losses(results: Results, console: Console) -> None:
    _title(console, "Where the fused operator is not the fastest")
    for line in list(_losses(results)) or ["Nowhere in this run."]:
        _text(console, line)


def _print_targets(results: Results, console: Console, style: box.Box) -> None:
    _title(console, "Targets")
    console.print(_targets(results.targets, style))


def _title(console: Console, title: str) -> None:
    _text(console, f"\n### {title}\n")


def _text(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)


def _heading(results: Results) -> Iterator[str]:
    machine = results.machine
    yield (
        f"{machine.processor}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB, "
        f"{', '.join(machine.features) or 'no special instructions'}; "
        f"platform {machine.platform}, {machine.devices} devices."
    )
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    yield f"{versions}; commit {results.commit or 'unknown'}; {results.date}; `{results.command}`."
    yield ""
    yield (
        "Times are medians of interleaved repetitions, with quartiles. Useful operations are those "
        "of kept rows, without padding. The ceiling is the best large matrix product of the same "
        "run. `x fused` is the time over that of the fused operator with the same kind of capacity."
    )
    for doubt in doubts(results):
        yield ""
        yield f"**WARNING: {doubt}.**"


def _table(style: box.Box, *columns: str) -> Table:
    table = Table(box=style)
    for position, column in enumerate(columns):
        name = column.removeprefix("<")
        left = position == 0 or column.startswith("<")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    return table


def _times(group: GroupResult, style: box.Box) -> Table:
    table = _table(
        style,
        "case",
        "<opponent",
        "median",
        "quartiles",
        "x fused",
        "Gflop/s",
        "of ceiling",
        "cores",
        "compile",
        "moved / least",
    )
    for result in group.cases:
        name = result.case.name
        for run in result.runs:
            if run.timing is None:
                continue
            table.add_row(name, run.opponent, *_cells(group, result, run))
            name = ""
    return table


def _cells(group: GroupResult, result: CaseResult, run: Run) -> Iterator[str]:
    timing = run.timing
    assert timing is not None  # the caller asks for those only
    low, high = timing.quartiles
    ratio = _over_fused(result, run)
    share = group.share_of_ceiling(result.case, run)
    yield _time(timing.median)
    yield f"{_time(low)} to {_time(high)}"
    yield "" if ratio is None else f"{ratio:.2f}"
    yield f"{run.useful_flops / timing.median / 1e9:.0f}"
    yield "" if share is None else f"{share:.2f}"
    yield f"{timing.cores_busy:.1f}"
    yield "" if run.compile_seconds is None else f"{run.compile_seconds:.1f} s"
    yield _moved(run)


def _over_fused(result: CaseResult, run: Run) -> float | None:
    fused = result.run(_FUSED_OF[run.semantics])
    if fused is None or fused.timing is None or run.timing is None:
        return None
    return run.timing.median / fused.timing.median


def _moved(run: Run) -> str:
    if run.moved_bytes is None or not run.least_bytes:
        return ""
    return f"{run.moved_bytes / run.least_bytes:.2f}"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-2 else f"{seconds * 1e6:.0f} us"


def _memory(group: GroupResult, style: box.Box) -> Table:
    table = _table(style, "case", "<opponent", "peak growth", "layout", "XLA's temporaries")
    for result in group.cases:
        for run in result.runs:
            if run.memory is None:
                continue
            layout, xla = run.memory.layout_bytes, run.xla_bytes
            devices = 1 if run.least_bytes is None else result.case.num_pes
            table.add_row(
                result.case.name,
                run.opponent,
                _mebibytes(run.memory.growth_bytes),
                "" if layout is None else _mebibytes(layout),
                "" if xla is None else _mebibytes(devices * xla["temp"]),
            )
    return table


def _traced(group: GroupResult, style: box.Box) -> Table:
    """A line for each of the operator's calls; phases as shares of the time its workers computed.

    "outside" is the rest of the program: the router, what XLA does with the results.
    """
    table = _table(
        style, "case", "<opponent", "<call", "time", "outside", "entering", "cores", *_PHASES
    )
    for result in group.cases:
        name = result.case.name
        for run in result.runs:
            if run.timing is None or not run.traced:
                continue
            outside = run.timing.median - sum(call.seconds for call in run.traced)
            opponent, rest = run.opponent, _time(max(0.0, outside))
            for call in run.traced:
                busy = {phase.phase: phase.busy_seconds for phase in call.phases}
                total = sum(busy.get(phase, 0.0) for phase in _PHASES)
                table.add_row(
                    name,
                    opponent,
                    call.direction,
                    _time(call.seconds),
                    rest,
                    _time(call.entering_seconds),
                    f"{call.busy_cores:.2f}",
                    *(f"{busy[p] / total:.1%}" if p in busy else "" for p in _PHASES),
                )
                name = opponent = rest = ""
    return table


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


def _notes(group: GroupResult) -> Iterator[str]:
    ceilings = [
        f"{probe.name} {probe.dtype} {probe.flops / probe.timing.median / 1e9:.0f}"
        for probe in group.probes
        if probe.kind == "ceiling"
    ]
    if ceilings:
        yield ""
        yield f"Large products, Gflop/s: {'; '.join(ceilings)}."
    floors = [
        f"{probe.name} {_time(probe.timing.median)} ({probe.case})"
        for probe in group.probes
        if probe.kind == "floor"
    ]
    if floors:
        yield ""
        yield f"Floor: {'; '.join(floors)}."
    for result in group.cases:
        if result.reason:
            yield ""
            yield f"**{result.status.upper()}** {result.case.name}: {result.reason}."
        for run in result.runs:
            if run.status in ("failed", "not measured"):
                yield ""
                yield f"{run.opponent} {run.status} ({result.case.name}): {run.reason}."
    unavailable = {
        f"{run.opponent} ({run.reason})"
        for result in group.cases
        for run in result.runs
        if run.status == "unavailable"
    }
    if unavailable:
        yield ""
        yield f"Unavailable: {'; '.join(sorted(unavailable))}."


def _losses(results: Results) -> Iterator[str]:
    for group, result, run in results.runs():
        ratio = _over_fused(result, run)
        if ratio is not None and ratio < 1:
            where = f"{group.name}: {result.case.name}"
            yield f"* {where}: {run.opponent} takes {ratio:.2f} of the time"


def _targets(targets: Iterable[TargetResult], style: box.Box) -> Table:
    table = _table(style, "target", "<wanted", "measured", "range", "<verdict", "<detail")
    for target in targets:
        measured = "" if target.measured is None else f"{target.measured:.2f}"
        spread = "" if target.low is None else f"{target.low:.2f} to {target.high:.2f}"
        table.add_row(
            target.statement,
            f"{target.sense} {target.wanted:g}",
            measured,
            spread,
            target.verdict,
            target.detail,
        )
    return table


def _caption(plot: Path) -> str:
    return re.sub(r".*\d{4}-\d{2}-\d{2}-", "", plot.stem).replace("-", " ")


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
