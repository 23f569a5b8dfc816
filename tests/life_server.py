"""The client of a process of `forked_lives`: starts it, asks it for lives, hears how they ended."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

START_SECONDS = 120.0  # imports, on a loaded machine
LIFE_SECONDS = 60.0


class LifeServer:
    """A server of lives; one life at a time.

    A test must not fork its own process for what may run other threads' code, of torch or a tokenizer say: locks that
    they hold at that moment are held for ever in the child.
    """

    def __init__(self, script: Path) -> None:
        """Args: script: calls `forked_lives.serve`."""
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._pending = b""
        assert self.answer(START_SECONDS) == {"ready": True}, "the fork-server did not start"

    def ask(self, **request: Any) -> int:
        """Start a life; its pid."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        answer = self.answer(LIFE_SECONDS)
        assert answer is not None, "the fork-server does not answer"
        return int(answer["pid"])

    def live(self, **request: Any) -> int:
        """One life from its start to its end; its exit code, or minus the signal that ended it."""
        pid, answer = self.ask(**request), self.answer(LIFE_SECONDS)
        assert answer is not None, f"process {pid} does not end"
        return int(answer["status"])

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """The next answer if it comes within this time."""
        assert self._process.stdout is not None
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._pending:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            received = os.read(descriptor, 65536)
            assert received, "the fork-server is gone"
            self._pending += received
        line, _, self._pending = self._pending.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        """No more lives."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(LIFE_SECONDS)
