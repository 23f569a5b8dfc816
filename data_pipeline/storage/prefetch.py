"""Threads that do work ahead of its use."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any


class Workers:
    """A few daemon threads and a queue, first come first served; started when there is something to do.

    Daemons, unlike the threads of `concurrent.futures`: a stalled download must not keep a process from ending.
    """

    def __init__(self, count: int, name: str) -> None:
        """Args: count: of threads; name: of what they do."""
        self._count, self._name = count, name
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, future: Future[Any], work: Callable[[], Any]) -> None:
        """Do `work` some time and put its result into `future`, unless that was cancelled meanwhile."""
        if not self._threads:
            self._threads = [
                threading.Thread(target=_serve, args=(self._queue,), name=f"{self._name}-{number}", daemon=True)
                for number in range(self._count)
            ]
            for thread in self._threads:
                thread.start()
        self._queue.put((future, work))

    def close(self) -> None:
        """Drop what was not begun and end the threads; work may be given again afterwards."""
        while not self._queue.empty():
            item = self._queue.get()
            if item is not None:
                item[0].cancel()
        for _ in self._threads:
            self._queue.put(None)
        self._threads = []

    def __del__(self) -> None:
        self.close()


def _serve(queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]) -> None:
    while (item := queue.get()) is not None:
        fulfil(*item)
        del item  # while the queue is empty, the thread must not keep a reader and its files alive


def fulfil(future: Future[Any], work: Callable[[], Any]) -> None:
    """Do `work` for `future` here and now, unless somebody else did or it was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:  # belongs to whoever asks for the result
        future.set_exception(error)
