"""A distributed Mixture-of-Experts layer for JAX and Flax."""

from typing import TYPE_CHECKING, Any

import jax

from flashmoe_jax._compat import check_jax_version

check_jax_version(jax.__version__)

from flashmoe_jax import runtime  # noqa: E402
from flashmoe_jax.api import MoEAux, moe, moe_local  # noqa: E402
from flashmoe_jax.config import MoEConfig, RouterConfig  # noqa: E402
from flashmoe_jax.params import MoEParams, SharedParams, init_params  # noqa: E402
from flashmoe_jax.routing import (  # noqa: E402
    Routing,
    load_balance_loss,
    route,
    update_selection_bias,
    z_loss,
)

if TYPE_CHECKING:
    from flashmoe_jax.layers.nnx import MoE

__version__ = "0.1.0"

__all__ = [
    "MoE",
    "MoEAux",
    "MoEConfig",
    "MoEParams",
    "RouterConfig",
    "Routing",
    "SharedParams",
    "__version__",
    "init_params",
    "load_balance_loss",
    "moe",
    "moe_local",
    "route",
    "runtime",
    "update_selection_bias",
    "z_loss",
]


def __getattr__(name: str) -> Any:
    # Flax is needed by the layer alone.
    if name == "MoE":
        from flashmoe_jax.layers.nnx import MoE

        return MoE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
