"""What is installed, which implementation would run here, and why: `python -m flashmoe_jax doctor`.

Exit status: 0 if the fused implementation runs and computes what it should, 1 if "auto" would take
another one, 2 if something is broken.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

import flashmoe_jax as fm
from flashmoe_jax import _ffi
from flashmoe_jax.config import deadline_seconds

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "jax-cuda13-plugin", "nvidia-nvshmem-cu13")
_TRIAL_SECONDS = 20.0
# Far above what rounding to float32 does in so small a layer, far below what one wrong row does.
_TRIAL_BOUND = 1e-4

Verdict = Literal["fused runs", "another implementation runs", "broken"]
_STATUS: dict[Verdict, int] = {"fused runs": 0, "another implementation runs": 1, "broken": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was found.

    Attributes:
        verdict: In two words.
        reasons: What is broken, or why "auto" does not take the fused implementation; else empty.
        versions: Of Python and of the packages that matter; None: not installed.
        devices: The platform of JAX's default devices, how many there are, and in how many
            processes.
        engine: Of the CPU engine: cores, instruction sets, deadline in seconds; empty if it cannot
            be loaded.
        trial_error: Largest difference, relative to the largest value, between the fused and the
            dense implementation in a small layer, output and gradients; None: not tried.
        cuda: NVIDIA driver, the kernel's extension, its GPUs with the memory reserved on them and
            XLA's share, NVSHMEM found and built for, and what several GPUs lack; a value is None
            where there is nothing.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    versions: dict[str, str | None]
    devices: dict[str, Any]
    engine: dict[str, Any]
    trial_error: float | None
    cuda: dict[str, Any]

    def __str__(self) -> str:
        lines = [f"flashmoe_jax {fm.__version__}: {self.verdict}"]
        lines += [f"  {reason}" for reason in self.reasons]
        versions = {name: version or "not installed" for name, version in self.versions.items()}
        for title, values in (
            ("versions", versions),
            ("devices", self.devices),
            ("CPU engine", self.engine),
        ):
            lines += [title, *(f"  {name:28}{_text(value)}" for name, value in values.items())]
        if self.trial_error is not None:
            lines.append(f"  {'fused against dense':28}{self.trial_error:.1e}, relative")
        return "\n".join([*lines, "CUDA", *_cuda_lines(self.cuda)])


def examine() -> Report:
    """Looks at this process, and computes a small layer if the fused implementation is there."""
    reasons, engine, error = [], {}, None
    broken = False
    reason = _ffi.unavailable_reason(jax.default_backend())
    not_chosen = reason or _ffi.why_not_by_default(jax.default_backend(), num_pes=1)
    if not_chosen is not None:
        reasons.append(not_chosen)
    try:
        engine = {
            **_ffi.extension().settings(),
            "deadline_seconds": deadline_seconds(_config()),
        }
    except ImportError as problem:
        broken = True
        if reason is None or str(problem) not in reason:
            reasons.append(f"the extension module could not be loaded: {problem}")
    except Exception as problem:  # Whatever is wrong is what the report is for.
        broken = True
        reasons.append(str(problem).strip())
    try:
        if reason is None and not broken:
            error = _trial_error()
            if not error <= _TRIAL_BOUND:
                broken = True
                reasons.append(f"the fused layer is off by {error:.1e} of the dense one")
    except Exception as problem:  # Whatever is wrong is what the report is for.
        broken = True
        reasons.append(str(problem).strip())
    verdict: Verdict = "fused runs"
    if broken:
        verdict = "broken"
    elif not_chosen is not None:
        verdict = "another implementation runs"
    return Report(
        verdict=verdict,
        reasons=tuple(reasons),
        versions={
            "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
            **{package: _version(package) for package in _PACKAGES},
        },
        devices={
            "platform": jax.default_backend(),
            "devices": jax.device_count(),
            "processes": jax.process_count(),
        },
        engine=engine,
        trial_error=error,
        cuda=_cuda(),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flashmoe_jax doctor", description=__doc__.partition(":")[0]
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    report = examine()
    print(json.dumps(dataclasses.asdict(report), indent=1) if options.json else report)
    return _STATUS[report.verdict]


def _config() -> fm.MoEConfig:
    return fm.MoEConfig(num_experts=8, experts_per_token=2, hidden_size=16, intermediate_size=24)


def _trial_error() -> float:
    config = dataclasses.replace(_config(), deadline_seconds=_TRIAL_SECONDS)
    params = fm.init_params(jax.random.key(0), config)
    x = jax.random.normal(jax.random.key(1), (64, config.hidden_size))

    @functools.partial(jax.jit, static_argnums=2)
    def results(x: jax.Array, params: fm.MoEParams, implementation: Any) -> Any:
        def layer(x: jax.Array, params: fm.MoEParams) -> jax.Array:
            return fm.moe(x, params, config, implementation=implementation)[0]

        y, pull_back = jax.vjp(layer, x, params)
        return y, pull_back(y)

    # On GPUs XLA rounds float32 to TF32 unless it is told not to.
    with jax.default_matmul_precision("highest"):
        errors = jax.tree.map(
            lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(),
            results(x, params, "fused"),
            results(x, params, "dense"),
        )
    return float(jnp.stack(jax.tree.leaves(errors)).max())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda() -> dict[str, Any]:
    """What there is of CUDA, whichever platform JAX computes on."""
    found: dict[str, Any] = {
        "driver": _nvidia_driver(),
        "extension": None,
        "versions": None,
        "gpus": [],
        "nvshmem": None,
        "nvshmem_built_for": None,
        "nvshmem_symmetric_size": os.environ.get("NVSHMEM_SYMMETRIC_SIZE"),
        "several_gpus": None,
    }
    try:
        module = _ffi.cuda_extension()
    except ImportError as problem:
        return {**found, "extension": f"could not be loaded ({problem})"}
    found["extension"] = "loaded"
    found["nvshmem_built_for"] = ".".join(map(str, module.NVSHMEM_BUILT_FOR))
    found["several_gpus"] = _ffi.why_not_several_gpus() or "possible"
    try:
        found["nvshmem"] = ".".join(map(str, _ffi.load_nvshmem()))
    except RuntimeError as problem:
        found["nvshmem"] = str(problem)
    try:
        found["versions"] = module.versions()
        found["gpus"] = [_gpu(module, ordinal) for ordinal in range(module.gpu_count())]
    except RuntimeError as problem:
        found["versions"] = {"error": str(problem)}
    return found


def _gpu(module: Any, ordinal: int) -> dict[str, Any]:
    free, total = module.free_and_total_memory(ordinal)
    return {
        **module.gpu(ordinal),
        "memory_bytes": total,
        "free_bytes": free,
        "reserved_bytes": module.reserved_bytes(ordinal),
        "xla_limit_bytes": _xla_limits().get(ordinal),
    }


def _xla_limits() -> dict[int, int | None]:
    """The most that XLA takes for itself, of each GPU that JAX has in this process."""
    return {
        device.local_hardware_id: (device.memory_stats() or {}).get("bytes_limit")
        for device in _ffi.gpus()
    }


def _cuda_lines(cuda: dict[str, Any]) -> list[str]:
    values = {
        "driver": cuda["driver"] or "none",
        "kernel": cuda["extension"],
        **{f"CUDA {name}": version for name, version in (cuda["versions"] or {}).items()},
    }
    for gpu in cuda["gpus"]:
        gib = {name: gpu[f"{name}_bytes"] / 2**30 for name in ("memory", "free", "reserved")}
        peers = _text(gpu["peers"]) or "none"
        limit = gpu["xla_limit_bytes"]
        xla = "" if limit is None else f"at most {limit / 2**30:.1f} for XLA, "
        values[f"GPU {gpu['ordinal']}"] = (
            f"{gpu['name']}, compute capability {gpu['compute_capability']}, "
            f"{gpu['multiprocessors']} multiprocessors, {gib['free']:.1f} of {gib['memory']:.1f} "
            f"GiB free, {xla}{gib['reserved']:.1f} reserved for calls, peer access to: {peers}"
        )
    if cuda["nvshmem_built_for"] is not None:
        values["NVSHMEM"] = cuda["nvshmem"]
        values["NVSHMEM built for"] = cuda["nvshmem_built_for"]
        values["NVSHMEM_SYMMETRIC_SIZE"] = cuda["nvshmem_symmetric_size"] or "not set"
        values["calls over several GPUs"] = cuda["several_gpus"]
    return [f"  {name:28}{value}" for name, value in values.items()]


def _nvidia_driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    process = subprocess.run(
        [program, "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    versions = process.stdout.split()
    return versions[0] if process.returncode == 0 and versions else None


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


if __name__ == "__main__":
    sys.exit(main())
