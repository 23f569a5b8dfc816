"""Where the ranks meet before they form groups: a store that one process serves and all others connect to."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from longspan.cluster import exit_records, network
from longspan.cluster.environment import Place

T = TypeVar("T")

_CONNECT_SLACK_SECONDS = 5.0  # by then torch has given up by itself, if it does
_ASK_SECONDS = 0.05
_PORT_KEY = "longspan-meeting-port"
_FATAL = 3  # of c10's log levels
# what the errors say of a server that is no store: it does not speak the protocol, or says nothing
_NO_STORE = ("Ping failed", "gives no answer")


def reach(place: Place, seconds: float) -> None:
    """Wait until rank 0's host answers: torch's own attempt may take several times the timeout, and says less.

    Raises:
        UsageError: it does not. ClusterError: the same, and the launcher starts all ranks again.
    """
    error = network.unreachable(place.address, int(place.port or 0), seconds)
    if error is not None:
        raise exit_records.never_met(
            f"rank {place.rank} of {place.world_size}: nobody answers at MASTER_ADDR:MASTER_PORT = "
            f"{place.address}:{place.port} within {seconds:.0f} s ({error}). Start rank 0 there, check address, port "
            f"and firewall from this host, or wait longer with parallel.timeout_seconds."
        ) from error


@contextlib.contextmanager
def without_native_log() -> Iterator[None]:
    """While active, torch's C++ log is silent: it adds stack traces to errors of a store that are raised here as well.

    It stays so after an error: an attempt that was given up goes on in its thread until this process ends. The level
    is read from the environment when torch loads and has no other interface; a build without this variable is loud.
    """
    try:
        native = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        level = ctypes.c_int.in_dll(native, "FLAGS_caffe2_log_level")
    except (OSError, ValueError):
        yield
        return
    before, level.value = level.value, _FATAL
    yield
    level.value = before


def not_joined(place: Place, error: Exception) -> str:
    """In words: why this process did not come together with the others, and what to do.

    Args:
        error: of the store, or of the process group.
    """
    text = str(error).splitlines()[0].rstrip(".")
    advice = "Check that all of them were started and that the address is reachable from this host."
    if any(words in text for words in _NO_STORE):
        if _NO_STORE[0] in text:
            text = "another program listens there, which does not answer as rank 0 does"
        advice = (
            "End that program, or set MASTER_ADDR to rank 0's host and MASTER_PORT (torchrun: --master-port) to a free "
            "port of it, on all ranks."
        )
    return (
        f"rank {place.rank} of {place.world_size} cannot join the others at {place.address}:{place.port}: {text}. "
        f"{advice}"
    )


class MeetingPlace:
    """The store in which the ranks of this attempt meet.

    Rank 0 serves it at MASTER_PORT. Under a torchrun whose agent serves a store there, rank 0 serves one of its own
    beside it: the agent's lives on over restarts, and in it the ranks would meet those of attempts that failed.

    Attributes:
        store: of the ranks; unlike that of torch's `env://` it does not wait for the others: `check_ranks` does, and
            can say who did not come.
    """

    def __init__(self, place: Place, seconds: float) -> None:
        """Args: place: of this process; seconds: longest wait.

        Raises:
            RuntimeError: the port is taken, or whoever is there does not answer.
        """
        self._agent: dist.Store | None = None
        self._rank = place.rank
        deadline = time.monotonic() + seconds
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            self.store = _connect(place, int(place.port or 0), seconds, serve=place.rank == 0)
            return
        self._agent = _connect(place, int(place.port or 0), seconds, serve=False)
        if place.rank == 0:
            self.store = _connect(place, 0, seconds, serve=True)
            self._agent.set(_PORT_KEY, str(self.store.port))
        else:
            self.store = self._find(place, self._agent, deadline, seconds)

    @staticmethod
    def _find(place: Place, agent: dist.Store, deadline: float, seconds: float) -> dist.TCPStore:
        """Rank 0's store, at the port that it has told the agent's; one that nobody serves is of an earlier attempt."""
        while time.monotonic() < deadline:
            if agent.check([_PORT_KEY]):
                port = int(agent.get(_PORT_KEY))
                if network.unreachable(place.address, port, 0) is None:
                    return _connect(place, port, seconds, serve=False)
            time.sleep(_ASK_SECONDS)
        raise RuntimeError(f"rank 0 said nothing within {seconds:.0f} s.")

    def all_met(self) -> None:
        """Every rank has come: nobody of a later attempt is to find the store of this one."""
        if self._agent is not None and self._rank == 0:
            self._agent.delete_key(_PORT_KEY)


def _connect(place: Place, port: int, seconds: float, *, serve: bool) -> dist.TCPStore:
    limit = timedelta(seconds=seconds)

    def connect() -> dist.TCPStore:
        return dist.TCPStore(
            place.address,
            port,
            place.world_size,
            is_master=serve,
            timeout=limit,
            wait_for_workers=False,
            multi_tenant=serve and port != 0,
        )

    return _in_time(connect, seconds)


def _in_time(work: Callable[[], T], seconds: float) -> T:
    """Do `work` in a thread: of a program that listens there and says nothing torch would wait for an answer for ever.

    Raises:
        RuntimeError: no answer in time. Exception: what `work` raised.
    """
    found: list[T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds + _CONNECT_SLACK_SECONDS)
    if failed:
        raise failed[0]
    if not found:
        raise RuntimeError(f"what listens there, perhaps another program, gives no answer within {seconds:.0f} s.")
    return found[0]
