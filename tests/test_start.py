"""All processes of a program start NVSHMEM, or all of them say why not."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from start_nvshmem import CASES, PROCESSES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What came of every case in each of the processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    files = [tmp_path_factory.mktemp("start") / "outcomes.json" for _ in range(PROCESSES)]
    program = [sys.executable, "-m", "tests.start_nvshmem", address]
    processes = [
        subprocess.Popen(
            [*program, str(process), file],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process, file in enumerate(files)
    ]
    try:
        for process in processes:
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [json.loads(file.read_text()) for file in files]


REASONS = {
    "two GPUs": "process 1 has 2 GPUs, and the CUDA kernel spans several GPUs only with one",
    "without NVSHMEM": "the processes cannot start NVSHMEM: "
    "processes 1, 2: load_nvshmem fails: it says 'no', \u2026",
    "without an id": "process 0: nvshmem_unique_id fails",
    "unlike": "of one compute capability only, and here they differ (processes 0, 1: 9.0; "
    "process 2: 8.0); use implementation='xla'",
    "without atomics": "native atomics between them, as over NVLink, and those of processes 0 and "
    "1, 1 and 2 have none; use implementation='xla'",
    "atomics unknown": "process 1: peer_atomics fails",
    "does not start": "process 2: start_nvshmem fails",
}


@pytest.mark.parametrize("case", CASES)
def test_all_processes_raise_alike_or_none(outcomes: list[dict[str, Any]], case: str) -> None:
    found = [outcome[case] for outcome in outcomes]
    if case in REASONS:
        assert REASONS[case] in found[0]
        assert found == found[:1] * PROCESSES
        return
    # What each process reaches, one after the other.
    reach = [pe <= rank for rank in range(PROCESSES) for pe in range(PROCESSES)]
    assert found == [
        {"started": [[rank, PROCESSES, 0]], "reach": reach} for rank in range(PROCESSES)
    ]
