"""A run with checkpoints, a tracking server, a Ray cluster and reconcilers, all of which can be killed."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
START_SECONDS = 180.0  # of a server or a cluster on a busy machine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """Of every process here: this folder on the path, few threads."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **kept,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        **more,
    }


@dataclass
class Server:
    """MLflow on loopback over one sqlite file, killed and started again."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def database(self) -> Path:
        return self.folder / "server.db"

    def start(self, wait: bool = True) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
                    *("--backend-store-uri", f"sqlite:///{self.database}", "--workers", "1"),
                    *("--artifacts-destination", str(self.folder / "artifacts")),
                ],
                env=environment(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.answers():
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()[-3000:]
            time.sleep(0.2)

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def answers(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
            return bool(answer.status == 200)
        return False

    def kill(self) -> bool:
        """Whether a server that answered is gone, by our signal."""
        if self.process is None or not self.is_running() or not self.answers():
            return False
        os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait() == -signal.SIGKILL

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@dataclass
class RayHost:
    """A Ray cluster in a process of its own."""

    folder: Path
    cpus: int
    process: subprocess.Popen[str] | None = None
    address: str = ""
    token: str = ""

    def start(self) -> None:
        with (self.folder / "ray.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "ray_host.py"), str(self.cpus)],
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        said = json.loads(self.process.stdout.readline())
        self.address, self.token = said["address"], said["token"]

    def close(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()


class Reconciler:
    """One `longspan evals reconcile --every 1s`; started again whenever it ends."""

    def __init__(self, folder: Path, name: str, run: Path, specs: list[Path], ray: RayHost | None, bug: str) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        self._own = ray is None
        where = [] if ray is None else ["--address", ray.address]
        self._environment = environment() if ray is None else environment(RAY_AUTH_TOKEN_PATH=ray.token)
        self._command = [sys.executable, str(HERE / "reconciler.py"), bug, "evals", "reconcile", str(run)]
        self._command += [word for spec in specs for word in ("--spec", str(spec))]
        self._command += [*where, "--workers", "2", "--gpus-per-worker", "0"]
        self.process: subprocess.Popen[bytes] | None = None
        self.lives = 0

    def start(self, *how: str) -> None:
        self.lives += 1
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._command, *(how or ("--every", "1s"))],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def keep_alive(self) -> None:
        if self.process is None or self.process.poll() is not None:
            self.start()

    def kill(self) -> bool:
        """Whether it lived and is gone, by our signal."""
        if self.process is None or self.process.poll() is not None:
            return False
        self.process.kill()
        return self.process.wait() == -signal.SIGKILL

    def once(self, seconds: float) -> None:
        """One pass, undisturbed."""
        self.start("--once")
        assert self.process is not None
        self.process.wait(seconds)

    def messages(self) -> str:
        return self._log.read_text()[-4000:]


def workers_of(roots: list[int]) -> list[int]:
    """Pids of Ray workers that hold an evaluation actor, below these processes."""
    parents, found = {}, []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError, ValueError):
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                if stat[0] == "Z":
                    continue
                parents[int(entry.name)] = int(stat[1])
                title = (entry / "cmdline").read_bytes()
                if title.startswith((b"ray::eval-", b"ray::EvaluationWorker", b"ray::SuccessBefore")):
                    found.append(int(entry.name))

    def is_ours(pid: int) -> bool:
        while pid > 1:
            if pid in roots:
                return True
            pid = parents.get(pid, 0)
        return False

    return [pid for pid in found if is_ours(pid)]


def kill_worker(roots: list[int], generator: random.Random) -> bool:
    """SIGKILL one evaluation worker; whether there was one and it is gone."""
    workers = workers_of(roots)
    if not workers:
        return False
    victim = generator.choice(workers)
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        return False
    deadline = time.monotonic() + 20
    while victim in workers_of(roots):
        assert time.monotonic() < deadline, f"worker {victim} survives SIGKILL"
        time.sleep(0.01)
    return True


def read_events(run: Path) -> list[dict[str, Any]]:
    """Whole lines of RUN/evals/events.jsonl."""
    path = run / "evals" / "events.jsonl"
    events = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            events.append(json.loads(line))
    return events
