"""RUN/evals/failed/KEY.json: why a checkpoint has no result, and whether it is tried again."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from longspan.errors import EXIT_FAULT, EXIT_USAGE

FOLDER = "failed"
MAX_ATTEMPTS = 3
FINAL_EXIT_CODES = (EXIT_USAGE, EXIT_FAULT)  # the inputs were looked at and refused: they will be again


@dataclass(frozen=True)
class Failure:
    """One evaluation that failed.

    Attributes:
        checkpoint: its path. key: of the evaluation. spec: name of the spec.
        exit_code: as a command would have ended with; None: the worker died.
        attempts: that counted so far; a full disk does not.
        time: unix seconds of the last one.
        reason: for people.
    """

    checkpoint: str
    key: str
    spec: str
    exit_code: int | None
    attempts: int
    time: float
    reason: str

    @property
    def is_final(self) -> bool:
        """Whether only `longspan evals retry` makes it run again."""
        return self.attempts > 0 and (self.exit_code in FINAL_EXIT_CODES or self.attempts >= MAX_ATTEMPTS)


def read_failure(evals: Path, key: str) -> Failure | None:
    """What is noted; None for nothing, or a note that is damaged."""
    try:
        return Failure(**json.loads(_file(evals, key).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def note_failure(
    evals: Path, key: str, *, checkpoint: Path, spec: str, reason: str, exit_code: int | None, transient: bool = False
) -> Failure:
    """Note a failure, counting the ones before.

    Args:
        evals: RUN/evals.
        key, checkpoint, spec, reason, exit_code: as `Failure`.
        transient: this attempt does not count: the machine was at fault.

    Returns:
        The note, also if the disk has no room for it.
    """
    known = read_failure(evals, key)
    attempts = (known.attempts if known else 0) + (0 if transient else 1)
    failure = Failure(str(checkpoint), key, spec, exit_code, attempts, time.time(), reason)
    path = _file(evals, key)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        evals.mkdir(exist_ok=True)  # no parents: a run that was deleted does not come back as a folder of failures
        path.parent.mkdir(exist_ok=True)
        temporary.write_text(json.dumps(asdict(failure), indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return failure


def forget_failure(evals: Path, key: str) -> bool:
    """Remove the note; whether there was one."""
    path = _file(evals, key)
    existed = path.exists()
    path.unlink(missing_ok=True)
    return existed


def unkeyed(spec_digest: str, checkpoint: str) -> str:
    """Stands for the key of a checkpoint (folder's name) whose key cannot be made."""
    return f"unreadable-{spec_digest[:8]}-{checkpoint}"


def _file(evals: Path, key: str) -> Path:
    return evals / FOLDER / f"{key}.json"
