"""Whether an opponent computes what it should, judged relative to the signal.

Every storage type has a unit roundoff u. Results, hidden activations, and what backward keeps or
moves are rounded to it a few times; sums over the hidden width, the intermediate width and the rows
of an expert are taken in float32. Independent roundings of relative size u and of float32 add up to
a relative root mean square error of

    eps = 4 u + 4 sqrt(H + D + N K / E) 2^-24,

with room to spare, and errors of this size explain a distance of eps^2 / 2 to the signal and a
largest error of z eps max|b| / rms(b), with z = 7 standard deviations. One expert that is missing,
or one row that was dropped by mistake, is one or two orders of magnitude beyond that.
"""

import math

import numpy as np

from benchmarks import platform
from benchmarks.cases import Case
from benchmarks.results import Check

_ROUNDINGS = 4
_DEVIATIONS = 7.0


def check(case: Case, got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> tuple[Check, ...]:
    """Compares results by name.

    Args:
        case: Whose results they are.
        got: Of the opponent.
        want: Of the oracle.

    Raises:
        ValueError: A result is missing, superfluous, or of the wrong shape.
    """
    if sorted(got) != sorted(want):
        raise ValueError(f"the results are {sorted(got)}; they should be {sorted(want)}")
    eps = relative_error(case)
    return tuple(_compare(name, got[name], want[name], eps) for name in sorted(want))


def relative_error(case: Case) -> float:
    """eps, the relative root mean square error that a right implementation may have."""
    shape = case.shape
    terms = shape.hidden + shape.intermediate + case.rows / shape.num_experts
    return _ROUNDINGS * (platform.roundoff(case.dtype) + math.sqrt(terms) * 2.0**-24)


def _compare(name: str, got: np.ndarray, want: np.ndarray, eps: float) -> Check:
    if got.shape != want.shape:
        raise ValueError(f"{name} has shape {got.shape}; it should have {want.shape}")
    difference = square_got = square_want = largest = largest_want = 0.0
    for a, b in zip(_pieces(got), _pieces(want), strict=True):
        error = a - b
        difference += _square(error)
        square_got += _square(a)
        square_want += _square(b)
        largest = max(largest, _peak(error))
        largest_want = max(largest_want, _peak(b))
    rms = math.sqrt(square_want / want.size)
    if not rms > 0:
        raise ValueError(f"{name} should be zero: nothing can be compared with it")
    return Check(
        result=name,
        signal=difference / (square_got + square_want),
        peak=largest / rms,
        signal_bound=eps**2 / 2,
        peak_bound=_DEVIATIONS * eps * largest_want / rms,
    )


def _pieces(array: np.ndarray) -> np.ndarray:
    """In float32: the experts of a weight gradient; anything else as one piece."""
    array = array.astype(np.float32, copy=False)
    return array if array.ndim == 3 else array[None]


def _square(values: np.ndarray) -> float:
    """The sum of the squares."""
    return float(np.vdot(values, values))


def _peak(values: np.ndarray) -> float:
    """The largest magnitude; infinite if any value is NaN."""
    peak = float(np.abs(values).max())
    return math.inf if math.isnan(peak) else peak
