"""What a rank tells the watchdog about itself, and the verdict over what all ranks told. Imports no torch."""

from __future__ import annotations

import linecache
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from longspan.cluster.blame import blame
from longspan.errors import EXIT_DIVERGENCE, EXIT_FAULT, EXIT_HANG, EXIT_OK, EXIT_REQUEUE, EXIT_USAGE

# a rank that says nothing at all is given up before one that is alive but makes no progress
SILENCE_SECONDS = 60.0
# how long the others may take to notice by themselves that a rank has ended with an error
GRACE_SECONDS = 10.0
_CODES = (EXIT_USAGE, EXIT_FAULT, EXIT_HANG, EXIT_DIVERGENCE)
_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Beat:
    """One rank at one moment.

    Attributes:
        host, pid: its process.
        count: phases that it has entered so far; all ranks go through the same ones.
        phase, step: where it is.
        age_seconds: since it entered the phase. limit_seconds: what the phase may take.
        waiting: the collective that it waits in; empty if in none.
        place: innermost line of Longspan's code that it is at.
        calls: its collectives, as `Recorder.told` gives them; told only by a rank that has stood still for a while.
        lost_contact: a collective failed here, as it does when another rank dies.
        left: its exit code, once it has ended. message: what its error said.
    """

    host: str
    pid: int
    count: int
    phase: str
    step: int
    age_seconds: float
    limit_seconds: float
    waiting: str = ""
    place: str = ""
    calls: dict[str, Any] | None = None
    lost_contact: bool = False
    left: int | None = None
    message: str = ""

    def where(self) -> str:
        """The phase in words."""
        return f"in phase '{self.phase}' at step {self.step}"


@dataclass(frozen=True)
class Seen:
    """A rank as rank 0 sees it.

    Attributes:
        beat: the last one. silent_seconds: since it came.
        gone: its connection has ended without a farewell: the process is dead.
        left_seconds: since its farewell.
    """

    beat: Beat
    silent_seconds: float = 0.0
    gone: bool = False
    left_seconds: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """Why the run cannot go on, and the exit code of all ranks. `culprits`: the ranks it is about."""

    exit_code: int
    message: str
    culprits: tuple[int, ...]


def judge(ranks: Mapping[int, Seen]) -> Verdict | None:
    """Whether the run can go on. None if it can.

    A rank is dead when its connection ends, silent after `SILENCE_SECONDS` or its phase's limit if that is less, and
    hung when it has spent its phase's limit and no other rank has entered fewer phases. Ranks that wait in a
    collective for one that does not are not hung.
    """
    present = {rank: seen for rank, seen in ranks.items() if seen.beat.left is None}
    dead = {rank: seen for rank, seen in present.items() if seen.gone}
    if dead:
        return _verdict(dead, "died,", lambda seen: f"last seen {seen.beat.where()}")
    lost_contact = any(seen.beat.lost_contact for seen in present.values())
    for rank, seen in ranks.items():
        code = seen.beat.left
        if (
            present
            and code not in (None, EXIT_OK, EXIT_REQUEUE)
            and (lost_contact or seen.left_seconds > GRACE_SECONDS)
        ):
            return ended(rank, seen.beat)
    silent = {rank: seen for rank, seen in present.items() if seen.silent_seconds > silence_limit(seen.beat)}
    if silent:
        return _verdict(
            silent, "does not answer", lambda seen: f"for {seen.silent_seconds:.0f} s, last seen {seen.beat.where()}"
        )
    return _hung(present, lost_contact)


def silence_limit(beat: Beat) -> float:
    """How long a rank in this phase may say nothing, in seconds."""
    return min(SILENCE_SECONDS, beat.limit_seconds)


def ended(rank: int, beat: Beat) -> Verdict:
    """The verdict for ranks that are left behind by one that ended with an error."""
    code = beat.left if beat.left in _CODES else EXIT_FAULT
    reason = f": {beat.message}" if beat.message else "."
    assert code is not None
    return Verdict(code, f"rank {rank} on host {beat.host} ended with exit code {beat.left}{reason}", (rank,))


