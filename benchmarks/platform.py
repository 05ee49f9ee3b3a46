"""All that differs between machines: their names, memory, load, and how a process is set up.

Functions that say so need JAX's backend, the others do not start it.
"""

import contextlib
import ctypes
import os
import platform
import re
import resource
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl

from benchmarks.cases import Dtype
from benchmarks.results import Machine

VIRTUAL_DEVICES = 8

_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"
_VARIABLES = re.compile(
    r"(XLA|JAX|OPENBLAS|OMP|GOMP|KMP|MKL|NVPL|BLIS|CUDA|NCCL|NVSHMEM|TF|FLASHMOE|MALLOC)_.*"
)
# Paths of the machine, which nobody else can use.
_PRIVATE = re.compile(r".*(DIR|PATH|HOME|ROOT|FILE)")
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")

_SIXTEEN_BITS: dict[Dtype, float] = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


def child_environment(environment: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The environment for a process that measures, and what was wrong with the given one.

    There are 8 virtual CPU devices, no compilation cache (compilation is timed), and no OPENBLAS_*
    variables: they pin BLAS to the instructions or threads of another machine.
    """
    child = {key: value for key, value in environment.items() if not key.startswith("OPENBLAS_")}
    removed = sorted(set(environment) - set(child))
    warnings = []
    if removed:
        pairs = ", ".join(f"{key}={environment[key]}" for key in removed)
        warnings.append(f"{pairs} slows every BLAS down and was unset for this run")
    flags = [
        flag
        for flag in child.get("XLA_FLAGS", "").split()
        if not flag.startswith(_DEVICE_COUNT_FLAG)
    ]
    if flags:
        warnings.append(f"XLA_FLAGS has {' '.join(flags)}: other users do not have these")
    child["XLA_FLAGS"] = " ".join([*flags, f"{_DEVICE_COUNT_FLAG}={VIRTUAL_DEVICES}"])
    child["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    return child, tuple(warnings)


def relevant_environment() -> dict[str, str]:
    """The variables of this process that may change what is measured."""
    return {
        key: value
        for key, value in sorted(os.environ.items())
        if _VARIABLES.fullmatch(key) and not _PRIVATE.fullmatch(key)
    }


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> Machine:
    """This machine. Starts JAX's backend."""
    import jax

    name, features = _cpu()
    device = jax.devices()[0]
    return Machine(
        platform=device.platform,
        processor=name if device.platform == "cpu" else device.device_kind,
        devices=jax.device_count(),
        cores=cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        features=features,
    )


def _cpu() -> tuple[str, tuple[str, ...]]:
    """Name and instruction sets of the CPU."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, tuple(feature for feature in _FEATURES if feature in flags)


def file_name(processor: str) -> str:
    """A processor's name for use in a file's name."""
    name = re.sub(r"\((r|tm|c)\)|@.*|\bcpu\b", " ", processor.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def is_cpu() -> bool:
    """Whether JAX computes on the CPU. Starts JAX's backend."""
    import jax

    return jax.default_backend() == "cpu"


def roundoff(dtype: Dtype) -> float:
    """The unit roundoff of a product's operands. Starts JAX's backend.

    A GPU multiplies float32 in TF32 unless it is told otherwise, and nobody here is.
    """
    return _SIXTEEN_BITS.get(dtype, 2.0**-24 if is_cpu() else 2.0**-11)


def product_size() -> int:
    """Rows, columns and depth of a product that is large here. Starts JAX's backend."""
    return 2048 if is_cpu() else 8192


def available_bytes() -> int:
    """Memory that a case may take. Starts JAX's backend."""
    import jax

    if is_cpu():
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    return sum(s.get("bytes_limit", 0) - s.get("bytes_in_use", 0) for s in statistics)


class LoadMeter:
    """Measures how much of the machine other processes use, from now on."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds of processor time: of all cores, of all processes, and of this one."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
        idle = ticks[3] + ticks[4]
        own = os.times()
        return sum(ticks), sum(ticks) - idle, own.user + own.system

    def foreign_share(self) -> float | None:
        """The share of all processor time that others, or the hypervisor, used. None if unknown."""
        end = self._now()
        if self._start is None or end is None:
            return None
        total, busy, own = (b - a for a, b in zip(self._start, end, strict=True))
        return max(0.0, busy - own) / total if total > 0 else 0.0


@contextlib.contextmanager
def single_threaded_blas() -> Iterator[None]:
    """NumPy's BLAS uses the calling thread only. Torch brings its own, which is left alone."""
    controller = threadpoolctl.ThreadpoolController()
    paths = [
        library.filepath
        for library in controller.lib_controllers
        if library.user_api == "blas" and "torch" not in library.filepath
    ]
    with controller.select(filepath=paths).limit(limits=1):
        yield


def blas_product() -> tuple[Callable[[], Any], int] | None:
    """A float32 product by NumPy's BLAS with a thread on each core, and its operations.

    To be called with `single_threaded_blas`. None where JAX does not compute on the CPU. Starts
    JAX's backend.
    """
    if not is_cpu():
        return None
    size, workers = product_size(), cores()
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((size, size), np.float32) for _ in range(2))
    c = np.zeros_like(a)
    slices = [slice(size * i // workers, size * (i + 1) // workers) for i in range(workers)]
    pool = ThreadPoolExecutor(workers)

    def product() -> None:
        for done in [pool.submit(np.matmul, a[rows], b, out=c[rows]) for rows in slices]:
            done.result()

    return product, 2 * size**3


class PeakMeter:
    """Measures the memory that this process, or its devices, come to need from now on.

    Starts JAX's backend. Only a fresh process measures well: freed memory can be used again.
    """

    def __init__(self) -> None:
        self._cpu = is_cpu()
        if not self._cpu:
            self._before = self._on_devices("bytes_in_use")
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self._before = self._status("VmRSS")

    def growth_bytes(self) -> int:
        """The peak since then, over what was in use then."""
        peak = self._status("VmHWM") if self._cpu else self._on_devices("peak_bytes_in_use")
        return max(0, peak - self._before)

    @staticmethod
    def _status(field: str) -> int:
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith(f"{field}:"):
                    return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @staticmethod
    def _on_devices(field: str) -> int:
        import jax

        return sum((device.memory_stats() or {}).get(field, 0) for device in jax.local_devices())
