"""PostgreSQL and MLflow on loopback, for tests; both end with the test."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

START_SECONDS = 120.0


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's server programs (Debian: package postgresql); None if there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def why_no_postgres() -> str:
    """What is missing for PostgreSQL; empty if nothing is."""
    if postgres_programs() is None:
        return "PostgreSQL is not on this machine (Debian: apt-get install postgresql)"
    if find_spec("psycopg") is None:
        return "psycopg is not in this environment (pip install 'psycopg[binary]')"
    if os.getuid() == 0 and subprocess.run(["id", "postgres"], capture_output=True).returncode:
        return "PostgreSQL refuses to run as root, and there is no user postgres"
    return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A fresh PostgreSQL server; yields the URI of an empty database."""
    programs = postgres_programs()
    assert programs is not None
    as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    data, port = folder / "data", free_port()
    folder.mkdir(mode=0o755)
    if as_user:
        shutil.chown(folder, "postgres")

    def run(program: str, *arguments: str) -> None:
        log = folder.parent / "postgres.log"
        with log.open("ab") as file:  # not a pipe: the server would keep it open
            done = subprocess.run([*as_user, str(programs / program), *arguments], stdout=file, stderr=file, cwd="/")
        assert done.returncode == 0, log.read_text()

    run("initdb", "-D", str(data), "-U", "longspan", "-A", "trust", "--no-sync")
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c fsync=off"
    run("pg_ctl", "-D", str(data), "-w", "-o", options, "start")
    try:
        run("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "longspan", "tracking")
        yield f"postgresql://longspan@127.0.0.1:{port}/tracking"
    finally:
        run("pg_ctl", "-D", str(data), "-m", "immediate", "stop")


@contextmanager
def mlflow_server(folder: Path, backend: str) -> Iterator[str]:
    """`mlflow server` with its default host; yields its URI."""
    port = free_port()
    environment = {
        **os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }  # fmt: skip
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--backend-store-uri", backend]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "--workers", "1", "--artifacts-destination", str(folder / "artifacts")],
            env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(lambda: _answers(port), lambda: (folder / "server.log").read_text()[-3000:])
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def _answers(port: int) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def wait_for(condition: Callable[[], bool], why: Callable[[], str]) -> None:
    """Poll until `condition()` holds; `why()` says what went wrong if it never does."""
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.2)


def listens_on(port: int) -> set[str]:
    """IPv4 and IPv6 addresses, as the kernel writes them, on which somebody listens at this port."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, _, number = local.rpartition(":")
            if state == "0A" and int(number, 16) == port:
                found.add(address)
    return found
