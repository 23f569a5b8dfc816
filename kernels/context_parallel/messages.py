"""Messages between the ranks of a sequence, and the count of their bytes."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from longspan.kernels.context_parallel.shard import SequenceShard

_MOST_UNFINISHED = 64
_counters: list[Counter[str]] = []
_unfinished: deque[tuple[Any, Tensor]] = deque()


@contextmanager
def count_traffic() -> Iterator[Counter[str]]:
    """Count the bytes that this rank sends inside the block, by operation."""
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def count(operation: str, tensor: Tensor, times: int = 1) -> None:
    """Add `times` the tensor's bytes to what is being counted."""
    for counter in _counters:
        counter[operation] += tensor.numel() * tensor.element_size() * times


class _Keeping:
    """A context in which the messages of a thread are kept, or given again."""

    current = threading.local()

    def __init__(self, found: list[list[Tensor]], again: bool) -> None:
        self.found, self.again = found, again
        self.place = 0  # of the message that is given again next

    def __enter__(self) -> None:
        self.before = self.of_this_thread()
        self.place, self.current.keeping = 0, self

    def __exit__(self, *error: object) -> None:
        self.current.keeping = self.before

    @classmethod
    def of_this_thread(cls) -> _Keeping | None:
        return getattr(cls.current, "keeping", None)


def keep_messages() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Two contexts for a part of a forward pass that is computed again in the backward pass: first, and again.

    What came in the first is given again in the second, as often as that is entered, and nothing is sent: no rank
    waits for another's recomputation.
    """
    found: list[list[Tensor]] = []
    return _Keeping(found, again=False), _Keeping(found, again=True)


def once(communicate: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """What `communicate` received; inside `keep_messages`, the second time, what it received the first time.

    Args:
        communicate: sends and receives; its result must not depend on anything that differs the second time.
    """
    keeping = _Keeping.of_this_thread()
    if keeping is None:
        return list(communicate())
    if not keeping.again:
        # without the graph of the first time
        keeping.found.append([tensor.detach() for tensor in communicate()])
    keeping.place += 1
    return [tensor.detach() for tensor in keeping.found[keeping.place - 1]]


class Exchange:
    """Messages under way, all posted at once; `wait` before the received tensors are read."""

    def __init__(
        self,
        operation: str,
        shard: SequenceShard,
        sends: list[tuple[Tensor, int]],
        receives: list[tuple[Tensor, int]],
    ) -> None:
        """
        Args:
            operation: what the bytes are counted as.
            shard: of this rank.
            sends: (contiguous tensor, hop to the right) of each message out.
            receives: (contiguous tensor to fill, hop) of each message in.
        """
        self._tensors = [tensor for tensor, _ in (*sends, *receives)]  # alive until they have arrived
        operations = [dist.P2POp(dist.isend, tensor, shard.peer(hop), shard.group) for tensor, hop in sends]
        operations += [dist.P2POp(dist.irecv, tensor, shard.peer(hop), shard.group) for tensor, hop in receives]
        self._work = dist.batch_isend_irecv(operations) if operations else []
        for tensor, _ in sends:
            count(operation, tensor)

    def wait(self) -> None:
        """Wait for all of them; on a GPU the stream waits, not the host."""
        for work in self._work:
            work.wait()
        self._work, self._tensors = [], []


def send(operation: str, tensor: Tensor, shard: SequenceShard, hop: int) -> None:
    """Send without waiting: neither host nor stream stands still until the other rank takes the tensor.

    Args:
        operation: what the bytes are counted as.
        tensor: contiguous; must not be written afterwards.
        shard: of this rank. hop: places to the right.
    """
    count(operation, tensor)
    _unfinished.append((dist.isend(tensor, shard.peer(hop), shard.group), tensor))
    while _unfinished and (len(_unfinished) > _MOST_UNFINISHED or _unfinished[0][0].is_completed()):
        _unfinished.popleft()[0].wait()


def receive(tensor: Tensor, shard: SequenceShard, hop: int) -> Tensor:
    """Fill the contiguous `tensor` with what the rank `hop` places to the right sent, and return it."""
    work = dist.irecv(tensor, shard.peer(hop), shard.group)
    assert work is not None, "this process is not in the group"
    work.wait()
    return tensor
