"""Real launches of a tiny training, on this host or in network namespaces that stand for hosts; and their end state."""

from __future__ import annotations

import hashlib
import json
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
from tiny_training import tiny_config
from trainer_toy import free_port

from longspan.trainer import cli

STEPS = 60
START_SECONDS = 240.0  # imports of four processes, on a loaded machine


def write_recipe(path: Path, shards: Path, **overrides: object) -> Path:
    """Four lanes, one a micro-batch, so that 1, 2 and 4 ranks can run it; dropout, so that random state counts."""
    config = tiny_config(
        shards,
        model__dropout=0.1,
        training__steps=STEPS,
        training__micro_batch_lanes=1,
        checkpoint__interval_steps=4,
        validation__interval_steps=STEPS,
        validation__sample_tokens=0,
        parallel__timeout_seconds=120,
        **overrides,
    )
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


@dataclass
class Host:
    """Where a launcher runs: prefix of its command line."""

    prefix: list[str] = field(default_factory=list)

    def launch(self, output: Path, *arguments: str) -> subprocess.Popen[bytes]:
        """Start `longspan launch local`; its standard output and error go to the file."""
        command = [*self.prefix, sys.executable, "-m", "longspan.trainer.cli", "launch", "local", *arguments, "--json"]
        with output.open("wb") as file:
            started.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
        return started[-1]


started: list[subprocess.Popen[bytes]] = []


def stop_all() -> None:
    """End launchers that still run; torchrun and the workers end with them."""
    while started:
        launcher = started.pop()
        launcher.kill()
        launcher.wait()


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found.append(int(path.parent.name))
    return found


def workers(launcher: subprocess.Popen[bytes]) -> list[int]:
    """The launcher's child is torchrun; its children are the workers."""
    return [worker for torchrun in children(launcher.pid) for worker in children(torchrun)]


def wait_for_step(run: Path, step: int, *launchers: subprocess.Popen[bytes]) -> None:
    """Until the run has a checkpoint of `step` or later."""
    deadline = time.monotonic() + START_SECONDS
    while not any(int(folder.name[5:]) >= step for folder in (run / "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline, "no checkpoint in time"
        assert all(launcher.poll() is None for launcher in launchers), "a launcher ended before its time"
        time.sleep(0.02)


def kill(pids: list[int]) -> None:
    """SIGKILL, as a host that goes down."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def summary(output: Path) -> dict:
    """The object on the last line of a launcher's output."""
    return json.loads(output.read_text(errors="replace").strip().splitlines()[-1])


def weights(run: Path) -> dict[str, str]:
    """Hashes of the files of the last checkpoint's weights and optimizer state."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    assert newest.name == f"step-{STEPS:08d}"
    files = [path for part in ("weights", "optimizer") for path in sorted((newest / part).iterdir())]
    assert files
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def train_undisturbed(recipe: Path, run: Path, ranks: int) -> dict[str, str]:
    """The same training in processes forked from this one; its final weights."""
    port, context = str(free_port()), mp.get_context("fork")
    processes = [context.Process(target=_live, args=(rank, ranks, port, recipe, run)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * ranks
    return weights(run)


def _live(rank: int, ranks: int, port: str, recipe: Path, run: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os._exit(cli.main(["train", str(recipe), "--run-dir", str(run), "--json"]))


@contextmanager
def two_hosts() -> Iterator[tuple[list[Host], str]]:
    """Two network namespaces joined by a cable, and the first one's address.

    Raises:
        PermissionError: this user may not make them; says why.
    """
    names = [f"ls{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", f"v{names[0]}", "type", "veth", "peer", "name", f"v{names[1]}")
        for number, name in enumerate(names, 1):
            _ip("link", "set", f"v{name}", "netns", name)
            _ip("-n", name, "address", "add", f"10.93.7.{number}/24", "dev", f"v{name}")
            _ip("-n", name, "link", "set", f"v{name}", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield [Host(["ip", "netns", "exec", name]) for name in names], "10.93.7.1"
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL, check=False)


def _ip(*arguments: str) -> None:
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise PermissionError("there is no `ip` program") from error
    if done.returncode:
        raise PermissionError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
