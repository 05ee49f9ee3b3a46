"""What the reporting process asks the measuring one for, and what that says of itself."""

import dataclasses

from benchmarks.cases import Group
from benchmarks.results import Machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How thoroughly to measure.

    Attributes:
        budget: Seconds of repetitions for a group.
        least: Samples of every call, whatever the budget.
        most: Samples of every call.
        slowest_call: Seconds; an opponent whose calls take longer is left out.
    """

    budget: float = 15.0
    least: int = 3
    most: int = 30
    slowest_call: float = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure."""

    groups: tuple[Group, ...]
    options: Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Where the process measures."""

    machine: Machine
    versions: dict[str, str]
    environment: dict[str, str]
