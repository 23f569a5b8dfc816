"""A file that says who works on something; it counts for as long as its owner keeps touching it."""

from __future__ import annotations

import fcntl
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VALID_SECONDS = 120.0


class Lease:
    """Held by one process at a time; a dead owner's lease is free again after `VALID_SECONDS`."""

    def __init__(self, path: Path, owner: str) -> None:
        """Use `take`."""
        self._path = path
        self._owner = owner

    @classmethod
    def take(cls, path: Path, valid_seconds: float = VALID_SECONDS) -> Lease | None:
        """The lease, or None while somebody else holds it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with _guard(path):
            if path.exists() and time.time() - path.stat().st_mtime < valid_seconds:
                return None
            owner = uuid.uuid4().hex
            path.write_text(owner, encoding="utf-8")
            return cls(path, owner)

    def renew(self) -> None:
        """Say that the work goes on; does nothing if the lease was lost in the meantime."""
        with _guard(self._path):
            if self._is_mine():
                self._path.touch()

    def release(self) -> None:
        """Give the lease back."""
        with _guard(self._path):
            if self._is_mine():
                self._path.unlink()

    def _is_mine(self) -> bool:
        return self._path.exists() and self._path.read_text(encoding="utf-8") == self._owner


@contextmanager
def _guard(path: Path) -> Iterator[None]:
    """One process at a time looks at the leases of a folder; held for a moment only."""
    with (path.parent / ".guard").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
