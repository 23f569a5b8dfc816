"""The watchdog: when a rank dies or hangs, all ranks end, and say which rank it was and where.

Every rank keeps a connection to rank 0 and tells it about once a second what phase it is in; rank 0 judges
(`heartbeat.judge`) and tells all. A connection ends with its process, so a death is seen at once on every host; the
store that the ranks meet in would not show it, and blocks while its own host is stopped. docs/launch.md.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hmac
import json
import os
import re
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from longspan.cluster import exit_records
from longspan.cluster.collectives import recorder
from longspan.cluster.config import PHASE_ALLOWANCES
from longspan.cluster.heartbeat import Beat, Seen, Verdict, current_place, died, judge, silence_limit
from longspan.errors import EXIT_FAULT, EXIT_HANG, EXIT_OK, EXIT_UNEXPECTED, ClusterError, HangError, LongspanError

_BEAT_SECONDS = 1.0
# a rank that has been in one phase for so long, or for a quarter of the limit if that is less, tells its collectives
_TELL_CALLS_SECONDS = 5.0
# after a failed collective: how long until it must be known which rank is to blame
_EXPLAIN_SECONDS = 15.0
# leaving after that: groups of a rank that is dead may not close
_TEARDOWN_SECONDS = 20.0
_LINGER_SECONDS = 2.0
# of a culprit's last collectives on standard error; its dump has all that are kept
_SHOWN_CALLS = 16
_CONTACT = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket|timed out|timeout", re.IGNORECASE
)


class Watchdog:
    """Watches over the ranks while active; with one rank there is nothing to watch.

    Use as a context manager around the work that all ranks do together, on every rank.

    Args:
        rank, world_size: this process among them.
        limit_seconds: a rank that stays longer in one phase is hung; phases in `PHASE_ALLOWANCES` may take longer.
        gather: collects a small value of every rank, in order of rank, on all of them.
        dumps: folder where each rank writes its stacks and last collectives when the run cannot go on; None: nowhere.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        limit_seconds: float,
        gather: Callable[[Any], list[Any]],
        dumps: Path | None = None,
    ) -> None:
        self._rank, self._world_size, self._limit, self._gather = rank, world_size, limit_seconds, gather
        self._dumps = dumps
        self._interval = min(_BEAT_SECONDS, limit_seconds / 10)
        self._entered = time.monotonic()
        self._mine = Beat(socket.gethostname(), os.getpid(), 0, "start", 0, 0.0, self._allowed("start"))
        self._closing = threading.Event()
        self._explaining = threading.Event()
        self._verdict: Verdict | None = None
        self._judged = threading.Event()
        self._peers: dict[int, _Line] = {}

    def phase(self, name: str, step: int) -> None:
        """Say that this rank enters a phase of `step`; all ranks enter the same phases in the same order."""
        self._entered = time.monotonic()
        self._mine = replace(
            self._mine, count=self._mine.count + 1, phase=name, step=step, limit_seconds=self._allowed(name)
        )

    def _allowed(self, phase: str) -> float:
        return self._limit * PHASE_ALLOWANCES.get(phase, 1.0)

    def __enter__(self) -> Watchdog:
        if self._world_size > 1:
            self._connect()
            work = self._serve if self._rank == 0 else self._report
            self._thread = threading.Thread(target=self._watch, args=(work,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave; an error that another rank's end has caused becomes one that names that rank.

        Raises:
            HangError: another rank died or hung.
            ClusterError: another rank ended with an error; has that rank's exit code.
        """
        if self._world_size == 1:
            return
        blamed = self._explain() if error is not None and _is_contact_error(error) else None
        code = EXIT_OK if error is None else getattr(error, "exit_code", EXIT_UNEXPECTED)
        text = "" if error is None else f"{error}" if isinstance(error, LongspanError) else f"{kind.__name__}: {error}"  # type: ignore[union-attr]
        self._mine = replace(
            self._mine, left=blamed.exit_code if blamed else code, message=blamed.message if blamed else text[:2000]
        )
        self._closing.set()
        self._thread.join(timeout=_LINGER_SECONDS + self._interval)
        if blamed:
            threading.Thread(target=self._force_end, args=(blamed,), daemon=True).start()
            raise _error(blamed) from error

    def _explain(self) -> Verdict | None:
        """Wait for the verdict on the rank that made a collective fail here."""
        self._explaining.set()
        self._mine = replace(self._mine, lost_contact=True)
        self._judged.wait(_EXPLAIN_SECONDS)
        return self._verdict

    def _force_end(self, verdict: Verdict) -> None:
        time.sleep(_TEARDOWN_SECONDS)
        exit_records.note(verdict.message)
        os._exit(exit_records.leave(verdict.exit_code))

    def _beat(self) -> Beat:
        age = time.monotonic() - self._entered
        if age < 2 * self._interval or self._mine.left is not None:
            return replace(self._mine, age_seconds=age)
        # both look at what other threads change meanwhile; a beat without them is worth more than none
        waiting, place, calls = "", "", None
        with contextlib.suppress(Exception):
            waiting, place = current_place(threading.get_ident())
        if age > min(_TELL_CALLS_SECONDS, self._limit / 4):
            with contextlib.suppress(Exception):
                calls = recorder().told()
        return replace(self._mine, age_seconds=age, waiting=waiting, place=place, calls=calls)

    def _connect(self) -> None:
        """Lines between rank 0 and every other rank; the port is open only while they connect.

        Raises:
            ClusterError: a rank does not reach rank 0's host.
        """
        token = secrets.token_hex(16)
        listener = socket.create_server(("", 0), backlog=self._world_size) if self._rank == 0 else None
        place = (listener.getsockname()[1], token) if listener else None
        port, token = self._gather(place)[0]
        if listener:
            with listener:
                listener.settimeout(self._allowed("start"))
                while len(self._peers) < self._world_size - 1:
                    self._admit(listener, token)
            return
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        try:
            connection = socket.create_connection((host, port), timeout=self._allowed("start"))
        except OSError as error:
            raise ClusterError(f"rank {self._rank} cannot reach rank 0 at {host}:{port} ({error}).") from error
        self._peers[0] = _Line(connection)
        self._peers[0].send({"token": token, "rank": self._rank})

    def _admit(self, listener: socket.socket, token: str) -> None:
        """Take the next connection, if it is a rank's."""
        try:
            line = _Line(listener.accept()[0])
            hello = line.receive(self._allowed("start"))[0]
        except (OSError, ValueError, IndexError) as error:
            if isinstance(error, TimeoutError):
                raise ClusterError(f"only {len(self._peers) + 1} of {self._world_size} ranks reach rank 0.") from error
            return
        if hmac.compare_digest(str(hello.get("token")), token):
            self._peers[int(hello["rank"])] = line

    def _watch(self, work: Callable[[], None]) -> None:
        """The thread: do `work`; if it fails, end the run, which would go on unwatched."""
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            message = (
                f"the watchdog of rank {self._rank} on host {self._mine.host} failed: {type(error).__name__}: {error}."
            )
            verdict = self._verdict or Verdict(EXIT_FAULT, message, ())
            farewell = replace(self._mine, left=verdict.exit_code, message=verdict.message)
            for line in self._peers.values():
                line.send({"verdict": asdict(verdict)} if self._rank == 0 else asdict(farewell))
            with contextlib.suppress(Exception):
                self._drain()
            self._end(verdict)

    def _serve(self) -> None:
        """Rank 0's thread: hear all, judge, tell all."""
        now = time.monotonic()
        silent = replace(self._mine, host="?", pid=0)
        seen = {rank: Seen(silent) for rank in self._peers}
        heard = dict.fromkeys(self._peers, now)
        left: dict[int, float] = {}
        with selectors.DefaultSelector() as selector:
            for rank, line in self._peers.items():
                selector.register(line.socket, selectors.EVENT_READ, rank)
            while not self._closing.is_set():
                for key, _ in selector.select(self._interval):
                    rank = key.data
                    beats = self._peers[rank].receive(0.0)
                    if beats:
                        seen[rank] = Seen(Beat(**beats[-1]))
                        heard[rank] = time.monotonic()
                    if seen[rank].beat.left is not None:
                        left.setdefault(rank, time.monotonic())
                    if self._peers[rank].ended:
                        selector.unregister(key.fileobj)
                        self._peers[rank].close()
                        seen[rank] = replace(seen[rank], gone=seen[rank].beat.left is None)
                now = time.monotonic()
                ranks = {0: Seen(self._beat())}
                for rank, was in seen.items():
                    ranks[rank] = replace(was, silent_seconds=now - heard[rank], left_seconds=now - left.get(rank, now))
                verdict = judge(ranks)
                for line in self._peers.values():
                    line.send({"verdict": asdict(verdict)} if verdict else asdict(replace(ranks[0].beat, calls=None)))
                if verdict:
                    self._drain()
                    self._end(verdict)
                    return
        self._farewell()

    def _report(self) -> None:
        """Another rank's thread: tell rank 0, and do as it says."""
        line = self._peers[0]
        zero, heard, left = replace(self._mine, host="?", pid=0), time.monotonic(), None
        while not self._closing.is_set():
            line.send(asdict(self._beat()))
            for told in line.receive(self._interval):
                if "verdict" in told:
                    self._end(Verdict(**told["verdict"]))
                    return
                zero, heard = Beat(**told), time.monotonic()
            now = time.monotonic()
            left = left or (now if zero.left is not None else None)
            verdict = self._over_rank_zero(zero, line.ended, now - heard, 0.0 if left is None else now - left)
            if verdict:
                self._end(verdict)
                return
            if line.ended:  # receive returns at once then
                self._closing.wait(self._interval)
        self._farewell()

    def _over_rank_zero(self, zero: Beat, gone: bool, silent: float, left_seconds: float) -> Verdict | None:
        """What only the others can judge: rank 0 itself."""
        if zero.left is None:
            if gone:
                return died(0, zero)
            return judge({0: Seen(zero, silent)}) if silent > silence_limit(zero) else None
        mine = self._beat()
        if zero.left == EXIT_OK:  # this rank should end as well
            return judge({self._rank: Seen(mine)})
        return judge({0: Seen(zero, left_seconds=left_seconds), self._rank: Seen(mine)})

    def _farewell(self) -> None:
        """Say that this rank has ended, and wait until it was heard."""
        for line in self._peers.values():
            line.send(asdict(self._beat()))
        self._drain()

    def _drain(self) -> None:
        """Until the others end their sides: a process that ends with unread input resets its connections, and what
        it said last is lost."""
        deadline = time.monotonic() + _LINGER_SECONDS
        for line in self._peers.values():
            line.finish()
        for line in self._peers.values():
            while not line.ended and time.monotonic() < deadline:
                line.receive(0.1)
            line.close()

    def _end(self, verdict: Verdict) -> None:
        """End this process, unless its main thread waits for the verdict to do so itself."""
        self._verdict = verdict
        self._dump(verdict)
        self._judged.set()
        if self._explaining.is_set() or self._closing.is_set():
            return
        if self._rank in verdict.culprits:
            faulthandler.dump_traceback(file=sys.__stderr__ or 2)
            with contextlib.suppress(Exception):
                os.write(2, "\n".join(["Last collectives:", *recorder().lines()[-_SHOWN_CALLS:], ""]).encode())
        message = f"{verdict.message} All ranks end; go on from the last checkpoint with --resume."
        exit_records.note(message)
        if not exit_records.launcher_listens():  # which says it once for all ranks
            os.write(2, f"longspan: rank {self._rank}: {message}\n".encode())
        os._exit(exit_records.leave(verdict.exit_code))

    def _dump(self, verdict: Verdict) -> None:
        """Write what this process was doing beside the run's other files; best effort, it must end in any case."""
        if self._dumps is None:
            return
        with contextlib.suppress(Exception):
            self._dumps.mkdir(parents=True, exist_ok=True)
            with (self._dumps / f"rank-{self._rank:05d}.txt").open("w", encoding="utf-8") as file:
                print(
                    verdict.message, "", "Last collectives:", *recorder().lines(), "", "Threads:", sep="\n", file=file
                )
                file.flush()
                faulthandler.dump_traceback(file=file)


def _error(verdict: Verdict) -> LongspanError:
    if verdict.exit_code == EXIT_HANG:
        return HangError(f"{verdict.message} All ranks end; go on from the last checkpoint with --resume.")
    error = ClusterError(verdict.message)
    error.exit_code = verdict.exit_code
    return error


def _is_contact_error(error: BaseException) -> bool:
    """Whether a collective may have failed because of another rank."""
    return isinstance(error, RuntimeError) and bool(_CONTACT.search(str(error)))


class _Line:
    """JSON objects, one a line, over a socket. Never raises for an end of the other side: `ended` says so."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self.ended, self._rest = connection, False, b""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, content: dict[str, Any]) -> None:
        """Send one object; that nobody hears it shows when receiving."""
        if self.ended:
            return
        with contextlib.suppress(OSError):
            self.socket.settimeout(1.0)
            self.socket.sendall(json.dumps(content).encode() + b"\n")

    def finish(self) -> None:
        """Send nothing any more."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def receive(self, timeout_seconds: float) -> list[dict[str, Any]]:
        """Whole lines that have come, waiting for the first bytes at most so long."""
        if self.ended:
            return []
        try:
            self.socket.settimeout(timeout_seconds)
            data = self.socket.recv(1 << 16)
            self.ended |= not data
        except (BlockingIOError, TimeoutError):
            data = b""
        except OSError:
            data, self.ended = b"", True
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Give the socket back."""
        self.socket.close()
