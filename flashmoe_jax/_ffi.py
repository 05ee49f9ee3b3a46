"""Registration of the custom call with XLA, and whether it can be used here."""

import functools
from types import ModuleType

import jax


@functools.cache
def _extension() -> ModuleType | ImportError:
    try:
        from flashmoe_jax import _ext
    except ImportError as error:
        return error
    return _ext


def extension() -> ModuleType:
    """The extension module.

    Raises:
        ImportError: it was not built, or its libraries were not found.
    """
    module = _extension()
    if isinstance(module, ImportError):
        raise module
    return module


def unavailable_reason(platform: str) -> str | None:
    """Why the fused implementation cannot run on `platform`, or None if it can."""
    if platform != "cpu":
        return f"the fused kernel has no handler for platform {platform!r}, only for 'cpu'"
    module = _extension()
    if isinstance(module, ImportError):
        return f"the extension module flashmoe_jax._ext could not be loaded ({module})"
    if jax.process_count() > 1:
        return (
            f"this program has {jax.process_count()} processes, and on CPU the fused kernel moves "
            "tokens inside one process only"
        )
    return None


@functools.cache
def register() -> None:
    """Registers the handlers with XLA, once.

    Lazily, so that importing the package does not initialise JAX; and after the backend exists,
    since XLA wants a state's type before the handlers that use it and does not keep that order in
    what it queues.
    """
    jax.devices("cpu")
    module = extension()
    jax.ffi.register_ffi_type("flashmoe_call_site", module.call_site_type(), platform="cpu")
    for target, stages in module.handlers().items():
        jax.ffi.register_ffi_target(target, stages, platform="cpu")
