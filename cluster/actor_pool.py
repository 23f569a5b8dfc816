"""Workers that stay: Ray actors in one placement group, handed one task after another. Knows nothing about the tasks.

An actor that dies is replaced, and whoever asked is told; whether its task runs again is the caller's decision.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from longspan.errors import ClusterError

PLACEMENT_SECONDS = 60.0


@dataclass(frozen=True)
class Task:
    """One call of a worker's `run(method, request)`.

    Attributes:
        name: shown in Ray's lists.
        group: a worker that did a task of this group before is given the next one if it is free.
        method, request: what it is called with; picklable.
    """

    name: str
    group: str
    method: str
    request: dict[str, Any]


class Source(Protocol):
    """Where tasks come from and where answers go."""

    def next_task(self, group: str | None) -> Task | None:
        """A task for a free worker whose last group was this one; None if there is none at the moment."""

    def has_more(self) -> bool:
        """Whether there may be tasks later although nothing runs."""

    def answered(self, task: Task, value: dict[str, Any] | None) -> None:
        """What `run` returned; None: the worker died meanwhile."""


@dataclass(frozen=True)
class Shape:
    """Size of a pool.

    Attributes:
        workers: actors. cpus, gpus: that each of them claims.
        wait_seconds: longest wait for these to be free.
    """

    workers: int
    cpus: int = 1
    gpus: int = 0
    wait_seconds: float = PLACEMENT_SECONDS


def run_pool(ray: Any, worker: type, shape: Shape, source: Source, tick_seconds: float = 0.5) -> None:
    """Serve `source` until it has no tasks.

    Args:
        ray: connected module.
        worker: importable class with `run(method: str, request: dict) -> dict`.
        shape: of the pool.
        source: of the tasks; called in this thread alone.
        tick_seconds: longest time between looks at `source`.

    Raises:
        ClusterError: the cluster has no room for the pool.
    """
    bundle = {"CPU": shape.cpus, **({"GPU": shape.gpus} if shape.gpus else {})}
    group = ray.util.placement_group([bundle] * shape.workers, strategy="PACK")
    pool = _Pool(ray, worker, shape, group)
    try:
        if not group.wait(shape.wait_seconds):
            raise ClusterError(
                f"Ray has no room for {shape.workers} workers with {bundle} each within {shape.wait_seconds:.0f} s. It "
                f"has {ray.available_resources()} free. Ask for fewer with --workers, or wait."
            )
        while True:
            pool.hand_out(source)
            if pool.busy:
                pool.collect(source, tick_seconds)
            elif source.has_more():
                time.sleep(tick_seconds)
            else:
                return
    finally:
        pool.end()
        with suppress(Exception):  # the cluster may be gone, and its groups with it
            ray.util.remove_placement_group(group)


class _Pool:
    def __init__(self, ray: Any, worker: type, shape: Shape, group: Any) -> None:
        self._ray = ray
        self._group = group
        self._actor = ray.remote(num_cpus=shape.cpus, num_gpus=shape.gpus, max_restarts=0)(worker)
        self._actors: list[Any] = [None] * shape.workers
        self._last: list[str | None] = [None] * shape.workers
        self.busy: dict[Any, tuple[int, Task]] = {}

    def hand_out(self, source: Source) -> None:
        """Give every free worker a task, if there are as many."""
        working = {index for index, _ in self.busy.values()}
        for index, last in enumerate(self._last):
            if index not in working:
                task = source.next_task(last)
                if task is None:
                    return
                if self._actors[index] is None:
                    self._actors[index] = self._start(index)
                run = self._actors[index].run.options(name=task.name)
                self.busy[run.remote(task.method, task.request)] = (index, task)
                self._last[index] = task.group

    def collect(self, source: Source, seconds: float) -> None:
        """Pass answers on, waiting for at most `seconds`."""
        done, _ = self._ray.wait(list(self.busy), num_returns=1, timeout=seconds)
        for reference in done:
            index, task = self.busy.pop(reference)
            try:
                value = self._ray.get(reference)
            except self._ray.exceptions.RayError:
                self._kill(index)
                value = None
            source.answered(task, value)

    def end(self) -> None:
        """Kill all workers."""
        for index in range(len(self._actors)):
            self._kill(index)

    def _start(self, index: int) -> Any:
        strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            placement_group=self._group, placement_group_bundle_index=index
        )
        return self._actor.options(scheduling_strategy=strategy).remote()

    def _kill(self, index: int) -> None:
        if self._actors[index] is not None:
            with suppress(Exception):  # dead already, or its cluster is
                self._ray.kill(self._actors[index])
        self._actors[index], self._last[index] = None, None
