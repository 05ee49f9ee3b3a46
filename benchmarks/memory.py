"""Peak memory of one opponent, in a process of its own: `python -m benchmarks.memory`.

`peak` starts that process. It reads a `Request` from standard input and writes a `results.Memory`
to the file that its argument names.
"""

import dataclasses
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.results import Memory, Run, decode

_CALLS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure."""

    case: Case
    opponent: str


def peak(case: Case, run: Run, environment: Mapping[str, str], root: Path) -> Memory | None:
    """Measures in a new process.

    Args:
        case: The case.
        run: Of the opponent.
        environment: For the process.
        root: Folder of the repository.

    Returns:
        What was measured; None if the process failed, which has said why on standard error.
    """
    request = json.dumps(dataclasses.asdict(Request(case=case, opponent=run.opponent)))
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "memory.json"
        command = [sys.executable, "-m", "benchmarks.memory", str(answer)]
        subprocess.run(
            command, input=request, text=True, env=dict(environment), cwd=root, check=False
        )
        return decode(Memory, json.loads(answer.read_text())) if answer.exists() else None


def _measure(case: Case, opponent: str) -> Memory:
    from benchmarks import platform
    from benchmarks.opponents import OPPONENTS

    computation = OPPONENTS[opponent].build(case)
    computation.compile()
    gc.collect()
    meter = platform.PeakMeter()
    for _ in range(_CALLS):
        computation()
    growth = meter.growth_bytes()
    buffers = computation.xla_bytes()
    layout = None
    if buffers is not None and OPPONENTS[opponent].family == "fused":
        semantics = OPPONENTS[opponent].semantics
        of_xla = buffers["temp"] + buffers["output"]
        layout = case.num_pes * (of_xla + _heap_bytes(case, case.capacity(semantics)))
    return Memory(growth_bytes=growth, layout_bytes=layout)


def _heap_bytes(case: Case, capacity: int | None) -> int:
    """Bytes of the symmetric heaps that one PE has for a call."""
    from benchmarks.program import config
    from flashmoe_jax import _ffi
    from flashmoe_jax.local_call import local_call

    shape, tokens = case.shape, case.tokens // case.num_pes
    call = local_call(
        config(case, "dropless" if capacity is None else "capacity"),
        axis=None,
        num_pes=case.num_pes,
        tokens_per_pe=tokens,
        group_tokens=case.tokens,
        caller_routing=False,
    )

    def heap(backward: bool) -> int:
        return _ffi.extension().heap_bytes(
            case.num_pes,
            tokens,
            shape.hidden,
            shape.num_experts,
            shape.experts_per_token,
            call.max_rows,
            case.row_bytes // shape.hidden,
            backward,
            False,
        )

    return heap(False) + (heap(True) if case.backward else 0)


def main() -> None:
    """Measures what standard input asks for."""
    request = decode(Request, json.load(sys.stdin))
    found = _measure(request.case, request.opponent)
    Path(sys.argv[1]).write_text(json.dumps(dataclasses.asdict(found)))


if __name__ == "__main__":
    main()
