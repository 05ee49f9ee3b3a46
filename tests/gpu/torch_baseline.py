"""The same layers in PyTorch, for a GPU: sort, gather, two grouped products, weighted sum.

Prints one JSON line for each shape, as kernel_bench does, and first the rate of a dense bf16
product, the ceiling of this card. Needs torch 2.8 or later, for `torch._grouped_mm`.
"""

import json
from collections.abc import Callable

import torch

from tests.gpu.shapes import SHAPES


def median_ms(function: Callable[[], object], repetitions: int = 15) -> float:
    for _ in range(3):
        function()
    times = []
    for _ in range(repetitions):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def report(baseline: str, milliseconds: float, operations: float, **more: object) -> None:
    tflops = operations / milliseconds / 1e9
    line = {"baseline": baseline, **more, "median_ms": milliseconds, "tflops": tflops}
    print(json.dumps(line), flush=True)


def random(*size: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*size, device="cuda", dtype=torch.bfloat16) * scale


def measure_layer(name: str, tokens: int, hidden: int, width: int, experts: int, k: int) -> None:
    x = random(tokens, hidden)
    gate_and_up = random(experts, hidden, 2 * width, scale=0.02)
    down = random(experts, width, hidden, scale=0.02)
    indices = torch.rand(tokens, experts, device="cuda").topk(k, 1).indices
    weights = torch.full((tokens, k), 1 / k, device="cuda")

    def layer() -> torch.Tensor:
        slots = indices.reshape(-1)
        order = slots.sort(stable=True).indices
        ends = torch.bincount(slots, minlength=experts).cumsum(0).to(torch.int32)
        both = torch._grouped_mm(x[order // k], gate_and_up, offs=ends)
        activated = torch.nn.functional.silu(both[:, :width]) * both[:, width:]
        rows = torch._grouped_mm(activated, down, offs=ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(tokens * k, device="cuda")
        returned = rows[back].view(tokens, k, hidden).float()
        return (returned * weights[:, :, None]).sum(1).to(x.dtype)

    operations = 6.0 * tokens * k * hidden * width
    report("torch grouped_mm layer", median_ms(layer), operations, shape=name, tokens=tokens)


def main() -> None:
    a, b = random(8192, 8192), random(8192, 8192)
    report("torch dense bf16 8192^3", median_ms(lambda: a @ b), 2.0 * 8192**3)
    for shape in SHAPES:
        measure_layer(*shape)


if __name__ == "__main__":
    main()
