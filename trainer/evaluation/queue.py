"""The evaluations of one pass as tasks for workers: claimed one at a time, sharded, retried, finished.

An evaluation is opened by a worker (how many shards, which are done), its shards are scored by all workers, and one
of them puts the result together. A worker that dies costs its shard another try, under a name with the next attempt.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longspan.cluster.actor_pool import Task
from longspan.trainer.evaluation.specs import Spec

MAX_DEATHS = 5  # of workers in one evaluation and pass
BACKOFF_SECONDS = 1.0


@dataclass(eq=False)
class Job:
    """One (checkpoint, spec) without a result.

    Attributes:
        evals: RUN/evals. checkpoint: its folder. spec, key: of the evaluation.
        attempt: number of this try, from 1.
    """

    evals: Path
    checkpoint: Path
    spec: Spec
    key: str
    attempt: int = 1
    started: float = 0.0
    deaths: int = 0
    opened: bool = False
    waiting: deque[int] = field(default_factory=deque)
    unscored: set[int] = field(default_factory=set)
    running: int = 0
    not_before: float = 0.0

    @property
    def place(self) -> str:
        """Where its result goes; nothing else tells copies of one checkpoint apart, whose keys are equal."""
        return str(self.evals.absolute() / self.key)

    @property
    def name(self) -> str:
        """For Ray's lists: eval-RUN-STEP-SPEC-aATTEMPT."""
        run, spec = self.evals.parent.name, self.spec.digest[:8]
        return f"eval-{run}-{self.checkpoint.name.removeprefix('step-')}-{spec}-a{self.attempt}"

    def next_task(self) -> Task | None:
        """What can be done now; None: nothing until something that runs is done."""
        if time.monotonic() < self.not_before:
            return None
        if not self.opened:
            return None if self.running else self._task("open")
        if self.waiting:
            return self._task("score", shard=self.waiting.popleft())
        return None if self.running or self.unscored else self._task("finish")

    def _task(self, method: str, **more: Any) -> Task:
        self.running += 1
        request = {
            "key": self.key,
            "checkpoint": str(self.checkpoint.absolute()),
            "spec": self.spec.model_dump_json(),
            "out": str(self.evals.absolute()),
            "attempt": self.attempt,
            **more,
        }
        return Task(self.name, self.place, method, request)

    def died(self, task: Task) -> None:
        """The worker of a task is gone: try that again, a little later."""
        self.deaths += 1
        self.attempt += 1
        self.not_before = time.monotonic() + BACKOFF_SECONDS * 2 ** (self.deaths - 1)
        if task.method == "score":
            self.waiting.appendleft(task.request["shard"])

    def opened_with(self, shards: int, done: Iterable[int]) -> None:
        """What `open` found."""
        self.opened = True
        self.again(sorted(set(range(shards)) - set(done)))

    def again(self, shards: Iterable[int]) -> None:
        """Shards that have to be scored."""
        self.waiting = deque(shards)
        self.unscored = set(self.waiting)


class Queue:
    """What `cluster.actor_pool` is served from."""

    def __init__(
        self,
        jobs: Iterable[Job],
        *,
        begun: Job,
        claim: Callable[[Job], bool],
        evaluated: Callable[[Job], None],
        failed: Callable[[Job, str, int | None, bool], None],
        is_lost: Callable[[Job], bool],
        stopped: Callable[[], bool],
    ) -> None:
        """Start nothing yet.

        Args:
            jobs: in the order in which they begin.
            begun: a job that comes before them and is claimed already.
            claim: whether a job may begin here; called just before.
            evaluated: told about every job that is done.
            failed: told about every other: reason, exit code, whether it is transient.
            is_lost: whether somebody else took a job over meanwhile; it is then dropped without a word.
            stopped: whether nothing new may begin.
        """
        self._jobs = deque(jobs)
        self._claim = claim
        self._evaluated = evaluated
        self._failed = failed
        self._is_lost = is_lost
        self._stopped = stopped
        begun.started = time.monotonic()
        self._active = {begun.place: begun}  # by place

    def next_task(self, group: str | None) -> Task | None:
        """A shard of the job that the worker has loaded, else of another that runs, else a new job."""
        for place in [place for place, job in self._active.items() if self._is_lost(job)]:
            del self._active[place]
        if self._stopped():
            return None
        first = [self._active[group]] if group in self._active else []
        for job in [*first, *self._active.values()]:
            task = job.next_task()
            if task is not None:
                return task
        while self._jobs:
            job = self._jobs.popleft()
            if self._claim(job):
                job.started = time.monotonic()
                self._active[job.place] = job
                return job.next_task()
        return None

    def has_more(self) -> bool:
        """Whether jobs wait, if only for a little while after a death."""
        return not self._stopped() and bool(self._jobs or self._active)

    def answered(self, task: Task, value: dict[str, Any] | None) -> None:
        """Bring the task's job one step further."""
        job = self._active.get(task.group)
        if job is None:
            return
        job.running -= 1
        if value is None:
            job.died(task)
            if job.deaths >= MAX_DEATHS:
                self._end(job, f"its workers died {job.deaths} times", None, False)
        elif "reason" in value:
            self._end(job, value["reason"], value["exit_code"], value["transient"])
        elif task.method == "open":
            job.opened_with(value["shards"], value["done"])
        elif task.method == "score":
            job.unscored.discard(task.request["shard"])
        elif value.get("missing"):
            job.again(value["missing"])
        else:
            del self._active[job.place]
            self._evaluated(job)

    def _end(self, job: Job, reason: str, exit_code: int | None, transient: bool) -> None:
        del self._active[job.place]
        self._failed(job, reason, exit_code, transient)
