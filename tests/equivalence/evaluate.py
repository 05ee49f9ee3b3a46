"""Runs an implementation, or the oracle, on a case: everything that it computes, by name."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

import flashmoe_jax as fm
from flashmoe_jax.api import Implementation

from . import inputs
from .cases import Layer, Load
from .inputs import Batch

# "y", "load_balance_loss", "z_loss"; "d_x", "d_weights" (of a caller's routing) and "d_..." of
# every parameter; the counts "tokens_per_expert" and "dropped".
Results = dict[str, np.ndarray]


def mesh(layer: Layer) -> Mesh | None:
    """The mesh of a layer, or None for a layer without one."""
    shape = layer.mesh_shape
    if not shape:
        return None
    return jax.make_mesh(
        tuple(shape.values()),
        tuple(shape),
        axis_types=(AxisType.Auto,) * len(shape),
        devices=jax.devices()[: int(np.prod(list(shape.values())))],
    )


def implementation_results(layer: Layer, load: Load, implementation: Implementation) -> Results:
    """Outputs and gradients of a case by an implementation."""
    return results(layer, implementation, inputs.batch(layer, load), inputs.parameters(layer))


@functools.lru_cache(maxsize=32)
def oracle_results(layer: Layer, load: Load) -> Results:
    """Outputs and gradients of a case by the oracle: "dense" in float64 on the rounded inputs."""
    with jax.enable_x64(True):
        return results(
            layer,
            "dense",
            _in_float64(inputs.batch(layer, load)),
            _in_float64(inputs.parameters(layer)),
        )


def results(
    layer: Layer, implementation: Implementation, batch: Batch, params: fm.MoEParams
) -> Results:
    """Outputs and gradients of a layer on a batch."""
    outputs, gradients = _compiled(layer, implementation)(batch, params)
    named = {**_by_name(outputs, ""), **_by_name(gradients, "d_")}
    return {name: np.asarray(value) for name, value in named.items()}


# Layers come one after the other, so only a few programs are needed at a time; keeping all of them
# would take gigabytes in the complete product.
@functools.lru_cache(maxsize=16)
def _compiled(layer: Layer, implementation: Implementation) -> Callable[..., Any]:
    return jax.jit(functools.partial(_outputs_and_gradients, layer, implementation))


def _outputs_and_gradients(
    layer: Layer, implementation: Implementation, batch: Batch, params: fm.MoEParams
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    caller = batch.routing

    def operator(x: jax.Array, params: fm.MoEParams, weights: jax.Array | None) -> Any:
        routing = None
        if caller is not None and weights is not None:
            routing = fm.Routing(caller.indices, weights)
        y, aux = fm.moe(
            x,
            params,
            layer.config,
            routing,
            mesh=mesh(layer),
            implementation=implementation,
            mask=batch.mask,
        )
        return (y, jnp.stack([aux.load_balance_loss, aux.z_loss])), aux

    weights = None if caller is None else caller.weights
    (y, _), pullback, aux = jax.vjp(operator, batch.x, params, weights, has_aux=True)
    dx, d_params, d_weights = pullback((batch.dy, batch.dlosses))
    outputs = {"y": y, **{f.name: getattr(aux, f.name) for f in dataclasses.fields(aux)}}
    return outputs, {"x": dx, "weights": d_weights, "": d_params}


def _in_float64(tree: Any) -> Any:
    def convert(array: np.ndarray) -> np.ndarray:
        # ml_dtypes' bfloat16 is no subtype of np.floating.
        return array.astype(np.float64) if array.dtype.kind not in "bi" else array

    return jax.tree.map(convert, tree)


def _by_name(tree: Any, prefix: str) -> dict[str, jax.Array]:
    def name(path: tuple[Any, ...]) -> str:
        keys = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        return prefix + ".".join(key for key in keys if key)

    return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
