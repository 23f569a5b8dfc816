"""Trainings on several gloo ranks under torchrun's environment, one after another in the same processes."""

from __future__ import annotations

import contextlib
import io
import multiprocessing as mp
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
from trainer_toy import free_port

_DEADLINE_SECONDS = 600.0  # for all jobs of a call; a busy machine is slow
Job = tuple[Callable[..., Any], tuple[Any, ...]]


def in_world(ranks: int, folder: Path, jobs: Sequence[Job]) -> list[list[Any]]:
    """Run each job's `function(rank, *arguments)` on so many ranks, in a world of its own.

    Returns:
        Of each job, what it returned on rank 0, 1, ...
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("forkserver")
    answers = context.SimpleQueue()
    here = dict(os.environ)
    processes = [
        context.Process(target=_live, args=(rank, ranks, folder, jobs, answers, here)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found: dict[tuple[int, int], Any] = {}
    deadline = time.monotonic() + _DEADLINE_SECONDS
    try:
        while len(found) < ranks * len(jobs):
            if answers.empty():
                dead = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
                assert not dead, f"ranks {dead} ended with {[processes[rank].exitcode for rank in dead]}"
                assert time.monotonic() < deadline, f"only {sorted(found)} after {_DEADLINE_SECONDS:.0f} s"
                time.sleep(0.02)
                continue
            index, rank, value, error = answers.get()
            assert error is None, f"job {index} on rank {rank}:\n{error}"
            found[index, rank] = value
    finally:
        for process in processes:
            process.join(timeout=20 if len(found) == ranks * len(jobs) else 0)
            process.kill()
    return [[found[index, rank] for rank in range(ranks)] for index in range(len(jobs))]


def _live(rank: int, ranks: int, folder: Path, jobs: Sequence[Job], answers: Any, environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for index, (function, arguments) in enumerate(jobs):
        os.environ["MASTER_PORT"] = _port(rank, folder / f"port-{index}")
        try:
            answers.put((index, rank, function(rank, *arguments), None))
        except BaseException:
            answers.put((index, rank, None, traceback.format_exc()))
            return


def _port(rank: int, file: Path) -> str:
    """One that was free just now, the same on all ranks."""
    if rank == 0:
        file.with_suffix(".new").write_text(str(free_port()))
        file.with_suffix(".new").rename(file)
    while not file.exists():
        time.sleep(0.01)
    return file.read_text()


def command_line(rank: int, arguments: Sequence[str]) -> tuple[int, str]:
    """Exit code and standard error of `longspan ARGUMENT...` on this rank."""
    from longspan.trainer import cli

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(list(arguments))
    return code, said.getvalue()
