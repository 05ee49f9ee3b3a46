"""Plots of the results, as PNG."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks import suites, traces
from benchmarks.cases import Case
from benchmarks.results import CaseResult, GroupResult, Results
from benchmarks.shapes import MODELS

# One colour for each opponent in every plot, from a palette that the colour-blind can read.
_COLOURS = {
    "fused": "#0072B2",
    "fused-capacity": "#56B4E9",
    "xla": "#D55E00",
    "xla-capacity": "#E69F00",
    "xla-capacity-one-device": "#F0C987",
    "xla-all-to-all": "#CC79A7",
    "ragged-dot": "#009E73",
    "dense": "#999999",
    "torch-loop": "#000000",
    "torch-grouped": "#555555",
}
_DPI = 150


def draw(results: Results, stem: Path) -> list[Path]:
    """Draws what the results allow.

    Args:
        results: To be shown.
        stem: Path of the pictures, to which a name and ".png" are appended.

    Returns:
        The pictures.
    """
    drawings: tuple[tuple[str, Callable[[Results], bool]], ...] = (
        ("tokens", _draw_tokens),
        ("scaling", _draw_scaling),
        ("ceiling", _draw_ceiling),
        ("models", _draw_models),
    )
    stem.parent.mkdir(parents=True, exist_ok=True)
    made = list(_draw_timelines(results, stem))
    for name, drawing in drawings:
        if drawing(results):
            path = stem.with_name(f"{stem.name}-{name}.png")
            plt.savefig(path, dpi=_DPI, bbox_inches="tight")
            made.append(path)
        plt.close("all")
    return made


def _draw_timelines(results: Results, stem: Path) -> Iterator[Path]:
    """Every task of one call, of each group that kept them."""
    for group in results.groups:
        timelines = (run.timeline for case in group.cases for run in case.runs)
        timeline = next(filter(None, timelines), None)
        if timeline is not None:
            direction = group.name.replace("+", "-")
            path = stem.with_name(f"{stem.name}-timeline-{direction}.png")
            traces.to_trace(timeline).plot(path)
            yield path


def _draw_tokens(results: Results) -> bool:
    """Time against tokens, of the reference on 8 PEs in float32."""
    wanted = suites.reference()
    found = _like(results, wanted, "tokens")
    counts = sorted({result.case.tokens // result.case.num_pes for result in found})
    if len(counts) < 3:
        return False
    _, axes = plt.subplots(figsize=(8, 5))
    _lines(axes, found, lambda case: case.tokens // case.num_pes)
    axes.set(xlabel="tokens per PE", ylabel="milliseconds", yscale="log")
    axes.set_title("Forward against tokens: reference layer, 8 PEs, float32")
    _binary_ticks(axes, counts)
    axes.legend(fontsize="small")
    return True


def _draw_scaling(results: Results) -> bool:
    """Time against experts and against PEs, of the reference in float32."""
    _, panels = plt.subplots(1, 2, figsize=(11, 4.5))
    drawn = False
    for axes, group, x in (
        (panels[0], "experts", lambda case: case.shape.num_experts),
        (panels[1], "PEs", lambda case: case.num_pes),
    ):
        result = results.group(group)
        cases = [] if result is None else [c for c in result.cases if c.status == "measured"]
        axes.set(xlabel=group, ylabel="milliseconds")
        axes.set_title(f"Forward against {group}: reference layer, float32", fontsize="medium")
        if len(cases) < 2:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
            continue
        drawn = True
        _lines(axes, cases, x)
        _binary_ticks(axes, sorted({x(result.case) for result in cases}))
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    return drawn


def _draw_ceiling(results: Results) -> bool:
    """Share of the ceiling: a panel of bars for every case with all kinds of opponents."""
    panels_of = {
        f"{group.name}: {result.case.name}": shares
        for group, result, shares in _shares(results)
        if {"fused", "xla"} <= shares.keys()
    }
    if not panels_of:
        return False
    columns = min(2, len(panels_of))
    rows = math.ceil(len(panels_of) / columns)
    size = (6.5 * columns, 2.6 * rows)
    _, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in panels.flat[len(panels_of) :]:
        axes.set_visible(False)
    for axes, (title, shares) in zip(panels.flat, panels_of.items(), strict=False):
        names = list(shares)
        drawn = axes.barh(names, list(shares.values()), color=[_colour(name) for name in names])
        axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize="small")
        axes.invert_yaxis()
        axes.set_xlim(0, max(1.05, *(1.15 * share for share in shares.values())))
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_title(title, fontsize="small")
        axes.set_xlabel("share of the ceiling", fontsize="small")
        axes.tick_params(labelsize="small")
    return True


def _draw_models(results: Results) -> bool:
    """Share of the ceiling in the layers of real models: a line of points for every case."""
    names = {model.name for model in MODELS}
    lines_of = {
        f"{result.case.shape.name}, {result.case.dtype}, {result.case.direction}": shares
        for _, result, shares in _shares(results)
        if result.case.shape.name.split("@")[0] in names
    }
    if not lines_of:
        return False
    _, axes = plt.subplots(figsize=(9, 1.5 + 0.25 * len(lines_of)))
    for opponent in suites.ALL:
        points = [
            (share, label)
            for label, shares_of in lines_of.items()
            if (share := shares_of.get(opponent)) is not None
        ]
        if points:
            shares, places = zip(*points, strict=True)
            axes.plot(shares, places, "o", color=_colour(opponent), label=opponent, markersize=5)
    axes.invert_yaxis()
    axes.grid(True, axis="both", alpha=0.3)
    axes.set_xlim(0, None)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel="share of the ceiling", title="Layers of real models, 2048 tokens, 8 PEs")
    axes.tick_params(labelsize="small")
    axes.legend(fontsize="small")
    return True


def _shares(results: Results) -> Iterator[tuple[GroupResult, CaseResult, dict[str, float]]]:
    """The share of the ceiling of every opponent that was measured, for cases that have any."""
    for group in results.groups:
        for result in group.cases:
            shares = {
                run.opponent: share
                for run in result.runs
                if (share := group.share_of_ceiling(result.case, run)) is not None
            }
            if shares:
                yield group, result, shares


def _like(results: Results, wanted: Case, differing: str) -> list[CaseResult]:
    """Measured cases that are alike but for one field, in its order.

    Where several groups have a case, the one in which most opponents were measured counts.
    """
    fields = {"shape", "tokens", "num_pes", "dtype", "direction", "load"} - {differing}
    found: dict[str, CaseResult] = {}
    for group in results.groups:
        for result in group.cases:
            alike = all(getattr(result.case, f) == getattr(wanted, f) for f in fields)
            known = found.get(result.case.name)
            if alike and (known is None or len(result.runs) > len(known.runs)):
                found[result.case.name] = result
    return sorted(found.values(), key=lambda result: getattr(result.case, differing))


def _lines(axes: Axes, cases: Sequence[CaseResult], x: Callable[[Case], float]) -> None:
    """A line for each opponent with its medians, and its quartiles as error bars."""
    for opponent in suites.ALL:
        points = [
            (x(result.case), run.timing)
            for result in cases
            if (run := result.run(opponent)) is not None and run.timing is not None
        ]
        if not points:
            continue
        median = [1e3 * timing.median for _, timing in points]
        below = [1e3 * (timing.median - timing.quartiles[0]) for _, timing in points]
        above = [1e3 * (timing.quartiles[1] - timing.median) for _, timing in points]
        axes.errorbar(
            [place for place, _ in points],
            median,
            yerr=[below, above],
            label=opponent,
            color=_colour(opponent),
            marker="o",
            markersize=4,
            capsize=3,
            linewidth=2 if opponent.startswith("fused") else 1.2,
        )
    axes.grid(True, which="major", alpha=0.3)


def _binary_ticks(axes: Axes, ticks: Sequence[int]) -> None:
    """A logarithmic x axis with these ticks."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def _colour(opponent: str) -> str:
    return _COLOURS.get(opponent, "#888888")
