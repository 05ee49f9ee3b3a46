"""How far results may be from the oracle's: the two measures, and their bounds, derived.

For a result a and the oracle's b the suite takes

    signal(a, b) = 1 - 2<a, b> / (<a, a> + <b, b>) = |a - b|^2 / (|a|^2 + |b|^2)
    peak(a, b)   = max |a - b| / rms(b)

The first sees what is wrong everywhere, the second what is wrong in one place. Besides, a must be
exactly 0 wherever b is: in masked and dropped slots, for experts without rows.

Model. Every rounding multiplies a value by 1 + r, where the r are independent, of mean zero and
|r| <= u, the unit roundoff of the type (Higham and Mary, SIAM J. Sci. Comput. 41(5), 2019). Let a
result be the sum of terms t_j that all pass one *stage*, a place where an implementation rounds
values: those of `hidden`, say, on their way to y. The stage then adds sum_j t_j r_j to the result,
of variance at most u^2 sum_j t_j^2. The terms of products with random matrices have random signs,
so that sum_j t_j^2 is the mean square of the result itself: a stage adds a relative error of root
mean square u at most, however many values are rounded and summed. (u / sqrt(3) for uniformly
distributed roundings; nothing here makes use of that.) The stages are independent, so their squares
add:

    eps^2 = sum over stages of (c u)^2

where c = 1 but for a stage in front of an activation or its slope, whose condition enters; see
`_activation`. A sum of n terms, accumulated one after the other, rounds the partial sums, whose
mean square after i terms is i/n of the last one's: its n roundings have the relative variance
u^2 sum_i i/n = u^2 (n + 1)/2, and the products' add u^2. So a float32 sum of n terms counts as n
stages of u = 2^-24 (from n = 3 on; a blocked sum or a fused multiply-add rounds less): the error
grows like sqrt(n), not n.

Bounds. signal <= eps^2 / 2, since |a - b|^2 = eps^2 |b|^2 and the denominator is 2 |b|^2 to first
order. For the error of one element, Hoeffding's inequality with |r| <= u:

    P(|a_i - b_i| > z eps s_i) <= 2 exp(-z^2 / 2),    s_i^2 = sum_j t_ij^2

The largest s_i is below the largest |b_i|: b_i is a sum of these terms with random signs, and
somewhere they happen to add up. With the probability that a right implementation exceeds the bound
in any of the n elements of a result set to `_FAILURE_PROBABILITY`,

    peak <= z eps max|b| / rms(b),    z = sqrt(2 ln(2 n / probability)).

What a stage is follows from the operator's contract (sums in float32; the hidden activations, the
experts' outputs and y are stored) and from what a backward pass has to store or to move: see
`error_bounds`, which counts the stages of every result.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from measures import max_error, relative_distance

from flashmoe_jax.config import Activation
from flashmoe_jax.reference.ffn import ACTIVATIONS

from .cases import Layer

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_ACCUMULATION = UNIT_ROUNDOFF["float32"]

# The suite compares about 10^4 results.
_FAILURE_PROBABILITY = 1e-9

# Roundings of float32 inside an activation or its slope: about ten operations, among them an
# exponential or erf, whose approximations may be wrong by two units.
_ACTIVATION_STAGES = 16


@dataclasses.dataclass(frozen=True)
class Distance:
    """The two measures."""

    signal: float
    peak: float


def distance(got: np.ndarray, want: np.ndarray) -> Distance:
    """How far `got` is from the oracle's `want`, which must not be zero; NaN if `got` has one."""
    return Distance(relative_distance(got, want), max_error(got, want))


def bound(eps: float, want: np.ndarray) -> Distance:
    """The largest distance that errors of the relative root mean square `eps` explain."""
    largest = float(np.abs(want).max())
    return Distance(signal=eps**2 / 2, peak=_deviations(want.size) * eps * largest / rms(want))


def rms(values: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))


def _deviations(count: int) -> float:
    """z: the standard deviations that none of `count` errors exceeds."""
    return math.sqrt(2 * math.log(2 * count / _FAILURE_PROBABILITY))


def accumulation_bound(terms: int, sums: int) -> float:
    """How far any of `sums` float32 sums of `terms` terms, each of rms about 1, may be off."""
    return _deviations(sums) * _ACCUMULATION * math.sqrt(terms)


