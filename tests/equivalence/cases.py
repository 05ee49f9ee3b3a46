"""The cases of the suite, as data: layers, and the loads that each of them is given.

A layer is what has to be compiled; its loads differ in data only, so every layer gets all of them.
The product of all factors is far too large, so `COVERING` holds few layers among which every pair
of values of any two factors occurs. `CORNERS` are layers at the edges of what is allowed, and
`complete_product` is for long runs.
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import flashmoe_jax as fm
from flashmoe_jax.config import Activation

# uniform: all experts alike; skewed: a few experts get most rows; empty: a quarter of the experts,
# side by side, gets none; one: a single expert gets all rows (as far as the router may do that: the
# same K experts for all tokens); masked: every other PE has masked tokens only.
Load = Literal["uniform", "skewed", "empty", "one", "masked"]
LOADS: tuple[Load, ...] = ("uniform", "skewed", "empty", "one", "masked")

Limit = Literal["dropless", "capacity", "memory", "capacity and memory"]
Router = Literal["softmax", "sigmoid", "caller"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer on a mesh, and the size of its batch.

    Attributes:
        num_pes: P of one expert-parallel group. Without data_groups, 1 means no mesh.
        experts_per_token: K.
        dtype: Of the tokens and the experts.
        network: Activation of the experts, and whether they are gated.
        limit: What may drop rows: a capacity, `max_received_rows`, both, or nothing.
        router: Score of the layer's own router, or the caller's routing.
        use_bias: As in `MoEConfig`.
        num_shared_experts: As in `MoEConfig`.
        save_rows: As in `MoEConfig`.
        save_preactivations: As in `MoEConfig`.
        size: (H, D).
        num_experts: E.
        tokens: Tokens of the whole batch.
        data_groups: Size of a mesh axis "data", over which tokens are sharded; None: no such axis.
        replicas: Size of a mesh axis "model", over which nothing is sharded; None: no such axis.
    """

    num_pes: int
    experts_per_token: int
    dtype: str
    network: tuple[Activation, bool]
    limit: Limit
    router: Router
    use_bias: bool
    num_shared_experts: int
    save_rows: bool
    save_preactivations: bool
    size: tuple[int, int]
    num_experts: int = 16
    tokens: int = 64
    data_groups: int | None = None
    replicas: int | None = None

    @property
    def activation(self) -> Activation:
        return self.network[0]

    @property
    def gated(self) -> bool:
        return self.network[1]

    @property
    def hidden(self) -> int:
        """H."""
        return self.size[0]

    @property
    def intermediate(self) -> int:
        """D."""
        return self.size[1]

    @property
    def mesh_shape(self) -> dict[str, int]:
        """Axes of the mesh, major first; empty: no mesh."""
        if self.num_pes == 1 and self.data_groups is None:
            return {}
        sizes = {"data": self.data_groups, "expert": self.num_pes, "model": self.replicas}
        return {name: size for name, size in sizes.items() if size is not None}

    @property
    def token_shards(self) -> int:
        return self.num_pes * (self.data_groups or 1)

    @functools.cached_property
    def config(self) -> fm.MoEConfig:
        # Less than what a PE gets on average, so that every load but that of masked PEs drops rows.
        rows = 7 * self.tokens * self.experts_per_token // (8 * self.token_shards)
        sigmoid = self.router == "sigmoid"
        return fm.MoEConfig(
            num_experts=self.num_experts,
            experts_per_token=self.experts_per_token,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            activation=self.activation,
            gated=self.gated,
            use_bias=self.use_bias,
            num_shared_experts=self.num_shared_experts,
            capacity_factor=1.75 if "capacity" in self.limit else None,
            max_received_rows=(
                max(rows, self.num_experts // self.num_pes) if "memory" in self.limit else None
            ),
            save_rows=self.save_rows,
            save_preactivations=self.save_preactivations,
            router=fm.RouterConfig(
                score="sigmoid" if sigmoid else "softmax",
                # A single renormalised score is always 1, and no gradient reaches the router.
                renormalize=self.experts_per_token > 1,
                # The weighted sum of K outputs is then about as large as one of them.
                scaling_factor=self._router_scale,
                selection_bias=sigmoid,
            ),
        )

    @property
    def _router_scale(self) -> float:
        if self.experts_per_token > 1:
            return self.experts_per_token**0.5
        return 2.5 if self.router == "sigmoid" else 4.0  # A score is then about 0.6, or 0.25.

    def __str__(self) -> str:
        words = [
            f"{self.num_pes}pe",
            f"k{self.experts_per_token}",
            self.dtype,
            self.activation + ("" if self.gated else "_plain"),
            self.limit.replace(" ", "_"),
            self.router,
            f"{self.hidden}x{self.intermediate}",
        ]
        words += ["bias"] * self.use_bias + ["shared"] * bool(self.num_shared_experts)
        words += ["resend"] * (not self.save_rows) + ["recompute"] * (not self.save_preactivations)
        for name in ("num_experts", "tokens", "data_groups", "replicas"):
            if getattr(self, name) != getattr(type(self), name):
                words.append(f"{name}{getattr(self, name)}")
        return "-".join(words)


NETWORKS: tuple[tuple[Activation, bool], ...] = tuple(
    itertools.product(("silu", "gelu", "gelu_tanh", "relu", "relu2"), (True, False))
)

# Factors of `Layer` by the names of its fields, and their values.
FACTORS: dict[str, tuple[Any, ...]] = {
    "network": NETWORKS,
    "num_pes": (1, 2, 4, 8),
    "experts_per_token": (2, 1, 8),
    "dtype": ("float32", "bfloat16", "float16"),
    "limit": ("dropless", "capacity", "memory", "capacity and memory"),
    "router": ("softmax", "sigmoid", "caller"),
    "size": ((24, 40), (40, 130), (130, 24)),
    "use_bias": (False, True),
    "num_shared_experts": (0, 1),
    "save_rows": (True, False),
    "save_preactivations": (True, False),
}


Pair = tuple[tuple[str, Any], tuple[str, Any]]


def _pairs(values: Mapping[str, Any]) -> set[Pair]:
    """The pairs of (factor, value) among the factors that `values` has."""
    chosen = [(factor, values[factor]) for factor in FACTORS if factor in values]
    return set(itertools.combinations(chosen, 2))


def pairs_of(layer: Layer) -> set[Pair]:
    """The pairs of values that a layer has."""
    return _pairs({factor: getattr(layer, factor) for factor in FACTORS})


def all_pairs() -> list[Pair]:
    """Every pair of values of two factors, in the order of FACTORS."""
    choices = [[(factor, value) for value in values] for factor, values in FACTORS.items()]
    return [
        pair
        for first, second in itertools.combinations(choices, 2)
        for pair in itertools.product(first, second)
    ]


def _covering() -> Iterator[Layer]:
    """Layers that have every pair between them, found greedily.

    A layer starts with the first pair that no earlier one has; every other factor then takes the
    value that makes the most new pairs with the values chosen so far.
    """
    random_ = random.Random(0)  # Breaks ties, in the same way in every run.
    missing = dict.fromkeys(all_pairs())
    while missing:
        values: dict[str, Any] = dict(next(iter(missing)))
        for factor in FACTORS:
            if factor not in values:
                values[factor] = max(
                    random_.sample(FACTORS[factor], len(FACTORS[factor])),
                    key=lambda value: len(_pairs({**values, factor: value}) & missing.keys()),
                )
        for pair in _pairs(values):
            missing.pop(pair, None)
        yield Layer(**values)


COVERING: tuple[Layer, ...] = tuple(_covering())

_PLAIN_LAYER = Layer(
    num_pes=4,
    experts_per_token=2,
    dtype="float32",
    network=("silu", True),
    limit="dropless",
    router="softmax",
    use_bias=False,
    num_shared_experts=0,
    save_rows=True,
    save_preactivations=True,
    size=(24, 40),
)

# The engine computes tiles of 512 columns, and here of up to 128 rows (kernels/cpu/tile_sizes.h):
# every product has two tiles of columns, and the busiest expert three blocks of rows.
_WIDE = dataclasses.replace(
    _PLAIN_LAYER, num_pes=2, size=(600, 700), num_experts=4, tokens=160, use_bias=True
)

CORNERS: tuple[Layer, ...] = (
    _WIDE,
    dataclasses.replace(
        _WIDE, dtype="bfloat16", router="caller", save_rows=False, save_preactivations=False
    ),
    dataclasses.replace(_WIDE, dtype="float16", network=("gelu", False), limit="capacity"),
    # Tokens that do not divide among the PEs, so that some are padding.
    dataclasses.replace(_PLAIN_LAYER, tokens=61, limit="capacity", use_bias=True),
    # One expert on each PE, and sizes below every vector width; then a single hidden value, and a
    # single intermediate one.
    dataclasses.replace(_PLAIN_LAYER, num_pes=8, experts_per_token=4, num_experts=8, size=(9, 3)),
    dataclasses.replace(_PLAIN_LAYER, router="caller", num_experts=4, size=(1, 2), tokens=32),
    dataclasses.replace(_PLAIN_LAYER, router="caller", num_experts=4, size=(2, 1), tokens=32),
    # Other meshes: of one device, and with axes beside that of the experts.
    dataclasses.replace(_PLAIN_LAYER, num_pes=1, data_groups=1),
    dataclasses.replace(_PLAIN_LAYER, data_groups=2, limit="capacity and memory", use_bias=True),
    dataclasses.replace(
        _PLAIN_LAYER, num_pes=2, data_groups=2, replicas=2, num_shared_experts=1, dtype="bfloat16"
    ),
)


def complete_product() -> Iterator[Layer]:
    """The full product of PEs, K, dtype, network and {dropless, capacity}.

    The other factors go through their values at random.
    """
    random_ = random.Random(0)
    crossed = {"num_pes", "experts_per_token", "dtype", "network", "limit"}
    others = [factor for factor in FACTORS if factor not in crossed]
    limits: tuple[Limit, ...] = ("dropless", "capacity")
    for num_pes, slots, dtype, network, limit in itertools.product(
        FACTORS["num_pes"], FACTORS["experts_per_token"], FACTORS["dtype"], NETWORKS, limits
    ):
        yield Layer(
            num_pes=num_pes,
            experts_per_token=slots,
            dtype=dtype,
            network=network,
            limit=limit,
            **{factor: random_.choice(FACTORS[factor]) for factor in others},
        )
