"""What `longspan bench data` gives: rows made of counted passes, and the object that `--json` prints."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from longspan.trainer.bench.result import Ratio, Reported, Status


@dataclass(frozen=True)
class Pass:
    """One timed piece of work.

    Attributes:
        tokens: that came out of it, counted. seconds: on the clock. cpu_seconds: of all threads of this process.
        num_bytes: of the text that went into it, 0 where that is not the question.
        peak_gib: most memory of the process that did it, None where that is not the question.
    """

    tokens: int
    seconds: float
    cpu_seconds: float
    num_bytes: int = 0
    peak_gib: float | None = None


def timed(work: Callable[[], int], num_bytes: int = 0) -> Pass:
    """A pass of `work`, which returns the tokens that it counted."""
    began, began_cpu = time.perf_counter(), time.process_time()
    tokens = work()
    return Pass(tokens, time.perf_counter() - began, time.process_time() - began_cpu, num_bytes)


@dataclass(frozen=True)
class Bar:
    """What is asked of a row; None: not asked."""

    tokens_per_second: float | None = None
    megabytes_per_second: float | None = None
    seconds: float | None = None
    gib: float | None = None

    def __str__(self) -> str:
        named = {
            "tokens/s": self.tokens_per_second,
            "MB/s": self.megabytes_per_second,
            "s": self.seconds,
            "GiB": self.gib,
        }
        return ", ".join(f"{value:,.0f} {unit}" for unit, value in named.items() if value is not None)


@dataclass(frozen=True)
class Row:
    """One line of the table. Figures are None where nothing was measured or the figure has no meaning.

    Attributes:
        contender: "longspan" or a peer's name. case: what was done.
        status: "measured", or why not; `note` then has the reason.
        repeats: passes. tokens: counted in one of them, in the one of median speed.
        seconds, low_seconds, high_seconds: of a pass: median, fastest, slowest. cpu_seconds: of the median one.
        tokens_per_second, megabytes_per_second: of the median pass; MB are 10^6 bytes of text.
        peak_gib: most memory of the process that did it.
        bar: what is asked; is_met: whether all of it was reached.
    """

    contender: str
    case: str
    status: Status
    note: str = ""
    repeats: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    low_seconds: float | None = None
    high_seconds: float | None = None
    cpu_seconds: float | None = None
    tokens_per_second: float | None = None
    megabytes_per_second: float | None = None
    peak_gib: float | None = None
    bar: str = ""
    is_met: bool | None = None


def row_of(contender: str, case: str, passes: Sequence[Pass], bar: Bar | None = None, note: str = "") -> Row:
    """The row of some passes of the same work."""
    bar = bar or Bar()
    middle = sorted(passes, key=lambda one: one.seconds)[len(passes) // 2]
    peaks = [one.peak_gib for one in passes if one.peak_gib is not None]
    rate = middle.tokens / middle.seconds if middle.tokens else None
    megabytes = middle.num_bytes / 1e6 / middle.seconds if middle.num_bytes else None
    peak = max(peaks, default=None)
    at_least = ((rate, bar.tokens_per_second), (megabytes, bar.megabytes_per_second))
    at_most = ((middle.seconds, bar.seconds), (peak, bar.gib))
    reached = [value is not None and value >= asked for value, asked in at_least if asked is not None]
    reached += [value is not None and value <= asked for value, asked in at_most if asked is not None]
    return Row(
        contender,
        case,
        "measured",
        note,
        repeats=len(passes),
        tokens=middle.tokens or None,
        seconds=statistics.median(one.seconds for one in passes),
        low_seconds=min(one.seconds for one in passes),
        high_seconds=max(one.seconds for one in passes),
        cpu_seconds=middle.cpu_seconds,
        tokens_per_second=rate,
        megabytes_per_second=megabytes,
        peak_gib=peak,
        bar=str(bar),
        is_met=all(reached) if reached else None,
    )


@dataclass(frozen=True)
class Result(Reported):
    """Everything about one run.

    Attributes:
        tokens_per_second: of the `ranged` reader, 32 lanes of 4,096 tokens, every document hashed at its first touch.
        device: {"type", "name", "cores"}. load: average of the last minute, before and after.
    """

    tokens_per_second: float | None
    benchmark: str
    command: str
    date: str
    device: dict[str, Any]
    load: tuple[float, float]
    versions: dict[str, str | None]
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    ratios: tuple[Ratio, ...]
    seconds: float
    notes: tuple[str, ...]
