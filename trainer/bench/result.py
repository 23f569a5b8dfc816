"""What benchmarks give: one row a contender and case, and the object that `--json` prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["measured", "not installed", "not supported", "failed"]


@dataclass(frozen=True)
class Row:
    """One line of the table. Figures are None where nothing was measured or the figure has no meaning.

    Attributes:
        contender: who; "longspan" or a peer's name.
        case: what, e.g. the model, or the shape and direction.
        status: "measured", or why not.
        note: what a reader should know; the reason of a status that is not "measured".
        ms, low_ms, high_ms: of one call (chain: of one block): median, first and third quartile.
        host_ms: what the host took to issue a call; near `ms`, launches are the limit.
        repeats: timed calls.
        first_call_seconds: compilation included.
        tokens_per_second: of the median.
        matrix_share: counted operations over the measured matrix rate.
        share_6nd: 6 x parameters x tokens over the measured matrix rate; whole steps only.
        peak_gib: most memory that tensors held, weights and inputs included; GPU only.
        floor_ms: what counted operations and bytes take at the measured rates.
        flops, num_bytes: what was counted, of what `ms` measures.
        parameters: of a whole model, the embedding included.
    """

    contender: str
    case: str
    status: Status
    note: str = ""
    ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    host_ms: float | None = None
    repeats: int | None = None
    first_call_seconds: float | None = None
    tokens_per_second: float | None = None
    matrix_share: float | None = None
    share_6nd: float | None = None
    peak_gib: float | None = None
    floor_ms: float | None = None
    flops: float | None = None
    num_bytes: float | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class Ratio:
    """One comparison of two rows; above 1 is in favour of what is named first."""

    what: str
    value: float


class Reported:
    """What the results of all benchmarks can do: dataclasses with rows of `contender` and `status`."""

    rows: tuple[Any, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]  # of the dataclass that this is

    @property
    def failures(self) -> list[Any]:
        """Rows of our own that should have been measured and were not."""
        return [row for row in self.rows if row.contender == OURS and row.status == "failed"]


@dataclass(frozen=True)
class Result(Reported):
    """Everything about one run of one benchmark."""

    benchmark: str
    command: str
    date: str
    device: dict[str, Any]
    versions: dict[str, str | None]
    kernels: str
    settings: dict[str, Any]
    ceilings: dict[str, Any]
    rows: tuple[Row, ...]
    ratios: tuple[Ratio, ...]
    first_step_seconds: float | None
    compile_caches_at_start: dict[str, int]
    seconds: float
    notes: tuple[str, ...]


OURS = "longspan"
