"""A small discrete-event simulation: tasks that occupy streams in order, and links one at a time."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(slots=True)
class Task:
    """Something that takes time.

    Attributes:
        seconds: how long.
        stream: tasks of one stream run in the order in which they were added; "" = of none.
        links: each carries one task at a time, whichever is ready first.
        missing: tasks before it that have not ended.
        then: tasks that wait for it.
        end: when it ended; -1 before.
    """

    seconds: float
    stream: str
    links: tuple[str, ...]
    missing: int
    then: list[int]
    end: float = -1.0


class Simulation:
    """Add tasks, then `run`."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self._streams: dict[str, deque[int]] = defaultdict(deque)
        self._busy: set[str] = set()
        self._waiting: dict[str, deque[int]] = defaultdict(deque)
        self._running: list[tuple[float, int]] = []

    def add(self, seconds: float, stream: str = "", after: Iterable[int] = (), links: tuple[str, ...] = ()) -> int:
        """A task; returns its number. `after`: numbers of tasks that must have ended."""
        number = len(self.tasks)
        before = set(after)
        self.tasks.append(Task(seconds, stream, links, len(before), []))
        for earlier in before:
            self.tasks[earlier].then.append(number)
        if stream:
            self._streams[stream].append(number)
        return number

    def run(self) -> float:
        """Run everything; returns the time at which the last task ends.

        Raises:
            RuntimeError: tasks wait for each other in a circle.
        """
        now = 0.0
        for number in range(len(self.tasks)):
            self._try(number, now)
        while self._running:
            now, number = heapq.heappop(self._running)
            self._finish(number, now)
        stuck = sum(task.end < 0 for task in self.tasks)
        if stuck:
            raise RuntimeError(f"{stuck} of {len(self.tasks)} tasks wait for each other")
        return now

    def _try(self, number: int, now: float) -> None:
        """Start a task if nothing holds it back; if a link does, it queues there."""
        task = self.tasks[number]
        if task.missing or task.end >= 0 or (task.stream and self._streams[task.stream][0] != number):
            return
        for link in task.links:
            if link in self._busy:
                self._waiting[link].append(number)
                return
        self._busy.update(task.links)
        task.end = now + task.seconds
        heapq.heappush(self._running, (task.end, number))

    def _finish(self, number: int, now: float) -> None:
        task = self.tasks[number]
        self._busy.difference_update(task.links)
        ready = list(task.then)
        for follower in ready:
            self.tasks[follower].missing -= 1
        if task.stream:
            queue = self._streams[task.stream]
            queue.popleft()
            if queue:
                ready.append(queue[0])
        for link in task.links:
            ready += self._waiting.pop(link, ())
        for follower in dict.fromkeys(ready):
            self._try(follower, now)
