"""Places of a lane plan to seek from: kept in memory, and on disk so that a later process seeks as fast.

A file is `plan-DIGEST.snapshots`: 64 hex digits, the sha256 of the plan's digest and all that follows; then rows of
little-endian int64, each a cursor. A file that is damaged, cut off or of another plan is ignored and written anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from bisect import bisect_right
from pathlib import Path

import numpy as np

from longspan.data_pipeline.regular_files import read_regular
from longspan.data_pipeline.timeline import Cursor, Held

_MOST_SNAPSHOTS = 512
_MOST_FILES = 32
_FIRST_INTERVAL_STEPS = 256
_LANE_COLUMNS = ("sequence", "ordinal", "position", "length")
# Below this a plan is walked again faster than a person notices, and a folder of small files serves nobody.
_REFILLS_WORTH_A_FILE = 500_000
_LOGGER = logging.getLogger("longspan.data")


def plan_cache_folder() -> Path:
    """Where snapshots are kept unless told otherwise: `plans` in $XDG_CACHE_HOME/longspan or ~/.cache/longspan."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longspan" / "plans"


class Snapshots:
    """Cursors at growing steps, at most _MOST_SNAPSHOTS of them: every second is dropped when there are more."""

    def __init__(self, start: Cursor, folder: Path | None, digest: str) -> None:
        """Args: start: the first cursor; folder: of the file, None: memory only; digest: of the plan, in hex."""
        self._cursors = [start]
        self._interval_steps = _FIRST_INTERVAL_STEPS
        self._unsaved_refills = 0
        self._digest = digest
        self._file = None if folder is None else folder / f"plan-{digest[:40]}.snapshots"
        if self._file is not None:
            self._load(self._file)

    def nearest(self, step: int) -> Cursor:
        """The last cursor not after `step`."""
        return self._cursors[bisect_right(self._cursors, step, key=lambda cursor: cursor.step) - 1]

    def offer(self, cursor: Cursor, refills: int) -> None:
        """Keep `cursor` if it is far enough from the last; `refills` were walked to get to it."""
        last = self._cursors[-1]
        self._unsaved_refills += refills if cursor.step > last.step else 0
        if cursor.step >= last.step + self._interval_steps:
            if len(self._cursors) >= _MOST_SNAPSHOTS:
                self._cursors = self._cursors[::2]
                self._interval_steps *= 2
            self._cursors.append(cursor)

    def save(self) -> None:
        """Write the file if enough was walked since it was last written; a failure is logged and forgotten."""
        if self._file is None or self._unsaved_refills < _REFILLS_WORTH_A_FILE:
            return
        self._unsaved_refills = 0
        payload = np.array([_row(cursor) for cursor in self._cursors], dtype="<i8").tobytes()
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(self._file, _seal(self._digest, payload) + payload)
            files = sorted(self._file.parent.glob("plan-*.snapshots"), key=lambda file: file.stat().st_mtime)
            for file in files[:-_MOST_FILES]:
                file.unlink(missing_ok=True)
        except OSError as error:
            _LOGGER.warning("plan snapshots are not kept: %s. Seeking in a later process takes longer.", error)

    def _load(self, file: Path) -> None:
        try:
            content = read_regular(file)
        except OSError:
            return
        seal, payload = content[:64], content[64:]
        start = self._cursors[0]
        width = len(_row(start))
        if seal != _seal(self._digest, payload) or not payload or len(payload) % (8 * width):
            _LOGGER.warning("%s is damaged or of another plan; it is ignored and will be written anew.", file)
            return
        rows = np.frombuffer(payload, dtype="<i8").astype(np.int64).reshape(-1, width)
        self._cursors = [start, *(_cursor(row, start) for row in rows[1:])]
        if len(self._cursors) > 2:
            self._interval_steps = max(self._interval_steps, self._cursors[2].step - self._cursors[1].step)


def _write_whole(file: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".plan-")
    try:
        with open(handle, "wb") as stream:
            stream.write(content)
        os.replace(name, file)
    except OSError:
        os.unlink(name)
        raise


def _seal(digest: str, payload: bytes) -> bytes:
    return hashlib.sha256(digest.encode() + payload).hexdigest().encode()


def _row(cursor: Cursor) -> np.ndarray:
    lanes = [getattr(cursor.held, name) for name in _LANE_COLUMNS]
    return np.concatenate([[cursor.step], cursor.taken, cursor.assigned, *lanes])


def _cursor(row: np.ndarray, like: Cursor) -> Cursor:
    num_sequences, num_sources, lanes = len(like.taken), len(like.assigned), len(like.held.lane)
    taken = row[1 : 1 + num_sequences].tolist()
    assigned = row[1 + num_sequences : 1 + num_sequences + num_sources].tolist()
    columns = row[1 + num_sequences + num_sources :].reshape(len(_LANE_COLUMNS), lanes)
    return Cursor(int(row[0]), tuple(taken), tuple(assigned), Held(like.held.lane, *columns))
