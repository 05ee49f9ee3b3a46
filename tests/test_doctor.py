"""The command that says what is installed and what would run."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

import flashmoe_jax as fm
from flashmoe_jax import _ffi, doctor
from tests.fake_cuda import FakeGpu


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flashmoe_jax", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_machine_on_which_fused_runs() -> None:
    process = run("doctor", FLASHMOE_CPU_THREADS="3", FLASHMOE_DEADLINE_SECONDS="7")
    assert process.returncode == 0, process.stderr
    first, *lines = process.stdout.splitlines()
    assert first == f"flashmoe_jax {fm.__version__}: fused runs"
    found = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    assert found["jax"] == jax.__version__
    assert found["cores"] == "3"
    assert found["deadline_seconds"] == "7.0"


def test_report_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "fused runs"
    assert report["reasons"] == []
    assert report["devices"] == {"platform": "cpu", "devices": 8, "processes": 1}
    engine = report["engine"]
    assert engine["instruction_set"] in engine["supported_instruction_sets"]
    assert engine["cores"] >= 1
    assert 0 <= report["trial_error"] < 1e-5


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FLASHMOE_CPU_ISA", "mmx"),
        ("FLASHMOE_CPU_THREADS", "many"),
        ("FLASHMOE_DEADLINE_SECONDS", "-1"),
    ],
)
def test_a_wrong_variable(variable: str, value: str) -> None:
    process = run("doctor", **{variable: value})
    assert process.returncode == 2
    assert process.stdout.startswith(f"flashmoe_jax {fm.__version__}: broken\n  {variable}")
    assert "Traceback" not in process.stderr


def test_an_extension_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ffi, "_extension", lambda: ImportError("libsomething.so is missing"))
    report = doctor.examine()
    assert report.verdict == "broken"
    (reason,) = report.reasons
    assert "libsomething.so is missing" in reason
    assert report.engine == {}


def test_a_platform_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert doctor.main([]) == 1
    report = doctor.examine()
    assert report.verdict == "another implementation runs"
    assert report.reasons == (_ffi.unavailable_reason("tpu"),)
    assert report.trial_error is None


@pytest.mark.parametrize("wrong", [2.0, float("nan")])
def test_a_kernel_that_computes_something_else(
    monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    moe = fm.moe

    def faulty(*arguments: Any, implementation: Any, **options: Any) -> Any:
        y, aux = moe(*arguments, implementation=implementation, **options)
        return (wrong * y if implementation == "fused" else y), aux

    monkeypatch.setattr(fm, "moe", faulty)
    report = doctor.examine()
    assert report.verdict == "broken"
    assert "off by" in report.reasons[0]


GPU = {
    "ordinal": 0,
    "name": "NVIDIA Test",
    "compute_capability": "9.0",
    "multiprocessors": 132,
    "peers": [1, 3],
}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The CUDA extension of a machine with one GPU and a fitting NVSHMEM."""
    extension = SimpleNamespace(
        NVSHMEM_BUILT_FOR=(3, 3, 24),
        versions=lambda: {"built with": "13.0", "of the driver": "13.1"},
        gpu_count=lambda: 1,
        gpu=lambda ordinal: GPU,
        free_and_total_memory=lambda ordinal: (3 * 2**30, 4 * 2**30),
        reserved_bytes=lambda ordinal: 2**29,
        load_nvshmem=lambda path: (3, 8, 0),
    )
    monkeypatch.setattr(_ffi, "_cuda_extension", lambda: extension)
    monkeypatch.setattr(_ffi, "why_not_several_gpus", lambda: None)
    _ffi.load_nvshmem.cache_clear()
    yield extension
    _ffi.load_nvshmem.cache_clear()


def cuda_lines() -> list[str]:
    lines = str(doctor.examine()).splitlines()
    return lines[lines.index("CUDA") + 1 :]


