"""Timing of calls: device events on a GPU, the monotonic clock on a CPU; medians after warming up."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_GPU_SECONDS, _GPU_CALLS = 1.5, (5, 100)  # time to fill with timed calls; fewest and most of them
_CPU_SECONDS, _CPU_CALLS = 0.2, (3, 20)
_WARM_SECONDS = 0.3  # long enough for a GPU's clocks to rise
_TURN_CALLS = 4  # of one contender's turn; the first waits for a GPU that was idle, and is dropped
_FLUSH_BYTES = 2**28  # more than any L2 cache
_HEAD_START = 1.5  # times what a warm call takes with the host waiting for it, at least the time to issue it
_MOST_FLUSHES = 512  # 45 ms on an H100; a call that takes longer to issue is bound by the host wherever it runs


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Attributes:
        median_ms, low_ms, high_ms: median, first and third quartile.
        host_ms: mean time that the host took to issue a call; as long as the median when launches are the limit.
        repeats: timed calls.
        first_call_seconds: of the very first call, compilation included.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    host_ms: float
    repeats: int
    first_call_seconds: float


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_call(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, until the device is done."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def time_calls(
    call: Callable[[], object],
    device: torch.device,
    *,
    repeat: int | None = None,
    first_seconds: float = 0.0,
    flush: bool = False,
) -> Timing:
    """Time a call that has run once already.

    Args:
        call: what is timed; must leave the machine as it found it.
        device: where it runs.
        repeat: timed calls; None: as many as fill the time set aside.
        first_seconds: what the first call took, for the result.
        flush: for short calls on a GPU: overwrite the L2 cache between them, and long enough for the host to issue the
            next one meanwhile, as in a training step, where the host is ahead. So the time is the device's, and
            `host_ms` tells whether the host could keep up if the call were all there is.
    """
    seconds = _warm(call, device)
    count = repeat or _calls_in(seconds, device)
    return _timing(*_times(call, device, count, flush, head_start=_HEAD_START * seconds), first_seconds)


def time_in_turns(
    calls: list[Callable[[], object]], device: torch.device, *, repeat: int | None, first_seconds: list[float]
) -> list[Timing | Exception]:
    """Time calls that have run once already, a few of each in turn, every other round in reverse order.

    A GPU at its power limit slows down while it gets warm: contenders that are measured one after another meet
    another device each.

    Args:
        calls: what is timed.
        device: where they run.
        repeat: timed calls of each, rounded up to whole turns; None: as many as fill the time set aside.
        first_seconds: what the first call of each took, for the result.

    Returns:
        In order; for a call that broke what it raised, while the others went on without it.
    """
    broken: dict[int, Exception] = {}
    times: list[list[float]] = [[] for _ in calls]
    hosts: list[list[float]] = [[] for _ in calls]
    slowest = 0.0
    for place, call in enumerate(calls):
        try:
            slowest = max(slowest, _warm(call, device))
        except Exception as error:
            broken[place] = error
    for number in range(-(-(repeat or _calls_in(slowest, device)) // (_TURN_CALLS - 1))):
        order = range(len(calls)) if number % 2 == 0 else reversed(range(len(calls)))
        for place in (one for one in order if one not in broken):
            try:
                found, host = _times(calls[place], device, _TURN_CALLS)
            except Exception as error:
                broken[place] = error
                continue
            times[place] += found[1:]
            hosts[place].append(host)
    together = enumerate(zip(times, hosts, first_seconds, strict=True))
    return [
        broken[place] if place in broken else _timing(found, statistics.fmean(host), first)
        for place, (found, host, first) in together
    ]


def _calls_in(seconds: float, device: torch.device) -> int:
    """How many calls of so many seconds fill the time set aside."""
    budget, (fewest, most) = (_GPU_SECONDS, _GPU_CALLS) if device.type == "cuda" else (_CPU_SECONDS, _CPU_CALLS)
    return max(fewest, min(most, int(budget / max(seconds, 1e-9))))


def _times(
    call: Callable[[], object], device: torch.device, count: int, flush: bool = False, head_start: float = 0.0
) -> tuple[list[float], float]:
    """Milliseconds of each call; mean of what the host took to issue one. See `time_calls`; head_start in seconds."""
    if device.type != "cuda":
        return _cpu_times(call, count)
    return _cuda_times(call, device, count, _Flush(device, head_start) if flush else lambda: None)


def _timing(times: list[float], host_ms: float, first_seconds: float) -> Timing:
    low, median, high = (times[0],) * 3 if len(times) == 1 else statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, low, high, host_ms, len(times), first_seconds)


def _warm(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a warm call."""
    limit = _WARM_SECONDS if device.type == "cuda" else 0.0
    spent, calls = 0.0, 0
    while calls < 2 or (spent < limit and calls < 1000):
        seconds = first_call(call, device)
        spent, calls = spent + seconds, calls + 1
    return seconds


class _Flush:
    """Overwrites the L2 cache, as often as fills a time."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        """Args: seconds: at least so long, up to `_MOST_FLUSHES` times."""
        self.scratch = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        self.scratch.zero_()
        once = min(first_call(self.scratch.zero_, device) for _ in range(3))
        self.times = max(1, min(_MOST_FLUSHES, math.ceil(seconds / once)))

    def __call__(self) -> None:
        for _ in range(self.times):
            self.scratch.zero_()


def _cuda_times(
    call: Callable[[], object], device: torch.device, count: int, before_each: Callable[[], object]
) -> tuple[list[float], float]:
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
    synchronize(device)
    host = 0.0
    for start, end in zip(starts, ends, strict=True):
        before_each()
        start.record()
        before = time.perf_counter()
        call()
        host += time.perf_counter() - before
        end.record()
    synchronize(device)
    return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)], 1e3 * host / count


def _cpu_times(call: Callable[[], object], count: int) -> tuple[list[float], float]:
    times = []
    for _ in range(count):
        before = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - before))
    return times, sum(times) / count
