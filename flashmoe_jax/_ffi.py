"""Registration of the custom calls with XLA, and whether they can be used here."""

import functools
import importlib
import importlib.util
import pathlib
from types import ModuleType

import jax

# As JAX calls NVIDIA GPUs, in its devices and in its lowering rules.
CUDA_PLATFORMS = ("gpu", "cuda")

ONE_PROCESS_PER_GPU = (
    "the CUDA kernel spans several GPUs only with one process for each: start one per GPU and call "
    "jax.distributed.initialize in all of them"
)


@functools.cache
def _extension() -> ModuleType | ImportError:
    return _load("_ext")


@functools.cache
def _cuda_extension() -> ModuleType | ImportError:
    return _load("_cuda")


def _load(name: str) -> ModuleType | ImportError:
    try:
        return importlib.import_module(f"flashmoe_jax.{name}")
    except ImportError as error:
        return error


def extension() -> ModuleType:
    """The extension module of the CPU engine.

    Raises:
        ImportError: it was not built, or its libraries were not found.
    """
    return _or_raise(_extension())


def cuda_extension() -> ModuleType:
    """The extension module of the CUDA kernel.

    Raises:
        ImportError: it was not built, or its libraries were not found.
    """
    return _or_raise(_cuda_extension())


def cuda_extension_if_any() -> ModuleType | None:
    """The extension module of the CUDA kernel, or None where it cannot be loaded."""
    module = _cuda_extension()
    return None if isinstance(module, ImportError) else module


def _or_raise(module: ModuleType | ImportError) -> ModuleType:
    if isinstance(module, ImportError):
        raise module
    return module


def unavailable_reason(platform: str) -> str | None:
    """Why the fused implementation cannot run on `platform`, or None if it can."""
    if platform in CUDA_PLATFORMS:
        return _why_not_cuda()
    if platform != "cpu":
        return (
            f"the fused kernel has no handler for platform {platform!r}, only for 'cpu' and 'cuda'"
        )
    module = _extension()
    if isinstance(module, ImportError):
        return f"the extension module flashmoe_jax._ext could not be loaded ({module})"
    if jax.process_count() > 1:
        return (
            f"this program has {jax.process_count()} processes, and on CPU the fused kernel moves "
            "tokens inside one process only"
        )
    return None


def why_not_by_default(platform: str, num_pes: int) -> str | None:
    """Why "auto" does not choose the fused implementation on `platform`, or None if it may."""
    if platform in CUDA_PLATFORMS and (num_pes > 1 or len(gpus()) > 1):
        return (
            "the CUDA kernel has been proven on one GPU only; implementation='fused' asks for it "
            "on several"
        )
    return None


def _why_not_cuda() -> str | None:
    module = _cuda_extension()
    if isinstance(module, ImportError):
        return f"the extension module flashmoe_jax._cuda could not be loaded ({module})"
    try:
        count = module.gpu_count()
    except RuntimeError as error:
        return f"CUDA finds no GPU ({error})"
    return None if count else "CUDA finds no GPU"


def gpus() -> list[jax.Device]:
    """JAX's NVIDIA GPUs of this process, also where it computes on CPUs by default."""
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:  # JAX has no such backend.
        return []


def why_not_several_gpus() -> str | None:
    """Why the CUDA kernel cannot span several GPUs here, or None if it can."""
    count = len(gpus())
    if count != 1:
        return f"this process has {count} GPUs, and {ONE_PROCESS_PER_GPU}"
    try:
        load_nvshmem()
    except RuntimeError as error:
        return str(error)
    return None


@functools.cache
def load_nvshmem() -> tuple[int, int, int]:
    """Loads the NVSHMEM host library and returns its version; asked anew only after a failure.

    Raises:
        RuntimeError: It is not installed, or of a version that does not fit.
    """
    version: tuple[int, int, int] = cuda_extension().load_nvshmem(_nvshmem_library())
    return version


def _nvshmem_library() -> str:
    """The file in the package nvidia-nvshmem-cu13; empty where that is not installed."""
    try:
        spec = importlib.util.find_spec("nvidia.nvshmem")
    except ModuleNotFoundError:
        return ""
    folders = [] if spec is None else spec.submodule_search_locations or []
    for folder in folders:
        for library in sorted(pathlib.Path(folder, "lib").glob("libnvshmem_host.so.*")):
            return str(library)
    return ""


@functools.cache
def register() -> None:
    """Registers the handlers of the CPU engine with XLA, once.

    Lazily, so that importing the package does not initialise JAX; and after the backend exists,
    since XLA wants a state's type before the handlers that use it and does not keep that order in
    what it queues.
    """
    jax.devices("cpu")
    module = extension()
    jax.ffi.register_ffi_type("flashmoe_call_site", module.call_site_type(), platform="cpu")
    for target, stages in module.handlers().items():
        jax.ffi.register_ffi_target(target, stages, platform="cpu")


@functools.cache
def register_cuda() -> None:
    """Registers the handlers of the CUDA kernel with XLA, once."""
    for target, stages in cuda_extension().handlers().items():
        jax.ffi.register_ffi_target(target, stages, platform="CUDA")
