"""PyTorch, where it is installed: a loop over the experts, and grouped products.

On one device: the CPU with all cores, or the card that JAX computes on.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks import inputs, platform
from benchmarks.cases import Case
from benchmarks.program import Program

# OpenMP's threads spin for a few milliseconds when they have nothing to do.
SETTLE_SECONDS = 0.02

# Of x [N, H], expert [N, K], weight [N, K], gate or None, up, down: y [N, H] float32.
Experts = Callable[..., Any]


def _torch() -> Any:
    return importlib.import_module("torch")


def why_not(case: Case) -> str | None:
    """Why PyTorch cannot compute a case here, or None."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    if not platform.is_cpu() and not _torch().cuda.is_available():
        return "JAX computes on a card, but this PyTorch cannot"
    return None


def why_not_grouped(case: Case) -> str | None:
    """Why PyTorch has no grouped product for a case here, or None."""
    reason = why_not(case)
    if reason is None and _grouped_product() is None:
        reason = "this PyTorch has no grouped_mm"
    if reason is None and (case.row_bytes % 16 or case.shape.intermediate % 8):
        reason = "grouped_mm wants rows of a multiple of 16 bytes"
    return reason


def _grouped_product() -> Any | None:
    torch = _torch()
    public = getattr(torch.nn.functional, "grouped_mm", None)
    return public if public is not None else getattr(torch, "_grouped_mm", None)


class TorchProgram:
    """A layer in PyTorch, with its gradients if the case wants them.

    Args:
        case: The case.
        experts: Computes the routed rows.
    """

    def __init__(self, case: Case, experts: Experts) -> None:
        given = inputs.inputs(case)
        p = given.parameters
        names = ("x", "router", "gate", "up", "down")
        arrays = (given.x, p.router, p.gate, p.up, p.down)
        self._operands = {
            name: _tensor(array).requires_grad_(case.backward)
            for name, array in zip(names, arrays, strict=True)
            if array is not None
        }
        self._cotangent = _tensor(given.cotangent)
        self._experts = experts
        self._case = case

    def compile(self) -> None:
        """Nothing: PyTorch runs eagerly."""

    def __call__(self) -> Any:
        """Computes, and returns when the results are there."""
        torch = _torch()
        with torch.set_grad_enabled(self._case.backward):
            y = self._layer(torch)
            outputs = [y]
            if self._case.backward:
                outputs += torch.autograd.grad(y, list(self._operands.values()), self._cotangent)
        if y.is_cuda:
            torch.cuda.synchronize()
        return outputs

    def _layer(self, torch: Any) -> Any:
        x = self._operands["x"]
        logits = x.float() @ self._operands["router"]
        best, expert = logits.topk(self._case.shape.experts_per_token, dim=1)
        weight = torch.softmax(best, dim=1)
        weights = (self._operands.get(name) for name in ("gate", "up", "down"))
        return self._experts(torch, x, expert, weight, *weights).to(x.dtype)

    def results(self, outputs: Any) -> dict[str, np.ndarray]:
        """What a call returned, by the names of `oracle.expected`."""
        names = ["y"]
        if self._case.backward:
            names += [f"d_{name}" for name in self._operands]
        return {
            name: output.detach().float().cpu().numpy()
            for name, output in zip(names, outputs, strict=True)
        }

    def xla_bytes(self) -> dict[str, int] | None:
        """None: XLA has no part in it."""
        return None

    def moved_bytes(self) -> int | None:
        """None: there is one device."""
        return None


def _tensor(array: np.ndarray) -> Any:
    torch = _torch()
    if array.dtype == ml_dtypes.bfloat16:
        # NumPy's bfloat16 is unknown to PyTorch.
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    return tensor.to("cpu" if platform.is_cpu() else "cuda", copy=True)


def _loop(torch: Any, x: Any, expert: Any, weight: Any, gate: Any, up: Any, down: Any) -> Any:
    """As Hugging Face's models do: the tokens of one expert after the other."""
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for index in range(up.shape[0]):
        token, slot = torch.where(expert == index)
        rows = x[token]
        hidden = _activate(torch, rows @ up[index], None if gate is None else rows @ gate[index])
        outputs = (hidden @ down[index]).float() * weight[token, slot, None]
        y = y.index_add(0, token, outputs)
    return y


def _grouped(torch: Any, x: Any, expert: Any, weight: Any, gate: Any, up: Any, down: Any) -> Any:
    """Rows sorted by expert, and one product for all of them."""
    product = _grouped_product()
    assert product is not None  # else it would not be available
    slots = expert.shape[1]
    order = torch.argsort(expert.reshape(-1), stable=True)
    counts = torch.bincount(expert.reshape(-1), minlength=up.shape[0])
    grouped = functools.partial(product, offs=counts.cumsum(0).to(torch.int32))
    rows = x[order // slots]
    hidden = _activate(torch, grouped(rows, up), None if gate is None else grouped(rows, gate))
    outputs = grouped(hidden, down).float() * weight.reshape(-1)[order, None]
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    return y.index_add(0, order // slots, outputs)


def _activate(torch: Any, up: Any, gate: Any) -> Any:
    silu = torch.nn.functional.silu
    return silu(up) if gate is None else silu(gate) * up


def large_product(size: int, dtype: str) -> Callable[[], Any] | None:
    """A product of two [size, size] matrices; None where PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    torch = _torch()
    device = "cpu" if platform.is_cpu() else "cuda"
    a, b = (torch.randn(size, size).to(getattr(torch, dtype)).to(device) for _ in range(2))

    def product() -> None:
        torch.matmul(a, b)
        if device == "cuda":
            torch.cuda.synchronize()

    return product


OPPONENTS: tuple[
    tuple[str, Callable[[Case], Program], Callable[[Case], str | None]],
    ...,
] = (
    ("torch-loop", lambda case: TorchProgram(case, _loop), why_not),
    ("torch-grouped", lambda case: TorchProgram(case, _grouped), why_not_grouped),
)
