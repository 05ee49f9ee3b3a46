from typing import Any

def call_site_type() -> dict[str, Any]: ...
def handlers() -> dict[str, dict[str, Any]]: ...
def recv_rows(
    num_pes: int, tokens: int, num_experts: int, experts_per_token: int, max_rows: int
) -> int: ...
def settings() -> dict[str, Any]: ...
def heap_bytes(
    num_pes: int,
    tokens: int,
    hidden: int,
    num_experts: int,
    experts_per_token: int,
    max_rows: int,
    element_bytes: int,
    backward: bool,
    resend_rows: bool,
) -> int: ...
