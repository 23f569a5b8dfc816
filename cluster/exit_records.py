"""How each rank of a node ended, told to the launcher through files. Imports no torch.

Under torchrun a worker's exit code becomes 1, so a worker writes its own code, message and result into the folder
that `LONGSPAN_EXIT_RECORDS` names; the launcher reads them (docs/launch.md). Without that variable nothing is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longspan.cluster import environment
from longspan.errors import (
    EXIT_DIVERGENCE,
    EXIT_FAULT,
    EXIT_OK,
    EXIT_READER_GONE,
    EXIT_REQUEUE,
    EXIT_USAGE,
    ClusterError,
    LongspanError,
    UsageError,
)

# the message of a rank that ends because another one does
FOLLOWED = "another rank ended the run; its own message says why."
FOLDER_VARIABLE = "LONGSPAN_EXIT_RECORDS"
# ends that a restart would only repeat
FINAL_CODES = (EXIT_OK, EXIT_USAGE, EXIT_DIVERGENCE, EXIT_REQUEUE, EXIT_READER_GONE)


@dataclass(frozen=True)
class ExitRecord:
    """How one worker ended.

    Attributes:
        rank: among all processes. exit_code: of `longspan.errors`. pid: its process.
        message: what its error said; empty if there was none.
        result: what the command returned; None if it raised.
        time: when, in seconds of this host's clock.
    """

    rank: int
    exit_code: int
    pid: int
    message: str = ""
    result: dict[str, Any] | None = None
    time: float = 0.0


_noted: dict[str, Any] = {}
# how long a process that leaves the message to another lets that one live to say it: torchrun ends all with the first
_SPEAKER_SECONDS = 3.0
_ASK_SECONDS = 0.05
# what was said so long ago is of no use to anybody
_FORGET_SECONDS = 600.0
_began = time.time()
_met = False


def note(message: str = "", result: dict[str, Any] | None = None) -> None:
    """Remember what this process has to say about its end, for the record that is written when it ends."""
    _noted.update(message=message, result=result)


def launcher_listens() -> bool:
    """Whether a launcher will say what this process notes; it need not say it itself then."""
    return FOLDER_VARIABLE in os.environ


def never_met(message: str) -> LongspanError:
    """The error of ranks that did not all come: usage, unless a launcher is going to start all of them again."""
    started, most = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return ClusterError(message) if launcher_listens() and started < most else UsageError(message)


def meet() -> None:
    """Note that all ranks have compared themselves: from now on what ends one of them is known to rank 0."""
    global _met
    _met = True


def to_say(message: str) -> str | None:
    """What this process says on standard error of its end, so that there is one message and not one a rank.

    Before the ranks have met that is the first process of each host, as others cannot know what happens there; later
    it is rank 0. With a launcher that listens it is none. A process whose environment does not say which rank it is
    speaks for itself. One that leaves it to the first of its host waits a moment for that one to say the same, and
    names itself if it does not; torchrun ends it meanwhile if the first has ended.

    Args:
        message: why this process ends.

    Returns:
        The message, perhaps with this process's rank; None: nothing.
    """
    if launcher_listens():
        return None
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    if not environment.names_a_rank() or rank == "0" or (not _met and local_rank == "0"):
        if not _met and "RANK" in os.environ:
            _tell_host(message)
        return message
    if _met:
        return None
    deadline = time.monotonic() + _SPEAKER_SECONDS
    while not _host_was_told(message):
        if time.monotonic() > deadline:
            _tell_host(message)
            return message if message.startswith(f"rank {rank} ") else f"rank {rank}: {message}"
        time.sleep(_ASK_SECONDS)
    return None


def _said_file() -> Path:
    """Where the processes of this user on this host note what they have said."""
    return Path(tempfile.gettempdir()) / f"longspan-said-{os.getuid()}"


def _key(message: str) -> str:
    """The same for the same message of one attempt of one run; ranks and process numbers in it may differ."""
    names = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    said = "\n".join([*(os.environ.get(name, "") for name in names), re.sub(r"\d+", "#", message)])
    return hashlib.sha256(said.encode()).hexdigest()


def _tell_host(message: str) -> None:
    """Note that this process says `message`; without a place for that every process says what it has to."""
    path, flags = _said_file(), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    with contextlib.suppress(OSError):
        if path.exists() and time.time() - path.stat().st_mtime > _FORGET_SECONDS:
            flags |= os.O_TRUNC
        with os.fdopen(os.open(path, flags, 0o600), "a", encoding="ascii") as file:
            file.write(f"{time.time()} {_key(message)}\n")


def _host_was_told(message: str) -> bool:
    """Whether a process of this host has said it since this one began: not one of an earlier start."""
    try:
        lines = _said_file().read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return False
    key = _key(message)
    return any(found[1:] == [key] and float(found[0]) > _began for found in map(str.split, lines) if found)


def leave(exit_code: int) -> int:
    """Write this worker's record, if there is a launcher to read it.

    Args:
        exit_code: how the worker ends.

    Returns:
        What the process has to exit with. An end that a restart would repeat is 0 to torchrun, which otherwise
        restarts; the launcher takes the code from the record.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return exit_code
    record = ExitRecord(int(os.environ.get("RANK", "0")), exit_code, os.getpid(), time=time.time(), **_noted)
    _write(Path(folder) / f"exit-{os.getpid()}.json", asdict(record))
    return EXIT_OK if exit_code in FINAL_CODES else exit_code


def arrive() -> None:
    """Tell the launcher that this process is a worker, so that it gets the launcher's signals."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        local_rank = os.environ.get("LOCAL_RANK", "0")
        (Path(folder) / f"worker-{local_rank}-{time.time_ns()}-{os.getpid()}").touch()


def attempts(folder: Path) -> list[set[int]]:
    """Process ids of all workers that arrived on this node, attempt by attempt: a rank's n-th worker is in the n-th."""
    arrived: dict[int, list[tuple[int, int]]] = {}
    for path in folder.glob("worker-*"):
        local_rank, when, pid = (int(part) for part in path.name.split("-")[1:])
        arrived.setdefault(local_rank, []).append((when, pid))
    count = max((len(workers) for workers in arrived.values()), default=0)
    found: list[set[int]] = [set() for _ in range(count)]
    for workers in arrived.values():
        for number, (_, pid) in enumerate(sorted(workers)):
            found[number].add(pid)
    return found


def records(folder: Path) -> list[ExitRecord]:
    """All records of this node, earliest first; those of earlier attempts as well."""
    found = [ExitRecord(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("exit-*.json")]
    return sorted(found, key=lambda record: record.time)


def agreed_code(ends: list[ExitRecord]) -> int:
    """The exit code of the last attempt: its first end that is not 0; a fault if nobody could say anything."""
    if not ends:
        return EXIT_FAULT
    return next((record.exit_code for record in ends if record.exit_code != EXIT_OK), EXIT_OK)


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    os.replace(temporary, path)
