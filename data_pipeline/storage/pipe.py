"""Files from the output of a command, for stores that only a program can reach; off unless it is allowed by name."""

from __future__ import annotations

import select
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from longspan.data_pipeline.storage.retry import RetryPolicy
from longspan.data_pipeline.storage.store import TemporaryFaultError, Transfer
from longspan.errors import SecurityError, UsageError

_CHUNK_BYTES = 2**20
_KILL_SECONDS = 5


class PipeStore:
    """Runs `pipe:PROGRAM ARGUMENTS` for each file, with `{}` replaced by the file's name. No shell is involved."""

    def __init__(self, address: str, policy: RetryPolicy, allowed: Sequence[str]) -> None:
        """
        Args:
            address: e.g. `pipe:aws s3 cp s3://bucket/folder/{} -`.
            policy: its timeout is used for each wait.
            allowed: names of programs that may be run.

        Raises:
            SecurityError: the program is not allowed.
            UsageError: the command has no place for the file's name.
        """
        self.address = address
        self._timeout_seconds = policy.timeout_seconds
        self._command = shlex.split(address.removeprefix("pipe:"))
        program = self._command[0] if self._command else ""
        if program not in allowed:
            raise SecurityError(
                f"data.shards = {address}: it runs the program {program!r}, which is not allowed "
                f"(allowed: {', '.join(allowed) or 'none'}). Use a folder, http(s):// or s3://; "
                f"or name the program in data.allowed_pipes if you trust it."
            )
        if not any("{}" in argument for argument in self._command[1:]):
            raise UsageError(f"data.shards = {address}: put {{}} where the file's name goes.")

    @contextmanager
    def open(
        self, name: str, start: int = 0, stop: int | None = None, validator: str | None = None
    ) -> Iterator[Transfer]:
        """Begin to read; see `Store.open`. A command always begins at 0; UsageError if it cannot be started."""
        command = [argument.replace("{}", name) for argument in self._command]
        try:
            process = subprocess.Popen(  # noqa: S603  no shell, and the program was allowed by name
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
            )
        except OSError as error:
            raise UsageError(f"data.shards = {self.address}: {command[0]}: {error.strerror}.") from error
        try:
            yield Transfer(0, None, None, self._chunks(process))
        finally:
            process.kill()
            process.wait(_KILL_SECONDS)
            if process.stdout is not None:
                process.stdout.close()

    def _chunks(self, process: subprocess.Popen[bytes]) -> Iterator[bytes]:
        assert process.stdout is not None
        waiting = select.poll()
        waiting.register(process.stdout, select.POLLIN | select.POLLHUP)
        while True:
            if not waiting.poll(self._timeout_seconds * 1000):
                raise TemporaryFaultError(f"no output in {self._timeout_seconds:g} s")
            chunk = process.stdout.read(_CHUNK_BYTES)
            if not chunk:
                break
            yield chunk
        if status := process.wait(self._timeout_seconds):
            raise TemporaryFaultError(f"{process.args!r} ended with status {status}")
