"""The kernel's lock on a file (flock): it ends with the process that holds it, however that ends."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from pathlib import Path

_LOG = logging.getLogger("longspan.trainer.checkpoint.file_lock")

# NFS 4 servers give the locks of a host that has gone to others after their lease, 90 s by default
LEASE_SECONDS = 120.0
_ASK_SECONDS = 1.0


def open_locked(path: Path) -> int | None:
    """A descriptor that holds the lock of a file, made if need be; None if another process holds it.

    Where the file system has no locks the descriptor holds none.

    Raises:
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # NFS without lockd, Lustre mounted without flock
        pass
    return descriptor


def open_locked_patiently(path: Path, host: str | None) -> int | None:
    """As `open_locked`, but waits for the lock of another host, which may have gone without a word.

    A job that is requeued after its host has died is back before the file server lets go of the old lock.

    Args: host: of the process that holds the lock, as far as anybody knows.
    """
    descriptor = open_locked(path)
    if descriptor is not None or host in (None, socket.gethostname()):
        return descriptor
    _LOG.warning(f"{path} is locked from host {host}. Waiting up to {LEASE_SECONDS:.0f} s, in case that host has gone.")
    deadline = time.monotonic() + LEASE_SECONDS
    while descriptor is None and time.monotonic() < deadline:
        time.sleep(_ASK_SECONDS)
        descriptor = open_locked(path)
    return descriptor
