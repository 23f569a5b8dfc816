"""RUN/log.jsonl: one JSON object a line, flushed at once, in order of steps; those of a save come when it has ended,
some steps later.

Kinds: `start` (a process begins or resumes), `step` (one optimizer step, skipped ones included), `validation`,
`checkpoint`, `checkpoint_failure`, `data_fork` (other data settings from here on), `end`. Every record has `kind`,
`step` and `time` (unix seconds).
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

FILE_NAME = "log.jsonl"


class RunLog:
    """Appends records; only rank 0 has one that writes."""

    def __init__(self, run_dir: Path, keep_through_step: int | None) -> None:
        """Open RUN/log.jsonl for appending.

        Args:
            run_dir: the run directory.
            keep_through_step: records of later steps are cut off first, with a torn last line: a resumed run writes
                them again. None empties the file.
        """
        self.path = run_dir / FILE_NAME
        self.validated: set[int] = set()
        self._cut(-1 if keep_through_step is None else keep_through_step)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._pending = b""
        self._has_failed = False

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """Append one record; numbers that are not finite become null.

        A full disk does not stop the run: records that do not fit are kept and written before the next one.
        """
        record = {"kind": kind, "step": step, "time": time.time(), **fields}
        if kind == "validation":
            self.validated.add(step)
        line = json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False) + "\n"
        self._pending += line.encode()
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._descriptor, self._pending) :]
        except OSError as error:
            if not self._has_failed:
                print(f"longspan: {self.path}: {error.strerror}; records wait for space", file=sys.stderr, flush=True)
            self._has_failed = True

    def close(self) -> None:
        """No more records."""
        os.close(self._descriptor)

    def _cut(self, last_step: int) -> None:
        """Drop records of later steps. Records of a save come some steps after their own, so any may follow any."""
        if not self.path.exists():
            return
        kept = self.path.with_name(f".{FILE_NAME}.tmp")
        with open(self.path, "rb") as file, open(kept, "wb") as out:
            for line in file:
                record = _record(line)
                if record is None:
                    break
                if record["step"] <= last_step:
                    out.write(line)
                    if record["kind"] == "validation":
                        self.validated.add(record["step"])
        os.replace(kept, self.path)


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a whole line, None for a torn or foreign one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if whole and isinstance(record.get("kind"), str) else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
