"""Stop on request: the first signal asks, the second one ends the process at once."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """While active, remembers the first of SIGTERM, SIGINT and SIGUSR1. Use in the main thread.

    Attributes:
        received: name of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGUSR1:  # a scheduler's notice, which may come on several ways
                return
            os._exit(128 + number)
        self.received = signal.Signals(number).name
        # a print could run into a half-done one of the interrupted code
        os.write(
            sys.__stderr__.fileno() if sys.__stderr__ else 2,
            f"\nlongspan: {self.received}: finishing the step and saving; a second signal ends at once.\n".encode(),
        )
