"""What every implementation of the sharded operator is told about its call, all of it static."""

import dataclasses

from flashmoe_jax.config import MoEConfig


@dataclasses.dataclass(frozen=True)
class LocalCall:
    """One call of the operator, as each PE of an expert-parallel group sees it.

    Attributes:
        config: The layer.
        axis: Mesh axis of the group inside the shard_map; None when there is no mesh.
        num_pes: P, the PEs that share out the experts.
        capacity: Rows that one expert keeps; None: dropless.
        max_rows: Rows that one PE accepts at most, never more than its worst case.
        check_routing: The routing came from the caller and may be invalid.
        site: Tells this call from others that were traced apart, and is equal only to itself. None
            where nobody needs that.
    """

    config: MoEConfig
    axis: str | None
    num_pes: int
    capacity: int | None
    max_rows: int
    check_routing: bool
    site: object | None = None

    @property
    def local_experts(self) -> int:
        """El, experts of one PE."""
        return self.config.num_experts // self.num_pes

    @property
    def may_drop(self) -> bool:
        """Whether any row of this call could be dropped."""
        return self.capacity is not None or self.config.max_received_rows is not None

    def check_rows(self, tokens: int, recv_rows: int) -> None:
        """Checks that rows can be counted in int32.

        Args:
            tokens: T, of one PE.
            recv_rows: R, rows of the receive buffer of a PE.

        Raises:
            ValueError: They cannot.
        """
        slots = self.config.experts_per_token
        if max(recv_rows, tokens * slots * self.num_pes) >= 2**31:
            raise ValueError(
                f"one call may move fewer than 2**31 rows; this one has {tokens} tokens on each of "
                f"{self.num_pes} PEs, {slots} slots each, and receive buffers of {recv_rows} rows. "
                f"{self.how_to_bound(tokens)}"
            )

    def how_to_bound(self, tokens: int) -> str:
        """Advice for a call of `tokens` on each PE that needs too much memory."""
        return (
            f"Set MoEConfig.max_received_rows (now {self.config.max_received_rows}; the call could "
            f"bring one PE {self.max_rows} rows, and {tokens * self.config.experts_per_token} when "
            "the experts are in balance), or pass fewer tokens at once"
        )


def local_call(
    config: MoEConfig,
    *,
    axis: str | None,
    num_pes: int,
    tokens_per_pe: int,
    group_tokens: int,
    caller_routing: bool,
    site: object | None = None,
) -> LocalCall:
    """The call of one expert-parallel group.

    Args:
        config: The layer.
        axis: Mesh axis of the group, or None.
        num_pes: P.
        tokens_per_pe: T, padding included.
        group_tokens: Tokens of all PEs of the group, without padding; they set the capacity.
        caller_routing: The routing is the caller's: a token may name an expert more than once.
        site: See `LocalCall`.
    """
    local_experts = config.num_experts // num_pes
    slots = config.experts_per_token
    most_slots_here = slots if caller_routing else min(slots, local_experts)
    max_rows = num_pes * tokens_per_pe * most_slots_here
    if config.max_received_rows is not None:
        max_rows = min(max_rows, config.max_received_rows)
    return LocalCall(
        config=config,
        axis=axis,
        num_pes=num_pes,
        capacity=config.capacity(group_tokens),
        max_rows=max_rows,
        check_routing=caller_routing,
        site=site,
    )
