"""RUN/evals/events.jsonl: what happened to evaluations, one object a line, appended whole by any process."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

FILE = "events.jsonl"


def note(evals: Path, event: str, key: str, **fields: Any) -> None:
    """Append one event: claimed, scored, evaluated, failed, lost, logged, alerted.

    Nothing depends on this file, so a disk error loses the line and nothing else.

    Args:
        evals: RUN/evals.
        event: what happened.
        key: to which evaluation.
        fields: JSON-able.
    """
    line = json.dumps({"time": round(time.time(), 3), "event": event, "key": key, "pid": os.getpid(), **fields}) + "\n"
    with suppress(OSError):
        descriptor = os.open(evals / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
