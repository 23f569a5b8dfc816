"""Saves in a thread, one at a time.

The thread hashes, writes and publishes through `CheckpointStore.save`, whose ranks talk over a process group that no
other thread uses: collectives of two threads in one group could pair up differently on two ranks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from longspan.trainer.checkpoint.contents import RunState
from longspan.trainer.checkpoint.snapshot import Snapshot, Source
from longspan.trainer.checkpoint.store import SaveResult

_NOTICED_SECONDS = 1e-3  # asking a thread that has ended takes less


@dataclass(frozen=True)
class Saved:
    """A save that has ended, well or not.

    Attributes:
        step: of the checkpoint. result: the outcome; its `seconds` are those from snapshot to publication.
        stall_seconds: for which training stood still: to begin the snapshot, to have it complete before an update, and
            what the copies took of the GPU's time.
        waited_seconds: for which training stood still before this save, because the one before had not ended.
        quarantined: documents that had been given up by then.
    """

    step: int
    result: SaveResult
    stall_seconds: float
    waited_seconds: float
    quarantined: list[str]


@dataclass
class SaveStalls:
    """What saving has cost the training of this process, for its summary."""

    seconds: float = 0.0
    stall_seconds: float = 0.0
    waited_seconds: float = 0.0
    num_waits: int = 0

    def add(self, saved: Saved) -> None:
        """Take a save into account."""
        self.seconds += saved.result.seconds
        self.stall_seconds += saved.stall_seconds
        self.waited_seconds += saved.waited_seconds
        self.num_waits += saved.waited_seconds > _NOTICED_SECONDS

    def summary(self) -> dict[str, float]:
        """Fields of the run's summary."""
        return {
            "checkpoint_seconds": self.seconds,
            "checkpoint_stall_seconds": self.stall_seconds,
            "checkpoint_waited_seconds": self.waited_seconds,
            "checkpoint_waits": self.num_waits,
        }


@dataclass
class _Work:
    """One save on its way."""

    state: RunState
    snapshot: Snapshot
    started: float
    waited_seconds: float
    quarantined: list[str]
    stall_seconds: float = 0.0
    gpu_seconds: float = 0.0
    copied: threading.Event = field(default_factory=threading.Event)
    result: SaveResult | None = None
    error: BaseException | None = None
    thread: threading.Thread | None = None


class BackgroundSaver:
    """Saves what a snapshot holds while the caller goes on; every rank has one and calls it alike.

    Errors of a disk are in the result. Others are raised by `finished` or `join`, as `CheckpointStore.save` would.
    """

    def __init__(self, save: Callable[[RunState], SaveResult], snapshot: Snapshot) -> None:
        """Args: save: `CheckpointStore.save`; snapshot: whose memory is used for every save."""
        self._save, self._snapshot = save, snapshot
        self._work: _Work | None = None

    def begin(
        self,
        state: RunState,
        sources: Callable[[], Iterable[Source]],
        *,
        started: float | None = None,
        waited_seconds: float = 0.0,
        quarantined: Sequence[str] = (),
    ) -> None:
        """Start a save; the one before must have been joined.

        Args:
            state: everything but weights and optimizer state, none of which may change any more.
            sources: gives the `Source`s of this rank's share; called here.
            started: when the caller began with `state`, by the monotonic clock; that time is a stall too.
            waited_seconds, quarantined: as in `Saved`.
        """
        assert self._work is None, "two saves at once"
        started = time.monotonic() if started is None else started
        self._snapshot.take(sources())
        work = _Work(state, self._snapshot, started, waited_seconds, list(quarantined))
        if not self._snapshot.must_settle:
            work.copied.set()
        work.thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._work = work
        work.thread.start()
        work.stall_seconds = time.monotonic() - started

    def _run(self, work: _Work) -> None:
        try:
            self._complete(work)
            result = self._save(replace(work.state, weights=work.snapshot.weights, optimizer=work.snapshot.optimizer))
            work.result = replace(result, seconds=time.monotonic() - work.started)
        except BaseException as error:
            work.error = error

    @staticmethod
    def _complete(work: _Work) -> None:
        try:
            work.gpu_seconds = work.snapshot.complete()
        finally:
            work.copied.set()

    def settle(self) -> None:
        """Wait until the next update may happen; to be called just before it."""
        work = self._work
        if work is None or work.copied.is_set():
            return
        started = time.monotonic()
        work.copied.wait()
        work.stall_seconds += time.monotonic() - started

    def finished(self) -> Saved | None:
        """The outcome of a save that has ended, once; None if there is none, or it still goes on."""
        work = self._work
        if work is None or work.thread is None or work.thread.is_alive():
            return None
        return self.join()

    def join(self, timeout_seconds: float | None = None) -> Saved | None:
        """Wait for the save that goes on; its outcome, once. None if there is none, or it did not end in time."""
        work = self._work
        if work is None or work.thread is None:
            return None
        work.thread.join(timeout_seconds)
        if work.thread.is_alive():
            return None
        self._work = None
        if work.error is not None:
            raise work.error
        assert work.result is not None
        # the same copies kept the GPU busy and perhaps this process: not both count
        stall_seconds = max(work.stall_seconds, work.gpu_seconds)
        return Saved(work.state.step, work.result, stall_seconds, work.waited_seconds, work.quarantined)
