"""Simulation of one optimizer step on the ranks of one sequence, message by message; it checks `predict.py`.

Every rank has a stream for computation, one for the chain of states, and a way out and a way in for messages, each of
which carries one message at a time. Neighbours meet at a halo (the exchange waits for both), a state travels slice by
slice, keys and values go round one block ahead of the attention, stage 3's weights one layer ahead of the layer. Other
data-parallel replicas do the same at the same time, so their collectives begin when these ranks are ready.
Tensor-parallel ranks too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longspan.trainer.plan.events import Simulation
from longspan.trainer.plan.hardware import Hardware
from longspan.trainer.plan.layout import Layout
from longspan.trainer.plan.links import Group, collective_seconds, message_seconds
from longspan.trainer.plan.predict import groups, layer_tensor_seconds
from longspan.trainer.plan.work import LayerWork, Seconds, Work

Pass = Literal["forward", "again", "backward"]
MAX_RANKS = 64  # of a sequence; more take seconds to simulate
SIMULATED_MICRO_BATCHES = 3


def simulate(layout: Layout, work: Work, hardware: Hardware) -> float:
    """Seconds of one optimizer step; of many micro-batches three are run, and the last one's time is repeated."""
    few = min(work.micro_batches, SIMULATED_MICRO_BATCHES)
    seconds = _Schedule(layout, work, hardware, few).run()
    if work.micro_batches > few:
        each = seconds - _Schedule(layout, work, hardware, few - 1).run()
        seconds += (work.micro_batches - few) * each
    return seconds


@dataclass
class _Layerwise:
    """Collectives of stage 3 that go beside the layers."""

    gather: float
    scatter: float


