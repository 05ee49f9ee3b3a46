"""The range of JAX versions this package supports, checked when it is imported."""

import re
import warnings

OLDEST_JAX = (0, 10, 1)
NEWEST_TESTED_JAX = (0, 12)


def check_jax_version(version: str) -> None:
    """Refuses a JAX older than the FFI headers of the extension and warns of an untested one.

    Args:
        version: `jax.__version__`.

    Raises:
        ImportError: the version is older than `OLDEST_JAX`.
    """
    oldest = ".".join(map(str, OLDEST_JAX))
    tested = ".".join(map(str, NEWEST_TESTED_JAX))
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if numbers < OLDEST_JAX:
        raise ImportError(
            f"flashmoe_jax needs jax >= {oldest}, but jax {version} is installed; "
            f'upgrade with: pip install --upgrade "jax>={oldest}"'
        )
    if numbers[:2] > NEWEST_TESTED_JAX:
        warnings.warn(
            f"flashmoe_jax is tested with jax {oldest} to {tested}, but jax {version} is "
            f'installed; if something fails, try: pip install "jax=={tested}.*"',
            stacklevel=3,
        )
