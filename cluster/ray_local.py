"""A Ray cluster of this process's own on this machine: token required, small, gone afterwards.

Ray opens its ports on all interfaces even when told the loopback address (2.60), so the token is what protects
them: it is made anew each time, lies in a file that only this user can read, and Ray is refused without it.
"""

from __future__ import annotations

import importlib
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longspan.errors import ClusterError

OBJECT_STORE_BYTES = 80 * 2**20  # commands and their outcomes are small; Ray refuses less than 75 MiB
_ENVIRONMENT = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def local_cluster(slots: int, gpus: int = 0) -> Iterator[Any]:
    """Start Ray, yield the `ray` module, stop it and remove what it wrote.

    Args:
        slots: tasks of one CPU each that run at once.
        gpus: GPUs that tasks may claim.

    Raises:
        ClusterError: ray is missing, or does not start.
    """
    folder = Path(tempfile.mkdtemp(prefix="longspan-ray-"))  # short: Ray puts sockets in it, whose paths are limited
    token = folder / "token"
    write_token(token)
    before = {name: os.environ.get(name) for name in (*_ENVIRONMENT, "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")}
    os.environ.update(_ENVIRONMENT, RAY_AUTH_TOKEN_PATH=str(token))
    os.environ.pop("RAY_ADDRESS", None)
    ray = None
    try:
        ray = _import_ray()
        try:
            ray.init(
                address="local",
                num_cpus=slots,
                num_gpus=gpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                dashboard_host="127.0.0.1",
                _node_ip_address="127.0.0.1",
                log_to_driver=False,
                configure_logging=False,
                _temp_dir=str(folder),
            )
        except Exception as error:
            raise ClusterError(f"Ray does not start on this machine ({type(error).__name__}: {error}).") from error
        yield ray
    finally:
        if ray is not None:
            ray.shutdown()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


def _import_ray() -> Any:
    """Ray, with the token settings that the environment holds now: it reads them once, when it is imported."""
    known = "ray" in sys.modules
    try:
        import ray
    except ImportError as error:
        raise ClusterError(f"evaluation jobs need ray, which cannot be imported ({error}). Install `ray`.") from error
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
