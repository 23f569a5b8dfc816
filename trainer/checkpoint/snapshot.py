"""What a save will write, taken while training goes on.

Weights and optimizer state change only in an update. So those that lie in CPU memory are copied by the saving thread
during the next forward and backward pass, and training waits for it only just before its next update. Those on a GPU
are copied to pinned memory on the stream of the computation itself: whatever comes later in that stream, the update
included, finds them copied, and the saving thread waits for it. Memory for the copies is kept from save to save.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# what torch's allocator of pinned memory rounds up to is a power of two
BLOCK_BYTES = 256 * 1024 * 1024
_ALIGNMENT = 64


@dataclass(frozen=True)
class Source:
    """One tensor of a save.

    Attributes:
        parameter: its name. entry: of the parameter's optimizer state; None for the weight itself.
        tensor: whole, on any device. is_live: the next update changes this memory; otherwise nobody else has it.
    """

    parameter: str
    entry: str | None
    tensor: Tensor
    is_live: bool


class Arena:
    """CPU memory handed out from the front, and from the front again after `rewind`."""

    def __init__(self, pinned: bool) -> None:
        """Args: pinned: so that GPUs can copy to it without waiting."""
        self._pinned = pinned
        self._blocks: list[Tensor] = []
        self._block = self._offset = 0

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(block.numel() for block in self._blocks)

    def rewind(self) -> None:
        """Hand out the same memory again; nobody may use what was taken before."""
        self._block = self._offset = 0

    def reserve(self, num_bytes: int) -> None:
        """Hold so much at least; the system's pages are there too when this returns."""
        while self.num_bytes < num_bytes:
            self._add(BLOCK_BYTES)
            self._blocks[-1].zero_()

    def like(self, tensor: Tensor) -> Tensor:
        """Uninitialised memory of a tensor's shape, in float32."""
        num_bytes = tensor.numel() * 4
        while True:
            if self._block == len(self._blocks):
                self._add(max(BLOCK_BYTES, num_bytes))
            block = self._blocks[self._block]
            if self._offset + num_bytes <= block.numel():
                piece = block[self._offset : self._offset + num_bytes].view(torch.float32).view(tensor.shape)
                self._offset += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
                return piece
            self._block, self._offset = self._block + 1, 0

    def _add(self, num_bytes: int) -> None:
        self._blocks.append(torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._pinned))


class Snapshot:
    """Float32 copies of one rank's share, one save at a time.

    Attributes:
        weights, optimizer: as `RunState` has them; whole after `complete`.
    """

    def __init__(self, device: torch.device) -> None:
        """Args: device: where the tensors to copy lie."""
        self._on_gpu = device.type == "cuda"
        self._arena = Arena(pinned=self._on_gpu)
        self._later: list[tuple[Tensor, Tensor]] = []
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._reserving: threading.Thread | None = None
        self.weights: dict[str, Tensor] = {}
        self.optimizer: dict[str, dict[str, Tensor]] = {}

    def reserve(self, num_bytes: int) -> None:
        """Begin to lay out memory for copies of so many bytes, where the first save would wait for it (GPUs)."""
        if self._on_gpu:
            self._reserving = threading.Thread(target=self._arena.reserve, args=(num_bytes,), daemon=True)
            self._reserving.start()

    def take(self, sources: Iterable[Source]) -> None:
        """Begin to copy, in the thread that trains and before the next forward pass.

        While `must_settle`, no update may happen before `complete` has returned, in whatever thread. It never is on a
        GPU: there the copies come before the update in the stream.
        """
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        self._arena.rewind()
        self._later, self.weights, self.optimizer, self._events = [], {}, {}, None
        if self._on_gpu:
            self._events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._events[0].record()
        for source in sources:
            copied = self._begin(source)
            if source.entry is None:
                self.weights[source.parameter] = copied
            else:
                self.optimizer.setdefault(source.parameter, {})[source.entry] = copied
        if self._events:
            self._events[1].record()

    @property
    def must_settle(self) -> bool:
        """Whether `complete` still has to read memory that the next update changes."""
        return bool(self._later)

    def _begin(self, source: Source) -> Tensor:
        tensor = source.tensor.detach()
        if tensor.ndim == 0:
            return tensor.to(device="cpu", dtype=torch.float32, copy=True)
        if tensor.device.type == "cpu":
            if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                return tensor.to(torch.float32, copy=True).contiguous()
            if not source.is_live:
                return tensor
            target = self._arena.like(tensor)
            self._later.append((target, tensor))
            return target
        return self._arena.like(tensor).copy_(tensor, non_blocking=True)

    def complete(self) -> float:
        """Wait until all is copied; in the thread that saves. Returns the seconds for which a GPU was kept busy."""
        for target, tensor in self._later:
            np.copyto(target.numpy(), tensor.numpy())  # one thread, and without the interpreter's lock
        self._later = []
        if self._events is None:
            return 0.0
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000
