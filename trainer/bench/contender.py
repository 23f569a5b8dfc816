"""One contender of a race, and the session that measures contenders one after another."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import torch

from longspan.trainer.bench.ceilings import Ceilings, measure_ceilings
from longspan.trainer.bench.clock import Timing, first_call, time_calls, time_in_turns
from longspan.trainer.bench.floors import Cost, floor_ms
from longspan.trainer.bench.profile import Profile
from longspan.trainer.bench.result import OURS, Row, Status
from longspan.trainer.bench.settings import Common
from longspan.trainer.device import process_age_seconds

T = TypeVar("T")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Unavailable(Exception):
    """A peer that cannot run here: `status` and the reason go into its row."""

    def __init__(self, status: Status, reason: str) -> None:
        """Args: status: "not installed" or "not supported"; reason: for the row's note."""
        super().__init__(reason)
        self.status: Status = status


@dataclass(frozen=True)
class Work:
    """What one contender does in one call.

    Attributes:
        call: does it once; gradients of the call before are gone or overwritten.
        tokens: of one call.
        costs: least operations and bytes of one call, or of one of its `parts`.
        parts: blocks of a chain; times are given per part.
        parameters: of a whole model.
        small: about a millisecond; timed with a cold L2 cache and the host ahead, see `clock.time_calls`.
        note: for the row.
    """

    call: Callable[[], object]
    tokens: int
    costs: list[Cost]
    parts: int = 1
    parameters: int | None = None
    small: bool = False
    note: str = ""


@dataclass(frozen=True)
class Contender:
    """Who runs what; `prepare` makes model and inputs, and may raise `Unavailable`."""

    name: str
    case: str
    prepare: Callable[[], Work]


@dataclass(frozen=True)
class _Ready:
    """A contender that has run once. peak_gib: of a warm call, what others hold not counted; None on a CPU."""

    contender: Contender
    work: Work
    first_seconds: float
    peak_gib: float | None


class Session:
    """Measures contenders, one after another and each alone in memory, or in turns."""

    def __init__(self, common: Common, device: torch.device) -> None:
        """Args: common: precision, repeats and profile; device: where everything runs."""
        self.common = common
        self.device = device
        self.dtype = DTYPES[common.precision]
        self.first_step_seconds: float | None = None
        self.profile = Profile(device) if common.profile else None

    @cached_property
    def ceilings(self) -> Ceilings:
        """The rates of this device, measured when first asked for."""
        self._clear()
        return measure_ceilings(self.device, self.dtype)

    def race(self, contenders: list[Contender], *, in_turns: bool = False) -> list[Row]:
        """One row each, in order. What breaks becomes a row; the rest goes on.

        Args:
            contenders: who runs.
            in_turns: all of them stay in memory and run a few calls at a time, for ratios near 1.
        """
        return self._race_in_turns(contenders) if in_turns else [self._measure(one) for one in contenders]

    def _measure(self, contender: Contender) -> Row:
        self._clear()
        return self._or_why_not(contender, lambda: self._timed(self._ready(contender)))

    def _race_in_turns(self, contenders: list[Contender]) -> list[Row]:
        self._clear()
        found = [self._or_why_not(one, partial(self._ready, one)) for one in contenders]
        ready = [one for one in found if isinstance(one, _Ready)]
        timings = time_in_turns(
            [one.work.call for one in ready],
            self.device,
            repeat=self.common.repeat,
            first_seconds=[one.first_seconds for one in ready],
        )
        rows = iter(
            [
                self._or_why_not(one.contender, partial(self._timed_in_turns, one, timing))
                for one, timing in zip(ready, timings, strict=True)
            ]
        )
        return [one if isinstance(one, Row) else next(rows) for one in found]

    def _or_why_not(self, contender: Contender, get: Callable[[], T]) -> T | Row:
        """What `get` returns, or a row that says why it did not."""
        try:
            return get()
        except Unavailable as error:
            return Row(contender.name, contender.case, error.status, note=str(error))
        except Exception as error:  # a peer may break in any way, and the others should still be measured
            if contender.name == OURS:
                traceback.print_exception(error)
            return Row(contender.name, contender.case, "failed", note=_first_line(error))

    def _ready(self, contender: Contender) -> _Ready:
        print(f"bench: {contender.name}, {contender.case}", file=sys.stderr, flush=True)
        held = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        work = contender.prepare()
        first_seconds = first_call(work.call, self.device)
        if self.first_step_seconds is None:
            self.first_step_seconds = process_age_seconds()
        return _Ready(contender, work, first_seconds, self._peak_gib(work, held))

    def _timed(self, ready: _Ready) -> Row:
        work = ready.work
        timing = time_calls(
            work.call, self.device, repeat=self.common.repeat, first_seconds=ready.first_seconds, flush=work.small
        )
        return self._row(ready, timing)

    def _timed_in_turns(self, ready: _Ready, timing: Timing | Exception) -> Row:
        if isinstance(timing, torch.cuda.OutOfMemoryError):
            raise MemoryError("out of memory beside the others; alone, without --in-turns, it may fit") from timing
        if isinstance(timing, Exception):
            raise timing
        return self._row(ready, timing)

    def _row(self, ready: _Ready, timing: Timing) -> Row:
        contender, work = ready.contender, ready.work
        if self.profile is not None:
            self.profile.add(f"{contender.name}, {contender.case}", work.call, timing.median_ms)
        per_part = 1 / work.parts
        seconds = timing.median_ms * 1e-3
        flops = sum(cost.flops for cost in work.costs)
        ceilings = self.ceilings
        share_6nd = None
        if work.parameters is not None:
            share_6nd = 6.0 * work.parameters * work.tokens / seconds / ceilings.matrix_flops
        return Row(
            contender=contender.name,
            case=contender.case,
            status="measured",
            note=work.note,
            ms=timing.median_ms * per_part,
            low_ms=timing.low_ms * per_part,
            high_ms=timing.high_ms * per_part,
            host_ms=timing.host_ms * per_part,
            repeats=timing.repeats,
            first_call_seconds=timing.first_call_seconds,
            tokens_per_second=work.tokens / seconds,
            matrix_share=flops / (seconds * per_part) / ceilings.matrix_flops,
            share_6nd=share_6nd,
            peak_gib=ready.peak_gib,
            floor_ms=floor_ms(work.costs, ceilings),
            flops=flops,
            num_bytes=sum(cost.num_bytes for cost in work.costs),
            parameters=work.parameters,
        )

    def _peak_gib(self, work: Work, held: int) -> float | None:
        """Of a warm call, beyond `held` bytes: a compiler's trials and what flushes the cache do not count."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        first_call(work.call, self.device)
        return (torch.cuda.max_memory_allocated(self.device) - held) / 2**30

    def _clear(self) -> None:
        """Give back what the contender before held, so that each is alone in memory."""
        if "torch._dynamo" in sys.modules:  # loading it takes seconds, and only compiled contenders need it
            torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    line = f"{type(error).__name__}: {text[0] if text else 'no message'}"
    return line if len(line) <= 200 else f"{line[:197]}..."
