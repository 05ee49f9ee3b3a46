"""How far one array is from another, relative to the signal that the other carries."""

from typing import Any

import jax
import numpy as np


def relative_distance(got: Any, want: Any) -> float:
    """1 - 2 <a, b> / (<a, a> + <b, b>): 0 for equal arrays, 1 for a zero, 2 for a flipped sign."""
    a, b = _float64(got), _float64(want)
    # Written as |a - b|^2 / (|a|^2 + |b|^2), which does not cancel.
    return float(np.sum((a - b) ** 2) / (np.sum(a**2) + np.sum(b**2)))


def max_error(got: Any, want: Any) -> float:
    """max |a - b| / rms(b)."""
    a, b = _float64(got), _float64(want)
    return float(np.max(np.abs(a - b)) / np.sqrt(np.mean(b**2)))


def assert_close(got: Any, want: Any, rounding: float) -> None:
    """Every leaf agrees with the wanted one up to `rounding`, by both measures, and none is zero.

    Args:
        got: A tree of arrays.
        want: The same tree, computed with far less rounding.
        rounding: Error of one value relative to the values that it is a sum or product of. Those
            are of the size of the leaf's rms, hence the distance is at most its square; the
            error of the worst value is at most that of the largest one.
    """
    got_leaves, got_tree = jax.tree_util.tree_flatten_with_path(got)
    want_leaves, want_tree = jax.tree.flatten(want)
    assert got_tree == want_tree
    for (path, a), b in zip(got_leaves, want_leaves, strict=True):
        name = jax.tree_util.keystr(path)
        assert np.shape(a) == np.shape(b), name
        largest = np.max(np.abs(_float64(b)))
        assert largest > 0, f"{name}: nothing to compare with"
        peak = largest / np.sqrt(np.mean(_float64(b) ** 2))
        assert max_error(a, b) <= rounding * peak, name
        assert relative_distance(a, b) <= rounding**2, name


def _float64(array: Any) -> np.ndarray:
    return np.asarray(array, np.float64)