class _Schedule:
    def __init__(self, layout: Layout, work: Work, hardware: Hardware, micro_batches: int) -> None:
        self.work, self.links, self.micro_batches = work, hardware.links, micro_batches
        self.tensor, self.sequence, self.data = groups(layout, hardware.links)
        self.ranks = range(layout.cp)
        self.sim = Simulation()
        self.last: list[list[int]] = [[] for _ in self.ranks]  # what each rank's next computation waits for
        self.layerwise = self._stage_three()
        self._launched: list[list[int]] = []  # messages of each rank's last launch of a ring

    def run(self) -> float:
        """Build the schedule and run it."""
        for micro_batch in range(self.micro_batches):
            begin = [*self.last]
            self._pass("forward")
            self._all(self._collective(self.sequence, "broadcast", *self.work.shared_state))
            self._pass("backward")
            self._host(begin)
            self._sum_gradients(last=micro_batch == self.micro_batches - 1)
        self._compute(self.work.engine + self.work.update)
        return self.sim.run()

    def _stage_three(self) -> _Layerwise | None:
        parts = [c for c in self.work.collectives if c.overlapped]
        if not parts:
            return None
        gather, scatter = (self._collective(self.data, c.kind, c.num_bytes / c.calls, 1) for c in parts)
        return _Layerwise(gather, scatter)

    def _collective(self, group: Group, kind: str, num_bytes: float, calls: int) -> float:
        return collective_seconds(self.links, group, kind, num_bytes, calls)  # type: ignore[arg-type]

    def _pass(self, which: Literal["forward", "backward"]) -> None:
        """All layers in one direction, with embedding or loss at their ends."""
        work, forward = self.work, which == "forward"
        sums = [self._collective(self.tensor, "all_reduce", size, 1) for size in work.ends_sums]
        if work.ends_sums[1]:
            sums[1] = self._collective(self.tensor, "all_reduce", work.ends_sums[1], 2)
        if not forward:
            self._compute(work.ends_backward + sums[2])
        order = work.layers if forward else work.layers[::-1]
        weights = self._gather(None) if self.layerwise else []
        for index, layer in enumerate(order):
            for rank in self.ranks:
                self.last[rank] = self.last[rank] + weights
            starts = [[*before] for before in self.last]
            # the next layer's weights are on their way while this one computes
            weights = self._gather(starts) if self.layerwise and index + 1 < len(order) else []
            if forward:
                self._layer(layer, "forward")
            else:
                if layer.again.total:
                    self._layer(layer, "again")
                self._layer(layer, "backward")
                self._scatter()
        if forward:
            self._compute(work.ends_forward + sums[0] + sums[1])

    def _gather(self, starts: list[list[int]] | None) -> list[int]:
        assert self.layerwise is not None
        waits = [task for before in (starts or self.last) for task in before]
        return [self.sim.add(self.layerwise.gather, "zero", waits)]

    def _scatter(self) -> None:
        if self.layerwise:
            self.sim.add(self.layerwise.scatter, "zero", [task for before in self.last for task in before])

    def _layer(self, layer: LayerWork, which: Pass) -> None:
        """One layer in one pass: what needs no message, then messages and what waits for them."""
        seconds: Seconds = getattr(layer, which)
        sums: float = getattr(layer_tensor_seconds(layer, self.tensor, self.links), which)
        backward = which == "backward"
        first, then = (seconds.rest, seconds.entry) if backward else (seconds.entry, seconds.rest)
        if which == "again" and not layer.messages.ring_hops:  # what came in the forward pass was kept
            self._compute(seconds.total + sums)
            return
        self._compute(first + sums)
        if layer.messages.ring_hops:
            self._ring(layer, seconds.ring, backward)
        else:
            self._compute(seconds.ring)
            if layer.messages.halo and not backward:
                self._halo(layer, 1)
            if seconds.chain:
                self._chain(layer, seconds, backward)
            if layer.messages.halo and backward:
                self._halo(layer, -1)
        if layer.messages.scan:
            size = layer.messages.scan_gradients if backward else layer.messages.scan
            calls = 1 if backward else 2
            self._all(self._collective(self.sequence, "all_gather", self.sequence.size * size, calls))
        self._compute(then)

    def _compute(self, seconds: float) -> None:
        """The same on all ranks."""
        for rank in self.ranks:
            self.last[rank] = [self.sim.add(seconds, f"compute {rank}", self.last[rank])]

    def _all(self, seconds: float) -> None:
        """A collective of all ranks that all of them wait for."""
        if seconds:
            task = self.sim.add(seconds, after=[task for before in self.last for task in before])
            self.last = [[task] for _ in self.ranks]

    def _message(self, source: int, target: int, num_bytes: float, after: list[int]) -> int:
        near = source // self.sequence.per_host == target // self.sequence.per_host
        link = self.links.nvlink if near else self.links.infiniband
        return self.sim.add(message_seconds(link, num_bytes), after=after, links=(f"out {source}", f"in {target}"))

    def _halo(self, layer: LayerWork, direction: int) -> None:
        """Rows to the ranks 1, 2, ... places on; a rank goes on when its own have left and the others' have come."""
        before = [[*tasks] for tasks in self.last]
        for hop, size in enumerate(layer.messages.halo, 1):
            for rank in self.ranks:
                target = rank + direction * hop
                if target in self.ranks:
                    # one launch for all hops: the latency is the first one's
                    self._exchange(rank, target, size, before, launched=hop == 1)

    def _exchange(self, source: int, target: int, size: float, before: list[list[int]], launched: bool) -> None:
        near = source // self.sequence.per_host == target // self.sequence.per_host
        link = self.links.nvlink if near else self.links.infiniband
        seconds = message_seconds(link, size) - (0.0 if launched else link.latency_us * 1e-6)
        task = self.sim.add(seconds, after=before[source] + before[target], links=(f"out {source}", f"in {target}"))
        for rank in (source, target):
            self.last[rank] = [*self.last[rank], task]

    def _chain(self, layer: LayerWork, seconds: Seconds, backward: bool) -> None:
        """Slice by slice from rank to rank; backward from the last rank to the first, without waiting if truncated.

        The chain comes before what runs beside it, which takes all time that the chain leaves: a rank is done when its
        chain is, and not before the time of both.
        """
        slices, step = self.work.slices, -1 if backward else 1
        carried = not (backward and self.work.truncate)
        size = layer.messages.carry / slices
        arrived: dict[tuple[int, int], int] = {}
        for rank in self.ranks[::step]:
            both = self.sim.add(seconds.chain + seconds.beside, f"compute {rank}", self.last[rank])
            before = self.last[rank]
            for part in range(slices):
                came = [arrived[rank, part]] if (rank, part) in arrived else []
                done = self.sim.add(seconds.chain / slices, f"chain {rank}", before + came)
                if carried and rank + step in self.ranks:
                    arrived[rank + step, part] = self._message(rank, rank + step, size, [done])
            self.last[rank] = [both, done]

    def _ring(self, layer: LayerWork, seconds: float, backward: bool) -> None:
        """Own block first, then those of the ranks to the left, each fetched while the one before is attended to.

        A rank's messages of one launch go together, and launches one after another: the fetch of the next block, then
        the gradients of this one.
        """
        messages = layer.messages
        hops = messages.ring_hops
        block = seconds / (hops + 1)
        ready = [[*tasks] for tasks in self.last]  # what the next launch waits for on each rank
        self._launched = [[] for _ in self.ranks]
        fetched = self._launch(1, 1, messages.ring, ready)
        done = [self.sim.add(block, f"compute {rank}", ready[rank]) for rank in self.ranks]
        for hop in range(1, hops + 1):
            ready = [[done[rank], *fetched[rank]] for rank in self.ranks]
            fetched = self._launch(hop + 1, 1, messages.ring, ready) if hop < hops else [[] for _ in self.ranks]
            for rank in self.ranks:
                if rank >= hop:
                    done[rank] = self.sim.add(block, f"compute {rank}", ready[rank])
            if backward:
                self._launch(hop, -1, messages.ring_gradients, [[task] for task in done])
        self.last = [[done[rank], *self._launched[rank]] for rank in self.ranks]

    def _launch(self, hop: int, direction: int, size: float, ready: list[list[int]]) -> list[list[int]]:
        """One message from every rank to the one `hop` places on; returns those that each rank takes part in."""
        found: list[list[int]] = [[] for _ in self.ranks]
        for source in self.ranks:
            target = source + direction * hop
            if target in self.ranks:
                waits = ready[source] + ready[target] + self._launched[source] + self._launched[target]
                task = self._message(source, target, size, waits)
                found[source].append(task)
                found[target].append(task)
        self._launched = [new or old for new, old in zip(found, self._launched, strict=True)]
        return found

    def _host(self, begin: list[list[int]]) -> None:
        """A micro-batch takes no less than the launches of its kernels."""
        if self.work.host:
            for rank in self.ranks:
                launched = self.sim.add(self.work.host, f"host {rank}", begin[rank])
                self.last[rank] = [*self.last[rank], launched]

    def _sum_gradients(self, last: bool) -> None:
        """Stages 0 to 2: when the backward pass is over; stage 2 after every micro-batch. Stage 3: what is left."""
        if self.layerwise:
            self._all_of_stream()
            return
        for index, part in enumerate(self.work.collectives):
            every = index == 0 and part.calls >= self.work.micro_batches > 1
            times = self.work.micro_batches if every else 1
            if every or last:
                seconds = self._collective(self.data, part.kind, part.num_bytes / times, 1)
                latency = self._collective(self.data, part.kind, 0.0, 1)
                self._all(seconds + (part.calls // times - 1) * latency)

    def _all_of_stream(self) -> None:
        task = self.sim.add(0.0, "zero")
        self.last = [[*before, task] for before in self.last]
