"""One rank of the benchmark: meets the others, times a call that all make together, and tells the parent."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from longspan.kernels.context_parallel.shard import SequenceShard
from longspan.trainer.bench.clock import first_call, synchronize
from longspan.trainer.bench.contender import Work
from longspan.trainer.bench.context_parallel.messages import Alive, Began, Measurement, Verdict


class Rank:
    """What the parts of the benchmark know of where they run."""

    def __init__(
        self, shard: SequenceShard, device: torch.device, dtype: torch.dtype, repeat: int, parent: Connection
    ) -> None:
        """
        Args:
            shard: of this rank, of all ranks. device: of its own.
            dtype: of weights and activations. repeat: timed calls of each case.
            parent: where what is found goes.
        """
        self.shard, self.device, self.dtype = shard, device, dtype
        self._repeat, self._parent = repeat, parent

    @property
    def is_first(self) -> bool:
        """Whether this rank holds the start of the sequence; it also runs what is measured on one rank alone."""
        return self.shard.rank == 0

    def begin(self, case: str) -> None:
        """Say what comes next; every rank does."""
        self._parent.send(Began(case))

    def judge(self, case: str, note: str, *, passed: bool) -> None:
        """Tell the outcome of a check; one rank does."""
        self._parent.send(Verdict(case, note, passed))

    def show_life(self) -> None:
        """Say that a call is done; after each, for the parent ends ranks that are silent."""
        self._parent.send(Alive())

    def meet(self) -> None:
        """Go on when all ranks are here and their devices have nothing to do."""
        synchronize(self.device)
        dist.barrier()
        synchronize(self.device)

    def measure(self, case: str, work: Work) -> None:
        """Time `work.call`, which every rank makes at the same time: compilation, a call for the memory, then the rest.

        Args:
            case: title of the row.
            work: tokens of all ranks together, operations and bytes of the busiest.
        """
        self.begin(case)
        self.meet()
        first_seconds = first_call(work.call, self.device)
        self.show_life()
        peak_gib = self._peak_gib(work.call)
        self.show_life()
        times, hosts = [], []
        for _ in range(self._repeat):
            self.meet()
            ms, host_ms = self._timed(work.call)
            times.append(ms)
            hosts.append(host_ms)
            self.show_life()
        found = Measurement(case, work.tokens, work.costs, work.parameters, times, hosts, first_seconds, peak_gib)
        self._parent.send(found)

    def clear(self) -> None:
        """Give back what the case before held."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _peak_gib(self, call: Callable[[], object]) -> float | None:
        """Most memory that tensors hold in a warm call; None on a CPU."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        self.meet()
        first_call(call, self.device)
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if on_gpu else None

    def _timed(self, call: Callable[[], object]) -> tuple[float, float]:
        """Milliseconds of one call, and of what the host took to issue it."""
        if self.device.type != "cuda":
            before = time.perf_counter()
            call()
            ms = 1e3 * (time.perf_counter() - before)
            return ms, ms
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        before = time.perf_counter()
        call()
        host_ms = 1e3 * (time.perf_counter() - before)
        end.record()
        synchronize(self.device)
        return start.elapsed_time(end), host_ms
