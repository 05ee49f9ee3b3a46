"""Bytes that PEs send to each other, counted, against the least possible."""

import math
import re

import numpy as np

from benchmarks import oracle
from benchmarks.cases import Case, Semantics

# Beside every row that the operator sends, of kernels/core/heap_layout.h: where it comes from, and
# backward the weight of its slot, whose gradient comes back.
_ORIGIN_BYTES = 8
_WEIGHT_BYTES = 4
_COUNT_BYTES = 4

_DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_DTYPE_BYTES |= {"s64": 8, "u64": 8, "f64": 8}
# "%name = TYPE opcode(": the type may be a tuple with comments, which have an = too.
_COLLECTIVE = re.compile(
    r"^[^=\n]+= (?P<type>.*?) "
    r"(?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?P<start>-start)?\(",
    re.MULTILINE,
)
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*)\[(?P<sizes>[\d,]*)\]")


def rows_leaving(indices: np.ndarray, case: Case, semantics: Semantics) -> int:
    """Kept rows whose expert is on another PE than their token.

    By the plan of the operator itself where it can be inspected, else from the routing.

    Args:
        indices: [N, K] experts.
        case: The case.
        semantics: Which rows are kept.
    """
    by_pe = rows_by_plan(indices, case, semantics)
    if by_pe is None:
        keep = oracle.kept_rows(indices, case, semantics)
        by_pe = oracle.rows_between_pes(indices, keep, case)
    return int(by_pe.sum() - np.trace(by_pe))


def rows_by_plan(indices: np.ndarray, case: Case, semantics: Semantics) -> np.ndarray | None:
    """[P, P]: rows that the operator's plan sends from PE to PE; None if it cannot be asked."""
    if semantics == "capacity per source":
        return None  # not the operator's
    try:
        from flashmoe_jax import introspect
    except ImportError:
        return None
    experts, pes = case.shape.num_experts, case.num_pes
    source = np.arange(case.tokens) * pes // case.tokens
    counts = np.zeros((pes, experts), np.int64)
    np.add.at(counts, (source[:, None], indices), 1)
    plan = introspect.plan(
        counts,
        tokens=case.tokens // pes,
        hidden=case.shape.hidden,
        intermediate=case.shape.intermediate,
        experts_per_token=case.shape.experts_per_token,
        capacity=case.capacity(semantics),
        max_rows=case.rows,
        block_rows=128,
        block_tokens=128,
        block_columns=128,
    )
    kept = np.asarray(plan.sources["kept"], np.int64)
    return kept.reshape(pes, pes, experts // pes).sum(2)


def least_bytes(leaving: int, case: Case) -> int:
    """What no implementation can save: each row goes to its expert and a row comes back.

    Backward, the gradient of the output goes and that of the row comes back.

    Args:
        leaving: Kept rows whose expert is on another PE.
        case: The case.
    """
    return leaving * case.row_bytes * (4 if case.backward else 2)


def fused_bytes(leaving: int, case: Case) -> int:
    """What the operator's puts carry, signals aside.

    Args:
        leaving: Kept rows whose expert is on another PE.
        case: The case.
    """
    counts = case.num_pes * (case.num_pes - 1) * case.shape.num_experts * _COUNT_BYTES
    moved = leaving * (2 * case.row_bytes + _ORIGIN_BYTES) + counts
    if case.backward:
        moved += leaving * (2 * case.row_bytes + _ORIGIN_BYTES + 2 * _WEIGHT_BYTES) + counts
    return moved


def collective_bytes(program: str, devices: int) -> int | None:
    """What the collectives of a compiled program have to move between all its devices.

    Of s bytes on each of g devices, a device must receive (g - 1) / g of an all-gather's or
    all-to-all's result, as much of a reduce-scatter's operand, twice that of an all-reduce, and all
    of a permutation.

    Args:
        program: Its text, as XLA prints it.
        devices: g; every collective of the program spans all of them.

    Returns:
        Bytes; None if the program has a form of collective that is not understood.
    """
    total = 0.0
    for match in _COLLECTIVE.finditer(program):
        sizes = [_array_bytes(m["dtype"], m["sizes"]) for m in _ARRAY.finditer(match["type"])]
        if match["start"] or None in sizes:
            return None
        result = sum(size for size in sizes if size is not None)
        per_device = {
            "all-gather": result * (devices - 1) / devices,
            "all-to-all": result * (devices - 1) / devices,
            "reduce-scatter": result * (devices - 1),
            "all-reduce": 2 * result * (devices - 1) / devices,
            "collective-permute": result,
        }
        total += per_device[match["kind"]] * devices
    return round(total)


def _array_bytes(dtype: str, sizes: str) -> int | None:
    if dtype not in _DTYPE_BYTES:
        return None
    return _DTYPE_BYTES[dtype] * math.prod(int(size) for size in sizes.split(",") if size)
