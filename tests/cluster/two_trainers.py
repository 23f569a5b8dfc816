"""Two ranks of the real trainer on a tiny model in processes of their own, one of them with a planted fault."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
from tiny_training import tiny_config
from trainer_toy import free_port

from longspan.cluster.mesh import Mesh
from longspan.cluster.watchdog import Watchdog
from longspan.data_pipeline.reader import LaneReader
from longspan.trainer import cli
from longspan.trainer.engine import Engine

FAULT_STEP = 3
START_SECONDS = 180.0  # until the fault, or the end without one: a busy machine imports slowly


@dataclass(frozen=True)
class End:
    """How a rank ended: exit code (None: it had to be killed), its standard error, seconds since the fault."""

    exit_code: int | None
    text: str
    seconds_after_fault: float


def write_recipe(path: Path, shards: Path, limit_seconds: float) -> Path:
    """A recipe of eight steps for two ranks of data parallelism."""
    config = tiny_config(
        shards,
        training__steps=8,
        training__micro_batch_lanes=2,
        validation__sample_tokens=0,
        parallel__timeout_seconds=limit_seconds,
    )
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def run_two(
    recipe: Path,
    folder: Path,
    fault: str,
    *,
    watchdog: bool = True,
    where: str = "data",
    deadline_seconds: float = 60.0,
) -> list[End]:
    """Train with a fault planted in rank 1, and see how both ranks end.

    Args:
        fault: hang, kill, stop (SIGSTOP), raise, skip (the rank leaves a collective out and goes on), or none.
        where: in the phase's `data` part or in its `step` part; what is left out is the step's agreement.
        watchdog: False switches it off in both ranks.
        deadline_seconds: ranks that still run so long after the fault are killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, context = free_port(), mp.get_context("spawn")
    ranks = [
        context.Process(target=_live, args=(rank, port, recipe, folder, fault, where, watchdog)) for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    fired = folder / "fired"
    deadline, ended = time.time() + START_SECONDS, [0.0, 0.0]
    while time.time() < deadline and not all(ended):
        if fired.exists():
            deadline = fired.stat().st_mtime + deadline_seconds
        for index, rank in enumerate(ranks):
            if not ended[index] and not rank.is_alive():
                ended[index] = time.time()
        if ended[0] and fault == "stop":
            break
        time.sleep(0.02)
    for rank in ranks:
        if rank.is_alive():
            os.kill(rank.pid, signal.SIGKILL)
        rank.join()
    since = fired.stat().st_mtime if fired.exists() else time.time()
    return [
        End(rank.exitcode if ended[index] else None, (folder / f"{index}.txt").read_text(), ended[index] - since)
        for index, rank in enumerate(ranks)
    ]


def _live(rank: int, port: int, recipe: Path, folder: Path, fault: str, where: str, watchdog: bool) -> None:
    output = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    if not watchdog:
        Watchdog.__enter__ = lambda self: self
        Watchdog.__exit__ = lambda self, kind, error, trace: None
    if rank == 1 and fault != "none":
        _plant(fault, where, folder)
    os._exit(cli.main(["train", str(recipe), "--run-dir", str(folder / "run")]))


def _plant(fault: str, where: str, folder: Path) -> None:
    owner, name = (LaneReader, "batch") if where == "data" else (Engine, "_update")
    if fault == "skip":
        owner, name = Mesh, "sum_over_all"
    real, calls = getattr(owner, name), []

    def faulty(*args, **options):
        calls.append(1)
        if len(calls) == FAULT_STEP + 1:
            if fault == "stop":  # it is judged by the last that it said: three quick steps may pass without a word
                time.sleep(1.0)  # two beats
            (folder / "fired").touch()
            if fault == "hang":
                time.sleep(1000)
            elif fault == "raise":
                raise ValueError("planted")
            elif fault == "skip":
                return args[1]
            else:
                os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        return real(*args, **options)

    setattr(owner, name, faulty)
