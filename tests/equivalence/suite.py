"""The comparison that decides: every result of a case against the oracle's."""

from collections.abc import Mapping

import numpy as np

from . import bounds
from .bounds import Distance
from .cases import Layer, Load
from .evaluate import Results

COUNTS = ("tokens_per_expert", "dropped")

# Of the root mean square of every result, so that a bound relative to it means something.
ORDER_ONE = (0.1, 10.0)


class NotEquivalent(AssertionError):
    """Results differ from the oracle's; `names` are those of the results that do."""

    def __init__(self, case: str, complaints: dict[str, str]):
        self.names = set(complaints)
        lines = [f"  {name} {complaint}" for name, complaint in complaints.items()]
        super().__init__("\n".join([f"{case}:", *lines]))


def check(layer: Layer, load: Load, got: Results, want: Results) -> dict[str, Distance]:
    """Compares the results of an implementation with the oracle's.

    Returns:
        How far every floating result is from the oracle's, as fractions of its bounds.

    Raises:
        NotEquivalent: A result is missing, or is not what the oracle says.
    """
    eps = bounds.error_bounds(layer)
    fractions, complaints = {}, {}
    for name in got.keys() | want.keys():
        if name not in got or name not in want:
            complaints[name] = "is missing" if name in want else "is no result"
        elif got[name].shape != want[name].shape:
            complaints[name] = f"has shape {got[name].shape}, and should have {want[name].shape}"
        elif name in COUNTS:
            if not np.array_equal(got[name], want[name]):
                complaints[name] = f"is {got[name]}, and should be {want[name]}"
        elif np.any(got[name][want[name] == 0]):
            complaints[name] = "is not 0 where it must be"
        elif np.any(want[name]):
            distance = bounds.distance(got[name], want[name])
            bound = bounds.bound(eps[name], want[name])
            fraction = Distance(distance.signal / bound.signal, distance.peak / bound.peak)
            fractions[name] = fraction
            # Written so that a NaN fails.
            if not (fraction.signal <= 1 and fraction.peak <= 1):
                complaints[name] = f"has {distance}, and is allowed {bound}"
    if complaints:
        raise NotEquivalent(f"{layer}, load {load}", complaints)
    return fractions


def largest(fractions: Mapping[str, Distance]) -> Distance:
    """The largest fraction of either bound among all results."""
    return Distance(
        max(fraction.signal for fraction in fractions.values()),
        max(fraction.peak for fraction in fractions.values()),
    )


def check_order_one(layer: Layer, results: Results) -> None:
    """Checks that a bound relative to any result means something, and that none is 0 by chance.

    Raises:
        AssertionError: A root mean square is out of `ORDER_ONE`.
    """
    low, high = ORDER_ONE
    zero = {"d_selection_bias"}
    if layer.router == "caller":
        zero |= {"d_router", "load_balance_loss", "z_loss"}
    for name in results.keys() - zero - set(COUNTS):
        size = bounds.rms(results[name])
        assert low <= size <= high, f"{name} of {layer} has a root mean square of {size}"
