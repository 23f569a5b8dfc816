"""Faults and bugs that a trainer's life can be given; each changes the forked child alone.

The bugs prove that the comparison of final states would see a trainer that forgets something on resume.
"""

from __future__ import annotations

import errno
import itertools
import os
import resource
from collections.abc import Callable
from typing import Any

import torch

from longspan.data_pipeline.reader import LaneReader
from longspan.trainer.checkpoint import rng
from longspan.trainer.checkpoint.store import CheckpointStore, SaveResult

SMALL_FILE_BYTES = 20_000  # less than the weights of the tiny model, more than its log


def forget_random_states() -> None:
    """Bug: the generators are not restored."""
    rng.restore = lambda state: None  # type: ignore[assignment]


def forget_optimizer() -> None:
    """Bug: the optimizer starts anew."""
    _change_loaded(lambda state: state.optimizer.clear())


def forget_optimizer_step() -> None:
    """Bug: moments come back, the number of updates does not."""

    def change(state: Any) -> None:
        for entries in state.optimizer.values():
            entries["step"] = torch.zeros_like(entries["step"])

    _change_loaded(change)


def forget_carried_state() -> None:
    """Bug: lanes go on in the middle of their documents with nothing carried."""

    def change(state: Any) -> None:
        state.lanes = {name: torch.zeros_like(tensor) for name, tensor in state.lanes.items()}

    _change_loaded(change)


def mix_up_lanes() -> None:
    """Bug: every lane goes on with its neighbour's carried state."""

    def change(state: Any) -> None:
        state.lanes = {name: tensor.roll(1, dims=0) for name, tensor in state.lanes.items()}

    _change_loaded(change)


def skip_one_position() -> None:
    """Bug: reading goes on one step too far."""
    batch = LaneReader.batch
    LaneReader.batch = lambda self, step: batch(self, step + 1)  # type: ignore[method-assign]


def full_disk_at_second_save() -> None:
    """Fault: the second save of this life meets a limit on the size of files; it is lifted after it."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(self: CheckpointStore, number: int) -> None:
        size = SMALL_FILE_BYTES if number == 2 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    _before_saves(limit)


def full_disk_from_second_to_fourth_save() -> None:
    """Fault: from the second save to the fourth, no file of the run can be written, the log included."""
    write = os.write

    def switch(self: CheckpointStore, number: int) -> None:
        def refuse(descriptor: int, content: Any) -> int:
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(self.root.parent)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, content)

        os.write = refuse if 2 <= number < 4 else write

    _before_saves(switch)


def _before_saves(change: Callable[[CheckpointStore, int], None]) -> None:
    """Call `change` with the store and the number of the save, from 1, before each save."""
    real = CheckpointStore.save
    numbers = itertools.count(1)

    def save(self: CheckpointStore, state: Any) -> SaveResult:
        change(self, next(numbers))
        return real(self, state)

    CheckpointStore.save = save  # type: ignore[method-assign]


def _change_loaded(change: Any) -> None:
    """Apply `change` to the state that a resume loads."""
    real = CheckpointStore.load_newest

    def load_newest(self: CheckpointStore, lane_start: int, lane_stop: int) -> Any:
        found = real(self, lane_start, lane_stop)
        if found is not None:
            change(found[0])
        return found

    CheckpointStore.load_newest = load_newest  # type: ignore[method-assign]
