"""Interleaved repetitions, with as many of each call as a time budget allows."""

import contextlib
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.results import Timing

# Shorter calls are timed several at once, so that the clock and its reading do not matter.
_SAMPLE_SECONDS = 0.01
_WARM_UP_SECONDS = 0.1
_LONG_SECONDS = 1.0


class Repetitions(NamedTuple):
    """How often to measure.

    Attributes:
        budget: Seconds for all calls together.
        least: Samples of each, whatever the budget.
        most: Samples of each.
    """

    budget: float
    least: int
    most: int


class Timed(NamedTuple):
    """A call to be measured.

    Attributes:
        call: Returns when it is done.
        estimate: Seconds that it takes.
        settle_seconds: Time after a call in which its threads still spin.
    """

    call: Callable[[], Any]
    estimate: float
    settle_seconds: float = 0.0

    @property
    def calls_per_sample(self) -> int:
        """Calls that are timed together, one after the other."""
        return max(1, math.ceil(_SAMPLE_SECONDS / self.estimate))

    @property
    def sample_seconds(self) -> float:
        """Seconds of one sample."""
        return self.calls_per_sample * self.estimate


def warm_up(call: Callable[[], Any]) -> float:
    """Calls a few times, twice unless that takes long, and returns the fastest call's seconds."""
    best, spent, count = math.inf, 0.0, 0
    begin = time.perf_counter()
    while spent < _WARM_UP_SECONDS or (count < 2 and spent < _LONG_SECONDS):
        now = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - now)
        spent = time.perf_counter() - begin
        count += 1
    return best


def interleave(
    timed: Sequence[Timed], order: Sequence[int], tick: Callable[[], Any] = lambda: None
) -> list[Timing]:
    """Measures calls, each of them between the others.

    Args:
        timed: The calls.
        order: Which call each sample is of; every call at least once. See `schedule`.
        tick: Called after every sample.
    """
    samples: list[list[tuple[float, float]]] = [[] for _ in timed]
    with _without_collections():
        for which in order:
            one = timed[which]
            samples[which].append(_sample(one.call, one.calls_per_sample))
            if one.settle_seconds:
                time.sleep(one.settle_seconds)
            tick()
    return [
        Timing(
            seconds=tuple(seconds / one.calls_per_sample for seconds, _ in taken),
            calls_per_sample=one.calls_per_sample,
            cores_busy=float(np.median([cpu / seconds for seconds, cpu in taken])),
        )
        for one, taken in zip(timed, samples, strict=True)
    ]


def schedule(lengths: Sequence[float], repetitions: Repetitions) -> list[int]:
    """The order of samples.

    Every round samples each call once, in an order that is drawn anew so that no call always
    follows the same other; calls that take longer than their share of the budget allows skip
    rounds, evenly.

    Args:
        lengths: Seconds of one sample of each call.
        repetitions: How often.
    """
    share = repetitions.budget / max(1, len(lengths))
    counts = [
        min(repetitions.most, max(repetitions.least, math.floor(share / length)))
        for length in lengths
    ]
    rounds = max(counts, default=0)
    draw = random.Random(0)
    order = []
    for number in range(rounds):
        due = [
            which
            for which, count in enumerate(counts)
            if (number + 1) * count // rounds > number * count // rounds
        ]
        draw.shuffle(due)
        order += due
    return order


def _sample(call: Callable[[], Any], count: int) -> tuple[float, float]:
    """Seconds, and processor seconds of all threads, of `count` calls."""
    processor, begin = time.process_time(), time.perf_counter()
    for _ in range(count):
        call()
    seconds = time.perf_counter() - begin
    return seconds, time.process_time() - processor


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Python collects garbage before, not in between."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
