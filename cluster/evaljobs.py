"""Run commands as Ray tasks on this machine and tell how each ended. Knows nothing about what they do."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from longspan.cluster.ray_local import local_cluster

OUTPUT_CHARACTERS = 4000


@dataclass(frozen=True)
class Command:
    """One process.

    Attributes:
        name: of the outcome.
        argv: program and arguments; no shell sees them.
        env: variables besides the caller's own.
        timeout_seconds: it is killed after that.
    """

    name: str
    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    timeout_seconds: float = 24 * 3600.0


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        exit_code: the process's; negative = the signal that ended it; None = it never ended by itself.
        output: end of its standard error.
        reason: why there is no exit code; empty otherwise.
    """

    name: str
    exit_code: int | None
    output: str
    seconds: float
    reason: str = ""


def run_commands(
    commands: Sequence[Command],
    *,
    slots: int,
    gpus: int = 0,
    on_done: Callable[[Outcome], None],
    on_tick: Callable[[], None],
    tick_seconds: float = 5.0,
) -> None:
    """Run commands as Ray tasks, `slots` at once, in the order given.

    Args:
        commands: what to run.
        slots: how many run at once.
        gpus: GPUs of this machine; each command claims one if there are any.
        on_done: called here for each outcome as it comes.
        on_tick: called here at least every `tick_seconds` meanwhile.
        tick_seconds: as said.

    Raises:
        ClusterError: ray is missing or does not start; no command has run.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with local_cluster(slots, gpus) as ray:
        task = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=0)(_run)
        waiting: dict[Any, Command] = {}
        for command in commands:
            waiting[task.remote(command.argv, {**environment, **command.env}, os.getcwd(), command.timeout_seconds)] = (
                command
            )
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=tick_seconds)
            for reference in done:
                on_done(_outcome(ray, reference, waiting.pop(reference)))
            on_tick()


def _outcome(ray: Any, reference: Any, command: Command) -> Outcome:
    try:
        exit_code, output, seconds, reason = ray.get(reference)
    except Exception as error:  # the worker died: whatever Ray calls it, this command has no outcome
        return Outcome(command.name, None, "", 0.0, f"its Ray worker died ({type(error).__name__})")
    return Outcome(command.name, exit_code, output, seconds, reason)


def _run(
    argv: Sequence[str], environment: dict[str, str], folder: str, timeout_seconds: float
) -> tuple[int | None, str, float, str]:
    """Inside the Ray worker: run the process to its end; GPUs are the ones that Ray gave to this worker."""
    started = time.monotonic()
    gpus = {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES",) if os.environ.get(name)}
    try:
        done = subprocess.run(  # noqa: S603 - argv from the caller, no shell
            list(argv),
            env={**environment, **gpus},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=timeout_seconds,
        )
    except subprocess.TimeoutExpired:
        return None, "", time.monotonic() - started, f"killed after {timeout_seconds:.0f} s"
    except OSError as error:
        return None, "", time.monotonic() - started, f"did not start: {error}"
    output = done.stderr.decode("utf-8", errors="replace")[-OUTPUT_CHARACTERS:]
    return done.returncode, output, time.monotonic() - started, ""
