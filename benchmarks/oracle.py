"""What a case must give, expert by expert in NumPy, with gradients written out by hand.

It shares no code with any opponent. Only the kept rows are computed, so it is affordable for every
case, in float32.
"""

import numpy as np

from benchmarks.cases import Case, Semantics
from benchmarks.inputs import Inputs


def kept_rows(indices: np.ndarray, case: Case, semantics: Semantics) -> np.ndarray:
    """[N, K] bool: an expert keeps its first rows in token order, up to the capacity.

    Args:
        indices: [N, K] experts.
        case: Of which the capacity is.
        semantics: With "capacity per source", every PE's tokens have a capacity of their own.
    """
    capacity = case.capacity(semantics)
    if capacity is None:
        return np.ones(indices.shape, np.bool_)
    sources = case.num_pes if semantics == "capacity per source" else 1
    token_source = np.arange(case.tokens) * sources // case.tokens
    bins = (token_source[:, None] * case.shape.num_experts + indices).reshape(-1)
    order = np.argsort(bins, kind="stable")
    counts = np.bincount(bins, minlength=sources * case.shape.num_experts)
    starts = np.cumsum(counts) - counts
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size) - starts[bins[order]]
    return (rank < capacity).reshape(indices.shape)


def rows_between_pes(indices: np.ndarray, keep: np.ndarray, case: Case) -> np.ndarray:
    """[P, P]: kept rows that each PE (axis 0) sends to the experts of each PE (axis 1)."""
    pes = case.num_pes
    source = np.arange(case.tokens) * pes // case.tokens
    owner = indices * pes // case.shape.num_experts
    pairs = (source[:, None] * pes + owner)[keep]
    return np.bincount(pairs, minlength=pes * pes).reshape(pes, pes)


def expected(case: Case, given: Inputs, keep: np.ndarray) -> dict[str, np.ndarray]:
    """The results of a case, float32.

    Args:
        case: The case.
        given: Its inputs.
        keep: [N, K] bool, the rows that are kept.

    Returns:
        y [N, H]; and with backward d_x [N, H], d_router [H, E], d_gate (if gated), d_up [E, H, D],
        d_down [E, D, H].
    """
    parameters = given.parameters
    x, router = _float32(given.x), parameters.router
    chosen = np.take_along_axis(x @ router, given.indices, axis=1)
    # softmax over all experts, renormalised over the chosen ones, is softmax over those.
    weights = np.exp(chosen - chosen.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)

    y, dx = np.zeros_like(x), np.zeros_like(x)
    d_weights = np.zeros_like(weights)
    dy = _float32(given.cotangent)
    gradients: dict[str, list[np.ndarray]] = {"d_gate": [], "d_up": [], "d_down": []}
    for expert in range(case.shape.num_experts):
        token, slot = np.nonzero(keep & (given.indices == expert))
        rows, weight = x[token], weights[token, slot, None]
        up, down = _float32(parameters.up[expert]), _float32(parameters.down[expert])
        upper = rows @ up
        if parameters.gate is None:
            inner, factor = upper, np.ones((1, 1), np.float32)
        else:
            gate = _float32(parameters.gate[expert])
            inner, factor = rows @ gate, upper
        sigmoid = 1 / (1 + np.exp(-inner))
        hidden = inner * sigmoid * factor
        outputs = hidden @ down
        y[token] += weight * outputs  # a token names an expert only once
        if not case.backward:
            continue
        d_outputs = weight * dy[token]
        d_weights[token, slot] = (dy[token] * outputs).sum(1)
        d_hidden = d_outputs @ down.T
        d_inner = d_hidden * factor * sigmoid * (1 + inner * (1 - sigmoid))
        d_upper = d_inner if parameters.gate is None else d_hidden * inner * sigmoid
        dx[token] += d_upper @ up.T
        gradients["d_up"].append(rows.T @ d_upper)
        gradients["d_down"].append(hidden.T @ d_outputs)
        if parameters.gate is not None:
            dx[token] += d_inner @ gate.T
            gradients["d_gate"].append(rows.T @ d_inner)
    if not case.backward:
        return {"y": y}
    d_chosen = weights * (d_weights - (d_weights * weights).sum(1, keepdims=True))
    d_logits = np.zeros((case.tokens, case.shape.num_experts), np.float32)
    np.put_along_axis(d_logits, given.indices, d_chosen, axis=1)
    stacked = {name: np.stack(parts) for name, parts in gradients.items() if parts}
    return {"y": y, "d_x": dx + d_logits @ router.T, "d_router": x.T @ d_logits, **stacked}


def _float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32, copy=False)
