"""What ranks do that end badly; processes of their own import this."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

from longspan.trainer.bench.context_parallel.messages import Began, Verdict

LONG_SECONDS = 600.0


def live(rank: int, parent: Connection, end: str, folder: str) -> None:
    """Rank 0 waits for ever for rank 1, which is killed, raises, hangs or exits; or both end well."""
    print("on standard output")
    parent.send(Began("first"))
    if rank == 0:
        parent.send(Verdict("first", "", True))
    parent.send(Began("second"))
    Path(folder, str(rank)).write_text(str(os.getpid()))
    while not Path(folder, str(1 - rank)).exists():
        time.sleep(0.01)
    if rank == 1 and end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and end == "raises":
        raise MemoryError("no room\nfor more")
    if rank == 1 and end == "exits":
        os._exit(3)
    if end == "well":
        return
    if end == "complains":
        _complain(rank, Path(folder))
    time.sleep(LONG_SECONDS)


def _complain(rank: int, folder: Path) -> None:
    """Rank 0 is heard before it shows that rank 1 was killed."""
    if rank == 1:
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    raise ConnectionError("peer is gone")