def died(rank: int, beat: Beat) -> Verdict:
    """The verdict for a rank whose connection ended without a farewell."""
    return _verdict({rank: Seen(beat)}, "died,", lambda seen: f"last seen {seen.beat.where()}")


def _hung(present: Mapping[int, Seen], lost_contact: bool) -> Verdict | None:
    """Whether a rank is hung; which one the ranks' phases, and their collectives, show."""
    least = min((seen.beat.count for seen in present.values()), default=0)
    behind = {rank for rank, seen in present.items() if seen.beat.count == least}
    late = any(present[rank].beat.age_seconds > present[rank].beat.limit_seconds for rank in behind)
    if not late and not lost_contact:
        return None
    found = blame({rank: seen.beat.calls for rank, seen in present.items() if seen.beat.calls})
    if not late and (found is None or not found.is_disagreement):
        return None
    waiting = {rank for rank, seen in present.items() if _waits(seen.beat)}
    named = set(found.culprits) if found else set()
    if not (found and found.is_disagreement) and waiting:
        named |= behind - waiting
    culprits = {rank: seen for rank, seen in present.items() if rank in (named or behind)}

    def story(seen: Seen) -> str:
        beat = seen.beat
        place = f", at {beat.place}" if beat.place else ""
        waits = f", waiting in {beat.waiting}" if beat.waiting else ""
        return f"{beat.where()} for {beat.age_seconds:.0f} s (limit {beat.limit_seconds:.0f} s){waits}{place}"

    verdict = _verdict(culprits, "hangs", story)
    waits = sorted({seen.beat.waiting for rank, seen in present.items() if rank not in culprits and seen.beat.waiting})
    others = f" The other ranks wait in {', '.join(waits)}." if waits else ""
    collective = f" {found.sentence}" if found else ""
    return Verdict(verdict.exit_code, verdict.message + others + collective, verdict.culprits)


def _waits(beat: Beat) -> bool:
    return bool(beat.waiting or (beat.calls and beat.calls["waits"]))


def _verdict(culprits: Mapping[int, Seen], verb: str, story: Callable[[Seen], str]) -> Verdict:
    lines = [
        f"rank {rank} (process {seen.beat.pid} on host {seen.beat.host}) {verb} {story(seen)}"
        for rank, seen in sorted(culprits.items())
    ]
    return Verdict(EXIT_HANG, "; ".join(lines) + ".", tuple(sorted(culprits)))


def current_place(own_thread: int) -> tuple[str, str]:
    """(collective that some thread of this process waits in, innermost line of Longspan's code); either may be empty.

    Args:
        own_thread: identifier of the caller's thread, which is left out.
    """
    waiting, best, main = "", "", threading.main_thread().ident
    for thread, frame in sorted(sys._current_frames().items(), key=lambda found: found[0] != main):
        if thread == own_thread:
            continue
        name, place = _look(frame)
        # the thread that waits tells most, then the main one
        best = place if name and not waiting and place else best or place
        waiting = waiting or name
    return waiting, best


def _look(innermost: FrameType) -> tuple[str, str]:
    waiting, place = "", ""
    innermost_line = innermost.f_lineno or 0  # None, whatever its type says, at an instruction that has no line
    line = linecache.getline(innermost.f_code.co_filename, innermost_line)
    if ".wait(" in line and Path(innermost.f_code.co_filename).name != "threading.py":  # a handle of a collective
        waiting = f"{innermost.f_code.co_name} ({Path(innermost.f_code.co_filename).name}:{innermost_line})"
    frame: FrameType | None = innermost
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.name == "distributed_c10d.py":
            waiting = frame.f_code.co_name  # the outermost: the collective that was asked for
        elif not place and _is_ours(path):
            place = f"{path.relative_to(_PACKAGE)}:{frame.f_lineno or 0} {frame.f_code.co_name}"
        frame = frame.f_back
    return waiting, place


def _is_ours(path: Path) -> bool:
    """Whether a file is Longspan's, and not only the wrapper around a collective."""
    if not path.is_relative_to(_PACKAGE) or path.name == "collectives.py":
        return False
    return "site-packages" not in path.relative_to(_PACKAGE).parts  # an environment inside of the source tree
