"""A second stream of a GPU, for a chain of dependent kernels beside work that does not wait for it."""

from __future__ import annotations

import contextlib
from functools import cache

import torch
from torch import Tensor


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # a chain goes on as soon as it can: what runs beside it is wide and fills the rest
    return torch.cuda.Stream(device, priority=-1)


class Fork:
    """Work beside the current stream, from where this object is made to `join`. On a CPU everything is in order.

    What is made in `side` may be used everywhere after `join`, without further care when it is freed: memory of the
    side stream is given out again on that stream alone, and the next fork makes it wait for the current one. What
    was made before, and is used in `side`, must live until `join`. What the main stream makes between the fork and
    `join` is not for `side`, unless after `catch_up`: not even memory to write to, because the main stream's kernels
    may not be done with what lay there before.
    """

    def __init__(self, x: Tensor) -> None:
        """Args: x: any tensor on the device."""
        self.side_stream = _side_stream(x.device) if x.is_cuda else None
        if self.side_stream is not None:
            self.start = torch.cuda.current_stream(x.device).record_event()
            self.main_stream = torch.cuda.current_stream(x.device)

    def side(self) -> contextlib.AbstractContextManager[object]:
        """What is queued inside runs on the second stream, after all that was queued before the fork."""
        if self.side_stream is None:
            return contextlib.nullcontext()
        self.side_stream.wait_event(self.start)
        return torch.cuda.stream(self.side_stream)

    def catch_up(self) -> None:
        """Inside `side`: go on after all that the main stream has been given so far."""
        if self.side_stream is not None:
            self.side_stream.wait_stream(self.main_stream)

    def join(self) -> None:
        """Outside `side`: go on after all of it."""
        if self.side_stream is not None:
            self.main_stream.wait_stream(self.side_stream)

    def lend(self, *tensors: Tensor) -> None:
        """Keep the memory of tensors, made outside and used in `side`, until the second stream is done with them.

        For what the backward pass uses on the second stream, long after `join`, and then drops.
        """
        if self.side_stream is not None:
            for tensor in tensors:
                tensor.record_stream(self.side_stream)

    def take(self, *tensors: Tensor) -> None:
        """The same for tensors made in `side` and used outside."""
        if self.side_stream is not None:
            for tensor in tensors:
                tensor.record_stream(self.main_stream)
