"""What a Mixture-of-Experts layer computes, as two frozen dataclasses validated once."""

import dataclasses
import math
import os
from typing import Literal, get_args

Score = Literal["softmax", "sigmoid"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens choose their experts.

    Attributes:
        score: How a logit becomes a score. "softmax" over all experts, or "sigmoid" of each alone.
        renormalize: Divide the chosen scores of a token by their sum.
        scaling_factor: Multiplies every weight, after renormalisation.
        selection_bias: Add `MoEParams.selection_bias` to the scores when experts are chosen. It
            does not enter the weights (arXiv 2408.15664).
        num_groups: Number of equal groups that consecutive experts form.
        groups_per_token: A token chooses its experts inside this many groups: those with the
            largest sum of their two best scores (arXiv 2412.19437, section 2.1.2).
        jitter: The router's input is multiplied by uniform noise from [1 - jitter, 1 + jitter]
            when a key is given (arXiv 2101.03961, section 2.2).

    Raises:
        ValueError: A field is out of its range.
    """

    score: Score = "softmax"
    renormalize: bool = True
    scaling_factor: float = 1.0
    selection_bias: bool = False
    num_groups: int = 1
    groups_per_token: int = 1
    jitter: float = 0.0

    def __post_init__(self) -> None:
        _require_one_of("score", self.score, get_args(Score))
        _require_positive_number("scaling_factor", self.scaling_factor)
        _require_positive_int("num_groups", self.num_groups)
        _require_positive_int("groups_per_token", self.groups_per_token)
        if self.groups_per_token > self.num_groups:
            raise ValueError(
                f"groups_per_token={self.groups_per_token} is more than num_groups="
                f"{self.num_groups}; choose at most num_groups"
            )
        if not 0.0 <= self.jitter < 1.0:
            raise ValueError(f"jitter={self.jitter!r} must be in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A Mixture-of-Experts layer: sizes, expert network, capacity, memory and router.

    Attributes:
        num_experts: E, routed experts of the layer (on all PEs together).
        experts_per_token: K, experts that each token chooses.
        hidden_size: H, width of a token.
        intermediate_size: D, width inside an expert.
        activation: "silu", "gelu" (exact), "gelu_tanh", "relu", or "relu2" (relu squared).
        gated: down(act(gate(x)) * up(x)) instead of down(act(up(x))).
        use_bias: Every product of a routed expert adds a bias.
        num_shared_experts: S; an FFN of width S*D that every token passes, added to the output.
        capacity_factor: None: dropless. Otherwise an expert keeps at most `capacity(tokens)` rows.
        max_received_rows: Most rows that one PE accepts in a call; bounds its memory. None: the
            worst case, so that no row is dropped for want of memory.
        save_rows: Keep the received rows for the backward pass. False: send them again. Without
            effect on GPUs, where the backward pass is XLA's.
        save_preactivations: Keep the pre-activations for the backward pass. False: recompute them.
            Without effect on GPUs.
        deadline_seconds: How long the fused implementation waits for other PEs, of which none gets
            on, before the call fails. On GPUs it counts from the start of each wait, whether others
            get on or not: there it must be longer than one PE may be late, as by a checkpoint that
            its process writes. None: the environment variable FLASHMOE_DEADLINE_SECONDS, or 100.
        router: How tokens choose their experts.

    Raises:
        ValueError: A field is out of its range, or two fields contradict each other.
    """

    num_experts: int
    experts_per_token: int
    hidden_size: int
    intermediate_size: int
    activation: Activation = "silu"
    gated: bool = True
    use_bias: bool = False
    num_shared_experts: int = 0
    capacity_factor: float | None = None
    max_received_rows: int | None = None
    save_rows: bool = True
    save_preactivations: bool = True
    deadline_seconds: float | None = None
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)

    def __post_init__(self) -> None:
        for name in ("num_experts", "experts_per_token", "hidden_size", "intermediate_size"):
            _require_positive_int(name, getattr(self, name))
        _require_one_of("activation", self.activation, get_args(Activation))
        if not _is_int(self.num_shared_experts) or self.num_shared_experts < 0:
            raise ValueError(f"num_shared_experts={self.num_shared_experts!r} must be an int >= 0")
        if self.capacity_factor is not None:
            _require_positive_number("capacity_factor", self.capacity_factor)
        if self.max_received_rows is not None:
            _require_positive_int("max_received_rows", self.max_received_rows)
        if self.deadline_seconds is not None:
            _require_positive_number("deadline_seconds", self.deadline_seconds)
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than num_experts="
                f"{self.num_experts}; a token can choose each expert at most once"
            )
        self._check_groups()

    def _check_groups(self) -> None:
        groups = self.router.num_groups
        if self.num_experts % groups:
            raise ValueError(
                f"num_experts={self.num_experts} does not divide into num_groups={groups} equal "
                "groups; choose a divisor of num_experts"
            )
        choosable = self.router.groups_per_token * (self.num_experts // groups)
        if self.experts_per_token > choosable:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than the {choosable} experts "
                f"of groups_per_token={self.router.groups_per_token} groups; choose more groups"
            )

    def capacity(self, tokens: int) -> int | None:
        """Rows that one expert keeps, of a batch of `tokens`; None if the layer is dropless.

        Args:
            tokens: Tokens of one expert-parallel group: those of all its PEs together.
        """
        if self.capacity_factor is None:
            return None
        mean_rows = tokens * self.experts_per_token / self.num_experts
        return max(1, math.ceil(self.capacity_factor * mean_rows))


_DEADLINE_VARIABLE = "FLASHMOE_DEADLINE_SECONDS"
_DEFAULT_DEADLINE_SECONDS = 100.0


def deadline_seconds(config: MoEConfig) -> float:
    """Seconds that a wait inside a call may last, read when the call is traced.

    Raises:
        ValueError: FLASHMOE_DEADLINE_SECONDS is not a positive number.
    """
    if config.deadline_seconds is not None:
        return config.deadline_seconds
    text = os.environ.get(_DEADLINE_VARIABLE)
    if text is None:
        return _DEFAULT_DEADLINE_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.0 < seconds < math.inf:
        raise ValueError(f"{_DEADLINE_VARIABLE}={text!r} must be a finite number of seconds > 0")
    return seconds


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require_positive_int(name: str, value: object) -> None:
    if not _is_int(value) or value < 1:  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} must be an int >= 1")


def _require_positive_number(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0.0 < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} must be a finite number > 0")


def _require_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")
