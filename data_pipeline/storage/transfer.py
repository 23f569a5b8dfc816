"""Reading files of a store to their end in spite of faults: backoff, resume in the middle, exact lengths."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from typing import Protocol

from longspan.data_pipeline.storage.retry import Counters, RetryPolicy
from longspan.data_pipeline.storage.store import (
    MissingFileError,
    StorageError,
    Store,
    TemporaryFaultError,
    Transfer,
    WrongSizeError,
)
from longspan.errors import DataError

_ATTEMPTS_AT_WRONG_SIZE = 3
_LOGGER = logging.getLogger("longspan.data")


class Sink(Protocol):
    """Where bytes go."""

    @property
    def position(self) -> int:
        """How many bytes it has."""
        ...

    def write(self, chunk: bytes) -> None:
        """Take the next bytes."""
        ...

    def restart(self) -> None:
        """Forget everything that was written."""
        ...


class MemorySink:
    """Bytes in memory."""

    def __init__(self) -> None:
        self.data = bytearray()

    @property
    def position(self) -> int:
        """Bytes taken so far."""
        return len(self.data)

    def write(self, chunk: bytes) -> None:
        """Take the next bytes."""
        self.data += chunk

    def restart(self) -> None:
        """Forget everything that was written."""
        self.data.clear()


@dataclass
class Transfers:
    """One store with its policy and counts.

    Attributes:
        stopped: set it to end all waiting at once, e.g. when the reader is closed.
    """

    store: Store
    policy: RetryPolicy
    counters: Counters = field(default_factory=Counters)
    stopped: threading.Event = field(default_factory=threading.Event)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes `start` to `stop` of a file, the end if None.

        Raises:
            StorageError: the store does not answer; names address, file and the last fault.
            DataError: the file ends before `stop`.
        """
        sink = MemorySink()
        self.copy(name, sink, start, stop)
        return bytes(sink.data)

    def copy(self, name: str, sink: Sink, start: int = 0, stop: int | None = None) -> None:
        """Copy bytes `start` to `stop` (the end if None) of a file; goes on at `sink.position` after a fault.

        Raises:
            StorageError: as `read`.
            DataError: the file is not as long as it should be.
            OSError: of `sink` (a full disk).
        """
        failures, validator = 0, None
        while True:
            before = sink.position
            if before and stop is not None and start + before == stop:
                return  # a partial file that had everything
            try:
                with self.store.open(name, start + before, stop, validator) as transfer:
                    if before:
                        self.counters.add("resumed" if transfer.start else "restarted")
                    validator = transfer.validator
                    self._pour(transfer, sink, start, stop)
                return
            except MissingFileError as error:
                raise StorageError(f"{self.store.address}: {name}: {error}. Is the corpus complete there?") from error
            except TemporaryFaultError as error:
                failures = 1 if sink.position > before else failures + 1
                self._wait(name, failures, error)

    def _pour(self, transfer: Transfer, sink: Sink, start: int, stop: int | None) -> None:
        end = stop if stop is not None else transfer.size
        if stop is not None and transfer.size is not None and transfer.size < stop:
            raise WrongSizeError(f"the file has {transfer.size} bytes, byte {stop - 1} was asked for")
        position = transfer.start
        if position != start + sink.position:
            sink.restart()
        for chunk in transfer.chunks:
            if self.stopped.is_set():
                raise StorageError(f"{self.store.address}: reading was stopped.")
            skip = max(0, start + sink.position - position)  # of a store that begins at 0 whatever is asked for
            position += len(chunk)
            room = None if end is None else end - start - sink.position
            wanted = chunk[skip : None if room is None else skip + room]
            if wanted:
                sink.write(wanted)
                self.counters.add("downloaded_bytes", len(wanted))
            if end is not None and position >= end:
                break
        if end is not None and start + sink.position != end:
            raise TemporaryFaultError(f"the body ends at byte {start + sink.position} of {end}")

    def _wait(self, name: str, failures: int, error: TemporaryFaultError) -> None:
        self.counters.add("retries")
        if isinstance(error, WrongSizeError) and failures >= _ATTEMPTS_AT_WRONG_SIZE:
            raise DataError(f"{self.store.address}: {name} is not the file of the manifest: {error}.") from error
        if failures >= self.policy.attempts:
            raise StorageError(
                f"{self.store.address}: {name} could not be read in {failures} attempts. Last: {error}. "
                f"Check address and network, then start again: what was done before is kept."
            ) from error
        delay = self.policy.delay(failures)
        _LOGGER.warning(
            "%s: %s: %s; attempt %d of %d in %.1f s",
            self.store.address,
            name,
            error,
            failures + 1,
            self.policy.attempts,
            delay,
        )
        if self.stopped.wait(delay):
            raise StorageError(f"{self.store.address}: reading was stopped.") from error