@pytest.mark.usefixtures("cuda")
def test_a_gpu() -> None:
    report = doctor.examine()
    assert report.cuda["gpus"] == [
        {
            **GPU,
            "memory_bytes": 4 * 2**30,
            "free_bytes": 3 * 2**30,
            "reserved_bytes": 2**29,
            "xla_limit_bytes": None,
        }
    ]
    found = dict(line.strip().split("  ", maxsplit=1) for line in cuda_lines())
    found = {name: value.strip() for name, value in found.items()}
    assert found["kernel"] == "loaded"
    assert found["CUDA of the driver"] == "13.1"
    assert found["GPU 0"] == (
        "NVIDIA Test, compute capability 9.0, 132 multiprocessors, 3.0 of 4.0 GiB free, 0.5 "
        "reserved for calls, peer access to: 1, 3"
    )
    assert found["NVSHMEM"] == "3.8.0"
    assert found["NVSHMEM built for"] == "3.3.24"
    assert found["NVSHMEM_SYMMETRIC_SIZE"] == "not set"
    assert found["calls over several GPUs"] == "possible"


@pytest.mark.usefixtures("cuda")
def test_the_memory_of_xla_and_of_nvshmem(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(
        platform="gpu", local_hardware_id=0, memory_stats=lambda: {"bytes_limit": 3 * 2**30}
    )
    monkeypatch.setattr(_ffi, "gpus", lambda: [device])
    monkeypatch.setenv("NVSHMEM_SYMMETRIC_SIZE", "2G")
    found = doctor._cuda()
    assert found["gpus"][0]["xla_limit_bytes"] == 3 * 2**30
    lines = "\n".join(doctor._cuda_lines(found))
    assert "3.0 of 4.0 GiB free, at most 3.0 for XLA, 0.5 reserved for calls" in lines
    assert lines.splitlines()[-2].split() == ["NVSHMEM_SYMMETRIC_SIZE", "2G"]


def test_a_process_with_several_gpus(
    cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(_ffi, "_cuda_extension", lambda: cuda)
    device = SimpleNamespace(platform="gpu", local_hardware_id=0, memory_stats=dict)
    monkeypatch.setattr(_ffi, "gpus", lambda: [device, device])
    found = doctor._cuda()
    assert "this process has 2 GPUs" in found["several_gpus"]
    assert "one per GPU and call jax.distributed.initialize" in found["several_gpus"]
    monkeypatch.setattr(_ffi, "gpus", lambda: [device])
    assert doctor._cuda()["several_gpus"] == "possible"


def test_a_driver_that_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 580.159.04\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert doctor._nvidia_driver() == "580.159.04"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert doctor._nvidia_driver() is None


def test_a_cuda_extension_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ffi, "_cuda_extension", lambda: ImportError("libcudart is missing"))
    report = doctor.examine()
    assert report.verdict == "fused runs", "JAX computes on CPU here"
    assert report.cuda["extension"] == "could not be loaded (libcudart is missing)"
    assert report.cuda["gpus"] == []
    assert any("could not be loaded (libcudart is missing)" in line for line in cuda_lines())


def test_a_cuda_extension_that_the_gpu_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ffi, "_cuda_extension", lambda: ImportError("libcudart is missing"))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    report = doctor.examine()
    assert report.verdict == "another implementation runs"
    assert "libcudart is missing" in report.reasons[0]


@pytest.mark.usefixtures("cuda")
def test_gpus_whose_kernel_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(doctor, "_trial_error", lambda: 1e-6)
    report = doctor.examine()
    assert (report.verdict, report.reasons, report.trial_error) == ("fused runs", (), 1e-6)
    monkeypatch.setattr(_ffi, "gpus", lambda: [FakeGpu(), FakeGpu()])
    report = doctor.examine()
    assert report.verdict == "another implementation runs"
    assert report.reasons == (
        "the CUDA kernel has been proven on one GPU only; implementation='fused' asks for it on "
        "several",
    )
    monkeypatch.setattr(doctor, "_trial_error", lambda: 1.0)
    assert doctor.examine().verdict == "broken"


def test_a_driver_and_an_nvshmem_that_do_not_fit(
    cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(message: str) -> Any:
        raise RuntimeError(message)

    monkeypatch.setattr(cuda, "gpu_count", lambda: refuse("the driver is too old"))
    monkeypatch.setattr(cuda, "load_nvshmem", lambda path: refuse("NVSHMEM 3.1.0 was found"))
    report = doctor.examine()
    assert report.cuda["versions"] == {"error": "the driver is too old"}
    assert report.cuda["nvshmem"] == "NVSHMEM 3.1.0 was found"
    json.dumps(report.cuda)


def test_unknown_command() -> None:
    process = run("diagnose")
    assert process.returncode != 0
    assert "usage: python -m flashmoe_jax doctor" in process.stderr
