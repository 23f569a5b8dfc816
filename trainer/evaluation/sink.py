"""Sends results to MLflow from a thread, so that a slow or dead server costs no worker its time."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from longspan.trainer.evaluation.events import note
from longspan.trainer.evaluation.folders import CURVE, LOGGED, read_result
from longspan.trainer.evaluation_tracking import send_evaluation

PAUSE_SECONDS = 30.0

Entry = tuple[Path, str]
"""RUN/evals and key."""


class Sink:
    """Logs results in the order in which they come; after a failure pauses, then sends what was left first."""

    def __init__(self) -> None:
        """Send nothing yet."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._sent: list[Future[None]] = []
        self._left: list[Entry] = []
        self._down_until = 0.0

    def add(self, evals: Path, key: str) -> None:
        """Send a finished result, unless it was sent before."""
        if not (evals / key / LOGGED).exists():
            self._sent.append(self._thread.submit(self._send, (evals, key)))

    def close(self) -> list[Entry]:
        """Wait until everything was sent or refused; returns what MLflow has not got."""
        self._thread.shutdown(wait=True)
        for future in self._sent:
            future.result()
        self._down_until = 0.0
        self._send()
        return self._left

    def _send(self, *entries: Entry) -> None:
        self._left += entries
        while self._left and time.monotonic() >= self._down_until:
            evals, key = self._left[0]
            result = read_result(evals / key)
            outcome = "gone" if result is None else send_evaluation(evals.parent, result, evals / key / CURVE)
            if outcome == "later":
                self._down_until = time.monotonic() + PAUSE_SECONDS
                return
            if outcome == "logged":
                note(evals, "logged", key)
            self._left.pop(0)
