"""Workers in this process, in place of Ray's: as many at once as asked for, and a source that hangs is noticed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from longspan.cluster.actor_pool import Shape, Source, Task
from longspan.trainer.evaluation import queue, reconcile
from longspan.trainer.evaluation.worker import EvaluationWorker


class Pool:
    """As `run_pool`: every free worker is given a task before the oldest one is answered.

    Attributes:
        done: tasks in the order of their answers.
        before: called ahead of each task; may do anything.
    """

    def __init__(self, workers: int) -> None:
        self.done: list[Task] = []
        self.before: Callable[[Task], None] = lambda task: None
        self._workers = [EvaluationWorker() for _ in range(workers)]

    def __call__(self, ray: Any, worker: type, shape: Shape, source: Source) -> None:
        last: list[str | None] = [None] * len(self._workers)
        busy: deque[tuple[int, Task]] = deque()
        while True:
            for index, group in enumerate(last):
                if index not in [number for number, _ in busy]:
                    task = source.next_task(group)
                    if task is None:
                        break
                    busy.append((index, task))
                    last[index] = task.group
            if not busy:
                assert not source.has_more(), "the pass hangs: nothing runs, nothing comes, and it waits for more"
                return
            index, task = busy.popleft()
            self.before(task)
            self.done.append(task)
            source.answered(task, self._workers[index].run(task.method, task.request))


def install(monkeypatch: pytest.MonkeyPatch, workers: int = 1) -> Pool:
    """Let every pass of this test use such workers."""
    pool = Pool(workers)
    monkeypatch.setattr(reconcile, "run_pool", pool)
    monkeypatch.setattr(reconcile, "ray_session", lambda *_: nullcontext())
    monkeypatch.setattr(queue, "BACKOFF_SECONDS", 0.0)
    return pool
