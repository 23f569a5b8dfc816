"""What the ranks of the benchmark tell their parent."""

from __future__ import annotations

from dataclasses import dataclass

from longspan.trainer.bench.floors import Cost


@dataclass(frozen=True)
class Began:
    """A rank begins with a case."""

    case: str


@dataclass(frozen=True)
class Alive:
    """A rank has done one more call."""


@dataclass(frozen=True)
class Measurement:
    """What one rank found of a case.

    Attributes:
        case: title of its row.
        tokens: of all ranks in one call. costs: least operations and bytes of the busiest rank in one call.
        parameters: of a whole model.
        times_ms, hosts_ms: of each timed call, on the device and to issue it.
        first_call_seconds: compilation included.
        peak_gib: most memory that tensors held; None on a CPU.
    """

    case: str
    tokens: int
    costs: list[Cost]
    parameters: int | None
    times_ms: list[float]
    hosts_ms: list[float]
    first_call_seconds: float
    peak_gib: float | None


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check, from one rank for all."""

    case: str
    note: str
    passed: bool


@dataclass(frozen=True)
class Failed:
    """A rank ends early."""

    reason: str


@dataclass(frozen=True)
class Done:
    """A rank has told everything."""