def error_bounds(layer: Layer) -> dict[str, float]:
    """eps of every floating result of a layer, in the notation of kernels/cpu/backward.cc.

    Forward may round to the stored type the hidden activations, the experts' outputs, and y.
    Backward may round a kept copy of the pre-activations, the hidden activations, the scaled
    cotangent w dy, its product da, the gradients dg and du of the pre-activations, the products
    that add up to a row of dx, that row, and every result; it may sum in the stored type over the
    slots of a token and over copies of a parameter on several PEs.
    """
    _, value, slope = _activation(layer.activation)
    hidden, inner, slots = layer.hidden, layer.intermediate, layer.experts_per_token
    gated, shared = layer.gated, bool(layer.num_shared_experts)
    rows, tokens, pes = layer.tokens * slots, layer.tokens, layer.token_shards

    def eps(stored: float, summed: float) -> float:
        """Of a number of stages of the stored type, and of terms of float32 sums."""
        return math.hypot(
            math.sqrt(stored) * UNIT_ROUNDOFF[layer.dtype], math.sqrt(summed) * _ACCUMULATION
        )

    def stored_sum(terms: int) -> float:
        """Stages of a sum in the stored type of `terms` terms that are rounded already."""
        return (terms + 1) / 2 if terms > 1 else 0

    # Float32 sums: the logits with which the rows are weighed; then, with those in it, the hidden
    # activations and the gradients of the pre-activations, gate (or up of a plain network) and up.
    weighed = hidden + layer.num_experts
    hidden_sums = weighed + (value + gated) * hidden + _ACTIVATION_STAGES
    dg_sums = weighed + hidden + (slope + gated) * hidden + _ACTIVATION_STAGES
    du_sums = weighed + hidden + value * hidden + _ACTIVATION_STAGES if gated else dg_sums
    # Stages: w dy, da, the kept pre-activations, dg or du.
    dg = 3 + slope + gated
    du = 3 + value if gated else dg
    copies = stored_sum(layer.data_groups or 1)
    shared_copies = stored_sum(pes)

    # <dy, o> = <da, a>: hidden and output, or the kept pre-activations and da.
    d_weights = eps(3 + value + gated, hidden_sums + inner + hidden)
    d_gate = eps(dg + 1 + copies, dg_sums + rows)
    d_up = eps(du + 1 + copies, du_sums + rows)
    return {
        "y": eps(3 + shared, hidden_sums + inner + slots + pes),
        "d_x": eps(
            # The products and their sum; the slots; the share of the router; that of the shared.
            max(dg, du) + 1 + gated + max(1, stored_sum(slots)) + 2 + shared,
            max(dg_sums, du_sums) + (1 + gated) * inner + slots,
        ),
        "d_weights": d_weights,
        "d_router": math.hypot(d_weights, eps(0, tokens + weighed + pes)),
        "d_gate": d_gate,
        "d_up": d_up,
        # The kept pre-activations, hidden, w dy (or w hidden), the result.
        "d_down": eps(value + gated + 3 + copies, hidden_sums + rows),
        "d_gate_bias": d_gate,
        "d_up_bias": d_up,
        "d_down_bias": eps(2 + copies, weighed + rows),
        # da, dg, the result; hidden, the result. Their dy is not scaled and nothing is kept.
        "d_shared.gate": eps(3 + shared_copies, dg_sums + tokens),
        "d_shared.up": eps(3 + shared_copies, du_sums + tokens),
        "d_shared.down": eps(2 + shared_copies, hidden_sums + tokens),
        "load_balance_loss": eps(0, weighed + tokens + pes),
        "z_loss": eps(0, weighed + tokens + pes),
    }


class _Activation(NamedTuple):
    """An activation at normally distributed arguments g.

    Attributes:
        rms: Root mean square of act(g).
        value_condition: Square of how much act(g) amplifies a relative error of g.
        slope_condition: The same of act'(g).
    """

    rms: float
    value_condition: float
    slope_condition: float


def activation_rms(activation: Activation) -> float:
    """Root mean square of act(g) for normally distributed g."""
    return _activation(activation).rms


@functools.cache
def _activation(activation: Activation) -> _Activation:
    """The conditions hold for a root mean square error of g that is relative to that of g.

    It may be proportional to g, a rounding's, or independent of it, an accumulation's: the worse
    counts. The kink of relu counts for nothing, since a rounding does not change a sign and the
    inputs keep clear of where an accumulation could.
    """
    step = 1 / 128
    g = np.arange(-8 + step / 2, 8, step)
    density = np.exp(-(g**2) / 2) / math.sqrt(2 * math.pi) * step

    def mean_square(values: np.ndarray) -> float:
        return float(np.sum(density * values**2))

    with jax.enable_x64(True):
        value = ACTIVATIONS[activation]
        slope = jax.grad(value)
        values, slopes, curvatures = (
            np.asarray(jax.vmap(f)(jnp.asarray(g))) for f in (value, slope, jax.grad(slope))
        )
    return _Activation(
        rms=math.sqrt(mean_square(values)),
        value_condition=max(mean_square(slopes), mean_square(g * slopes)) / mean_square(values),
        slope_condition=(
            max(mean_square(curvatures), mean_square(g * curvatures)) / mean_square(slopes)
        ),
    )
