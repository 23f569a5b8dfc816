"""A file that says who works on something; free again when its holder dies, whatever the clocks say.

No wall clock is read. A holder on this machine is dead when its process is gone (pid and start time, inside the same
boot and pid namespace). A holder elsewhere is dead when its heartbeat has not changed for `VALID_SECONDS` of this
machine's monotonic clock; the look that began this wait is noted beside the lease, so that passes of a cron job add up.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

VALID_SECONDS = 120.0
BEAT_SECONDS = 15.0


class Lease:
    """Held by one process at a time."""

    def __init__(self, path: Path, owner: str) -> None:
        """Use `take`."""
        self._path = path
        self._owner = owner

    @classmethod
    def take(cls, path: Path, valid_seconds: float = VALID_SECONDS) -> Lease | None:
        """The lease, or None while somebody else holds it.

        Raises:
            OSError: the folder cannot be written to, or what it lies in has gone.
        """
        path.parent.parent.mkdir(exist_ok=True)
        path.parent.mkdir(exist_ok=True)
        with _guard(path):
            if path.exists() and _is_held(path, _read_lease(path), valid_seconds):
                return None
            owner = uuid.uuid4().hex
            _write(path, {"owner": owner, "beat": 0, **_this_process()})
            _forget_looks(path)
            return cls(path, owner)

    def renew(self) -> bool:
        """Say that the work goes on; False if the lease was lost: the work is somebody else's now, or was deleted."""
        if not self._path.parent.is_dir():
            return False
        with _guard(self._path):
            held = _read_lease(self._path)
            if held.get("owner") != self._owner:
                return False
            _write(self._path, {**held, "beat": held["beat"] + 1})
            return True

    def release(self) -> None:
        """Give the lease back; nothing happens if it was lost."""
        if not self._path.parent.is_dir():
            return
        with _guard(self._path):
            if _read(self._path).get("owner") == self._owner:
                self._path.unlink()


class Keeper:
    """Renews leases from a thread, so that nothing that blocks the caller costs it a lease."""

    def __init__(self, beat_seconds: float = BEAT_SECONDS) -> None:
        """Start with none."""
        self._held: dict[str, Lease] = {}
        self._lost: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(beat_seconds,), name="leases", daemon=True)

    def __enter__(self) -> Keeper:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        for name in list(self._held):
            self.release(name)

    def take(self, name: str, path: Path) -> bool:
        """Whether the lease is now held under `name`."""
        lease = Lease.take(path)
        if lease is None:
            return False
        with self._lock:
            self._held[name] = lease
        return True

    def release(self, name: str) -> None:
        """Give a lease back, if it is held."""
        with self._lock:
            lease = self._held.pop(name, None)
        if lease is not None:
            with suppress(OSError):  # free when this process ends
                lease.release()

    def is_lost(self, name: str) -> bool:
        """Whether somebody else took a lease that was held here."""
        return name in self._lost

    def _run(self, beat_seconds: float) -> None:
        while not self._stop.wait(beat_seconds):
            with self._lock:
                held = dict(self._held)
            for name, lease in held.items():
                try:
                    kept = lease.renew()
                except OSError:  # a full disk or a server that is away: the next beat tries again
                    continue
                if not kept:
                    with self._lock:
                        still_ours = self._held.get(name) is lease
                        if still_ours:
                            del self._held[name]
                            self._lost.add(name)


def holder(path: Path) -> str | None:
    """Who holds a lease, for people: `host, pid`; None if nobody does."""
    held = _read_lease(path)
    if not held or (_is_local(held) and not _is_alive(held)):
        return None
    return f"{held.get('host', 'an unknown machine')}, pid {held.get('pid', 'unknown')}"


def _is_held(path: Path, held: dict[str, Any], valid_seconds: float) -> bool:
    if not held:
        return False
    if _is_local(held):
        return _is_alive(held)
    return _beats(path, held, valid_seconds)


def _beats(path: Path, held: dict[str, Any], valid_seconds: float) -> bool:
    """Whether a holder elsewhere may be alive; notes when this machine first saw its present heartbeat."""
    now, pulse = time.clock_gettime(time.CLOCK_BOOTTIME), f"{held['owner']} {held['beat']}"
    look = path.with_name(f".{path.name}.seen-{_boot()[:8]}")
    seen = _read(look)
    began = seen.get("at")
    if seen.get("pulse") == pulse and isinstance(began, float) and began <= now:
        return now - began < valid_seconds
    _write(look, {"pulse": pulse, "at": now})
    return True


def _forget_looks(path: Path) -> None:
    for look in path.parent.glob(f".{path.name}.seen-*"):
        look.unlink(missing_ok=True)


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "namespace": os.readlink("/proc/self/ns/pid"),
        "pid": pid,
        "started": _start_ticks(pid),
    }


def _is_local(held: dict[str, Any]) -> bool:
    here = held.get("boot") == _boot() and held.get("namespace") == os.readlink("/proc/self/ns/pid")
    return here and {"pid", "started"} <= held.keys()  # another version may name its process in another way


def _is_alive(held: dict[str, Any]) -> bool:
    return _start_ticks(held["pid"]) == held["started"]


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _start_ticks(pid: int) -> str | None:
    """When a process began, in clock ticks since boot; None if there is none, or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _read_lease(path: Path) -> dict[str, Any]:
    """What a lease says, at least owner and beat; {} if there is none, or a crash of the machine tore it."""
    held = _read(path)
    return held if isinstance(held.get("owner"), str) and isinstance(held.get("beat"), int) else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    """Replace in one step: a disk that is full must not leave an empty lease."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _guard(path: Path) -> Iterator[None]:
    """One process at a time looks at the leases of a folder; held for a moment only."""
    with (path.parent / ".guard").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
