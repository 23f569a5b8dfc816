"""Sends results to MLflow from a thread, so that a slow or dead server costs no worker its time."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from longspan.trainer.evaluation.events import note
from longspan.trainer.evaluation.folders import CURVE, LOGGED, read_result
from longspan.trainer.evaluation_tracking import Outcome, send_evaluation, store_name

PAUSE_SECONDS = 30.0

Entry = tuple[Path, str]
"""RUN/evals and key."""


@dataclass
class _Line:
    """What waits for one store, in the order in which it came, and until when (monotonic) the store is left alone."""

    waiting: deque[Entry] = field(default_factory=deque)
    down_until: float = 0.0


class Sink:
    """Logs results in the order in which they come.

    A store that does not answer is left alone for a pause; what it did not get is sent first afterwards. What a
    store refuses is not sent again here. Neither holds up the results that come after it or belong to another store.
    """

    def __init__(self) -> None:
        """Send nothing yet."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._sent: list[Future[None]] = []
        self._lines: dict[str, _Line] = defaultdict(_Line)  # by store
        self._refused: list[Entry] = []

    def add(self, evals: Path, key: str) -> None:
        """Send a finished result, unless it was sent before."""
        self._sent.append(self._thread.submit(self._append, (evals, key)))

    def close(self) -> list[Entry]:
        """Wait until everything was sent or refused; returns what MLflow has not got."""
        self._thread.shutdown(wait=True)
        for future in self._sent:
            future.result()
        for line in self._lines.values():
            line.down_until = 0.0
            _send(line, self._refused)
        return [*self._refused, *(entry for line in self._lines.values() for entry in line.waiting)]

    def is_down(self, evals: Path) -> bool:
        """Whether the store of a run (RUN/evals) did not answer when it was last asked."""
        line = self._lines.get(store_name(evals.parent))
        return line is not None and bool(line.waiting)

    def _append(self, entry: Entry) -> None:
        line = self._lines[store_name(entry[0].parent)]
        line.waiting.append(entry)
        _send(line, self._refused)


def _send(line: _Line, refused: list[Entry]) -> None:
    while line.waiting and time.monotonic() >= line.down_until:
        outcome = _send_one(*line.waiting[0])
        if outcome == "later":
            line.down_until = time.monotonic() + PAUSE_SECONDS
            return
        entry = line.waiting.popleft()
        if outcome == "refused":
            refused.append(entry)


def _send_one(evals: Path, key: str) -> Outcome:
    try:
        if (evals / key / LOGGED).exists():
            return "elsewhere"
        result = read_result(evals / key)
    except OSError:
        return "refused"
    if result is None:  # gone since
        return "off"
    outcome = send_evaluation(evals.parent, result, evals / key / CURVE)
    if outcome == "logged":
        note(evals, "logged", key)
    return outcome
