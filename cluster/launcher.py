"""One node's launcher: torchrun around a Longspan command, with signals forwarded and exit codes translated.

torchrun starts the workers, restarts them after a fault and makes the nodes of a run meet. What it does not do is
done here: SIGUSR1 would kill it and any other signal makes it end the workers, so signals go to the workers
themselves; a worker's exit code becomes 1, so the codes come from records that the workers write.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from longspan.cluster import exit_records, network
from longspan.cluster.exit_records import ExitRecord
from longspan.cluster.worker import end_with_parent
from longspan.errors import EXIT_FAULT, EXIT_OK, EXIT_REQUEUE, UsageError

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_TICK_SECONDS = 0.1
# how long the other workers of a node may take to end after one of them met what ends the run
_GRACE_SECONDS = 30.0
# a scheduler's own names for nodes; torchrun sets them anew for the workers, and here they would silence messages
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def visible_gpus() -> int:
    """GPUs that processes started here would see."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([name for name in chosen.split(",") if name.strip() and name.strip() != "-1"])
    return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])


@dataclass(frozen=True)
class NodeLaunch:
    """What to run on this node.

    Attributes:
        module, arguments: the command that every rank runs, as `python -m module arguments`.
        processes: ranks on this node. nodes: nodes of the run, each with a launcher of its own.
        rendezvous: HOST:PORT where the nodes meet; None for a run of one node.
        run_id: the same on all nodes of a run.
        max_restarts: how often all ranks are started again after a fault.
        timeout_seconds: longest wait for the other nodes.
    """

    module: str
    arguments: tuple[str, ...]
    processes: int
    nodes: int = 1
    rendezvous: str | None = None
    run_id: str = "longspan"
    max_restarts: int = 0
    timeout_seconds: float = 600.0

    def torchrun(self) -> list[str]:
        """The command line of torchrun on this node.

        Raises:
            UsageError: `rendezvous` is missing, not HOST:PORT, or its name does not resolve.
        """
        command = [sys.executable, "-m", "longspan.cluster.torchrun", "--nnodes", str(self.nodes)]
        command += ["--nproc-per-node", str(self.processes), "--max-restarts", str(self.max_restarts)]
        if self.nodes == 1:
            command += ["--standalone"]
        else:
            host, port = self._meeting_point()
            limit = max(1, round(self.timeout_seconds))
            settings = f"join_timeout={limit},read_timeout={limit}"
            # torchrun compares host names, which need not lead to this address; but of launchers that meet at a
            # loopback address, which is a trial on one host, it lets the first one serve the others
            if not network.resolve(host).startswith("127."):
                settings += f",is_host={network.is_local(host)}"
            command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{network.resolve(host)}:{port}"]
            command += ["--rdzv-id", self.run_id, "--rdzv-conf", settings, "--local-addr", self._local_address()]
        return [*command, "-m", "longspan.cluster.worker", self.module, *self.arguments]

    def _meeting_point(self) -> tuple[str, int]:
        if self.rendezvous is None:
            raise UsageError(
                f"--nodes {self.nodes} needs --rendezvous HOST:PORT: a host of the run and a free port of it, the same "
                f"on every node."
            )
        return network.split_endpoint(self.rendezvous)

    def _local_address(self) -> str:
        host, _ = self._meeting_point()
        return network.resolve(host) if network.is_local(host) else network.local_address(network.resolve(host))

    def environment(self, records: Path) -> dict[str, str]:
        """The workers' environment: this process's own, without a scheduler's idea of ranks."""
        kept = {name: value for name, value in os.environ.items() if name not in _TORCHRUN_VARIABLES}
        kept[exit_records.FOLDER_VARIABLE] = str(records)
        # rank 0 serves the store of its own attempt: ranks of an attempt that failed cannot be met in it
        kept["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        # torchrun would set 1 and warn; each process divides the node's cores by itself
        kept.setdefault("OMP_NUM_THREADS", "1")
        if self.nodes > 1:
            # gloo looks the host's name up, which is often 127.0.0.1 to itself
            interface = network.interface_of(self._local_address())
            if interface:
                kept.setdefault("GLOO_SOCKET_IFNAME", interface)
        return kept

    def check_reachable(self) -> None:
        """Wait for the launcher that serves the meeting point, unless that is this one.

        Raises:
            UsageError: it does not answer within the timeout.
        """
        if self.nodes > 1:
            host, port = self._meeting_point()
            if not network.is_local(host):
                network.wait_reachable(host, port, self.timeout_seconds)


@dataclass(frozen=True)
class NodeResult:
    """How the run ended on this node.

    Attributes:
        exit_code: of `longspan.errors`.
        ends: records of the last attempt's workers.
        restarts: how often the workers were started again.
    """

    exit_code: int
    ends: list[ExitRecord]
    restarts: int

    def result(self) -> dict[str, Any]:
        """What the command returned on this node's first rank; empty if it did not end well."""
        ends = sorted(self.ends, key=lambda record: record.rank)
        return next((record.result for record in ends if record.result), {})


def messages(ends: list[ExitRecord]) -> list[str]:
    """What workers said at their ends, in order of rank, each text once; those that only followed say nothing."""
    said: dict[str, int] = {}
    for record in sorted(ends, key=lambda end: (end.message == exit_records.FOLLOWED, end.rank)):
        if said and record.message == exit_records.FOLLOWED:
            break
        if record.message:
            said.setdefault(record.message, record.rank)
    return [text if rank == 0 else f"rank {rank}: {text}" for text, rank in said.items()]


def run_node(launch: NodeLaunch, *, quiet_output: bool = False) -> NodeResult:
    """Run the command on this node's ranks to its end; call it in the main thread.

    Args:
        launch: what to run.
        quiet_output: the workers' standard output goes to standard error.

    Raises:
        UsageError: the nodes cannot meet.
    """
    launch.check_reachable()
    with tempfile.TemporaryDirectory(prefix="longspan-launch-") as folder:
        records = Path(folder)
        with collect_signals() as received:
            process = subprocess.Popen(  # noqa: S603 - own command line, no shell
                launch.torchrun(),
                env=launch.environment(records),
                stdout=sys.stderr if quiet_output else None,
                start_new_session=True,  # a Ctrl-C in the terminal reaches the workers through the launcher, once
                preexec_fn=_in_torchrun,
            )
            _watch(process, records, received)
        return _result(launch, process.returncode, records, bool(received))


def _in_torchrun() -> None:
    """In the child before torchrun starts: no SIGUSR1 kills it, and it does not outlive the launcher."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    end_with_parent()


@contextmanager
def collect_signals() -> Iterator[list[int]]:
    """While active, signals to the launcher are collected in the list that this yields."""
    received: list[int] = []

    def take(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, take) for number in _FORWARDED}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(process: subprocess.Popen[Any], records: Path, received: list[int]) -> None:
    """Until torchrun ends: forward signals, tell of restarts, and end what is left of a run that is over."""
    delivered: dict[int, int] = {}
    restarts = 0
    over: float | None = None
    while process.poll() is None:
        if received:  # a worker that arrives later gets the signals of before, too
            for pid in {pid for attempt in exit_records.attempts(records) for pid in attempt}:
                if _runs_under(pid, process.pid):
                    for number in received[delivered.get(pid, 0) :]:
                        os.kill(pid, number)
                    delivered[pid] = len(received)
        attempts, ends = exit_records.attempts(records), exit_records.records(records)
        if len(attempts) > restarts + 1:
            restarts = len(attempts) - 1
            why = messages([end for end in ends if end.pid in attempts[-2]]) or ["a process was killed"]
            print(f"longspan: restart {restarts} from the last checkpoint: {'; '.join(why)}", file=sys.stderr)
        if any(end.exit_code in exit_records.FINAL_CODES and end.exit_code != EXIT_OK for end in ends):
            over = over or time.monotonic() + _GRACE_SECONDS
            if time.monotonic() > over:
                process.terminate()
        time.sleep(_TICK_SECONDS)


def _runs_under(pid: int, parent: int) -> bool:
    """Whether process `pid` is alive and a child of `parent`."""
    try:
        state, above = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return False
    return state != "Z" and int(above) == parent


def _result(launch: NodeLaunch, torchrun_code: int, records: Path, stopped: bool) -> NodeResult:
    attempts = exit_records.attempts(records)
    if not attempts:
        if stopped:
            return NodeResult(EXIT_REQUEUE, [], 0)
        if launch.nodes > 1:
            raise UsageError(
                f"the {launch.nodes} nodes of run {launch.run_id} did not all meet at {launch.rendezvous} within "
                f"{launch.timeout_seconds:.0f} s. Start the same command on every node."
            )
    last = [end for end in exit_records.records(records) if attempts and end.pid in attempts[-1]]
    code = exit_records.agreed_code(last)
    if torchrun_code != 0 and code == EXIT_OK:  # a worker was killed and could not say anything
        code = EXIT_FAULT
    return NodeResult(code, last, max(0, len(attempts) - 1))
