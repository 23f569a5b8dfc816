"""Where a benchmark ran: device, versions, and whether compiled kernels were already on disk."""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from longspan import __version__

# read by name, since asking a package itself would load it
_PACKAGES = ("triton", "numpy", "liger-kernel", "block-recurrent-transformer-pytorch")


def describe_device(device: torch.device) -> dict[str, Any]:
    """{"type", "name"}, and of a GPU {"capability", "memory_gib", "multiprocessors"}."""
    if device.type != "cuda":
        return {"type": device.type, "name": processor(), "threads": torch.get_num_threads()}
    about = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": about.name,
        "capability": f"{about.major}.{about.minor}",
        "memory_gib": about.total_memory / 2**30,
        "multiprocessors": about.multi_processor_count,
    }


def versions() -> dict[str, str | None]:
    """Versions of everything that decides speed; None for what is not installed."""
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {
        "longspan": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
        "ptxas": _ptxas(),
        **{name: version(name) for name in _PACKAGES},
    }


def compile_caches() -> dict[str, int]:
    """Entries in the folders where Triton and torch.compile keep what they compiled: 0 is a cold start."""
    triton = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    own = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    inductor = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or own)
    return {"triton": _entries(triton), "torch.compile": _entries(inductor)}


def _entries(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0


def version(package: str) -> str | None:
    """Version of an installed package, None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ptxas() -> str | None:
    """The assembler that Triton uses: its version, and whether it is the one in Triton's wheel."""
    try:
        from triton import knobs
    except ImportError:
        return None
    try:
        tool = knobs.nvidia.ptxas
        command = [tool.path, "--version"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=10)  # noqa: S603 - Triton's own tool
    except (RuntimeError, AttributeError, OSError, subprocess.TimeoutExpired):  # no assembler for this platform
        return None
    found = re.search(r"V([\d.]+)", said.stdout)
    origin = "from TRITON_PTXAS_PATH" if os.environ.get("TRITON_PTXAS_PATH") else "bundled"
    return f"{found.group(1) if found else tool.version} ({origin})"


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
