"""Ray for evaluations: a cluster of this process's own on this machine, or one that runs already. Token required.

Ray opens ports on all interfaces even when told the loopback address (2.60), so the token is what protects
them: for a cluster of our own it is made anew each time, lies in a file that only this user can read, and Ray is
refused without it. For a cluster that runs already it must be there, and be as private.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import secrets
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from longspan.cluster.network import split_address
from longspan.errors import ClusterError, SecurityError

OBJECT_STORE_BYTES = 80 * 2**20  # tasks and their answers are small; Ray refuses less than 75 MiB
DEFAULT_TOKEN = Path(".ray") / "auth_token"  # below the home directory, where Ray itself looks
CONNECT_SECONDS = 10.0
START_TRIES = 3  # Ray gives itself 30 seconds, too few on a machine that is very busy
_ENVIRONMENT = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
_HTTP2_SETTINGS = b"\x04"
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _HTTP2_SETTINGS + b"\0" * 5  # RFC 9113, 3.4
_PREFIX = "longspan-ray-"
_OWNER = "owner"


@contextmanager
def ray_session(address: str | None, cpus: int, gpus: int = 0) -> Iterator[Any]:
    """The `ray` module, connected to the cluster at `address`, or to one of this process's own if None.

    Args:
        address: auto, HOST:PORT or ray://HOST:PORT.
        cpus, gpus: of a cluster of our own.

    Raises:
        ClusterError: ray is missing, does not start, or the cluster does not answer.
        SecurityError: the token of the cluster is readable by others.
    """
    with local_cluster(cpus, gpus) if address is None else _running_cluster(address) as ray:
        yield ray


@contextmanager
def local_cluster(cpus: int, gpus: int = 0) -> Iterator[Any]:
    """Start Ray, yield the `ray` module, stop it and remove what it wrote.

    Args:
        cpus: CPUs that tasks may claim.
        gpus: GPUs that tasks may claim.

    Raises:
        ClusterError: ray is missing, or does not start.
    """
    with _own_folder() as folder:
        token = folder / "token"
        write_token(token)
        with _environment({**_ENVIRONMENT, "RAY_AUTH_TOKEN_PATH": str(token), "RAY_ADDRESS": None}):
            ray = _import_ray()
            try:
                _start(ray, cpus, gpus, folder)
                yield ray
            finally:
                ray.shutdown()


def _start(ray: Any, cpus: int, gpus: int, folder: Path) -> None:
    for left in reversed(range(START_TRIES)):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=gpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                dashboard_host="127.0.0.1",
                _node_ip_address="127.0.0.1",
                log_to_driver=False,
                configure_logging=False,
                _temp_dir=str(folder / "ray"),  # Ray opens it to everybody, so the token lies above it
            )
            return
        except Exception as error:
            ray.shutdown()
            if not left or "timed out" not in str(error):
                raise ClusterError(f"Ray does not start on this machine ({type(error).__name__}: {error}).") from error


@contextmanager
def _running_cluster(address: str) -> Iterator[Any]:
    try:
        _greet(address)
    except OSError as error:
        raise _nobody_at(address, error) from error
    with _environment({**_ENVIRONMENT, **_private_token(), "RAY_ADDRESS": None}):
        ray = _import_ray()
        try:
            try:
                ray.init(address=address, log_to_driver=False, configure_logging=False)
            except Exception as error:
                raise _nobody_at(address, error) from error
            yield ray
        finally:
            ray.shutdown()


def _nobody_at(address: str, error: Exception) -> ClusterError:
    brief = " ".join(str(error).split())[:300]
    return ClusterError(
        f"no Ray cluster at --address {address} ({type(error).__name__}: {brief}). Start it with RAY_AUTH_MODE=token "
        f"and the token of RAY_AUTH_TOKEN_PATH, or leave --address out for a cluster of this command's own."
    )


def _greet(address: str) -> None:
    """See that whoever listens speaks HTTP/2, as gRPC does: Ray waits for minutes for one that is silent or stopped.

    Raises:
        OSError: it does not.
    """
    place = split_address(address.removeprefix("ray://"))
    if place is None:
        return
    with socket.create_connection(place, timeout=CONNECT_SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return
        connection.sendall(_HTTP2_PREFACE)
        answer = connection.recv(9)  # the head of a frame: length, type, flags, stream
        if answer[3:4] != _HTTP2_SETTINGS:
            raise ConnectionError(f"what listens there is no Ray: it begins with {answer!r}")


def knock(address: str) -> None:
    """See whether anybody listens at HOST:PORT or ray://HOST:PORT: Ray itself waits for minutes where nobody does.

    Raises:
        OSError: nobody does.
    """
    place = split_address(address.removeprefix("ray://"))
    if place is not None:
        socket.create_connection(place, timeout=CONNECT_SECONDS).close()


def _private_token() -> dict[str, str]:
    """Where the token of a running cluster lies.

    Raises:
        ClusterError: there is none.
        SecurityError: others can read it.
    """
    if os.environ.get("RAY_AUTH_TOKEN"):
        return {}
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / DEFAULT_TOKEN)
    if not path.is_file():
        raise ClusterError(
            f"no token for the Ray cluster at {path}: a cluster without one runs anybody's code. Make one with "
            f"`ray get-auth-token --generate`, chmod 600 it, and start the cluster with RAY_AUTH_MODE=token."
        )
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise SecurityError(f"the Ray token {path} has mode {mode:o}, so others can read it. Run: chmod 600 {path}")
    return {"RAY_AUTH_TOKEN_PATH": str(path)}


@contextmanager
def _environment(values: dict[str, str | None]) -> Iterator[None]:
    """Set variables (None: unset), and put everything back."""
    before = {name: os.environ.get(name) for name in values}
    try:
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _own_folder() -> Iterator[Path]:
    """A folder for one cluster, locked while it is in use; first removes those of this user that nobody uses.

    A process that is killed cannot remove its own.
    """
    root = Path(tempfile.gettempdir())  # short: Ray puts sockets in it, whose paths are limited
    with ExitStack() as stack:
        for left in root.glob(f"{_PREFIX}*"):
            with suppress(OSError), ExitStack() as look:
                if left.stat().st_uid == os.getuid() and _lock(left / _OWNER, look):
                    shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        try:
            _lock(folder / _OWNER, stack, make=True)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _lock(path: Path, stack: ExitStack, make: bool = False) -> bool:
    """Whether nobody else holds this file; it is then held until `stack` closes."""
    file = stack.enter_context(path.open("a" if make else "r"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _import_ray() -> Any:
    """Ray, with the token settings that the environment holds now: it reads them once, when it is imported."""
    known = "ray" in sys.modules
    try:
        import ray
    except ImportError as error:
        raise ClusterError(f"evaluations need ray, which cannot be imported ({error}). Install `ray`.") from error
    if known:
        raylet = importlib.import_module("ray._raylet")
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
    return ray


def write_token(path: Path) -> None:
    """A fresh random token that only this user can read, from its first moment on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
