"""What the trainer needs to know about the machine: peak speed, memory, threads, age of the process."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

# dense bf16 FLOP/s, by a part of the device's name
_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of a known GPU; None for everything else."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in name), None)


def memory_gib(device: torch.device) -> float:
    """Most memory that tensors held on the GPU so far; on a CPU the process's resident memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


def set_threads(threads: int | None, local_world_size: int) -> int:
    """Set torch's CPU threads to `threads`, or to this process's share of the cores; returns the number.

    Results on a CPU are equal to the last bit only with an equal number of threads.
    """
    count = threads or max(1, available_cores() // local_world_size)
    torch.set_num_threads(count)
    return count


def available_cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: its affinity, and in a container its quota of CPU time.

    Args:
        cpu_max: the control group's limit, "QUOTA PERIOD" in microseconds or "max PERIOD".
    """
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = cpu_max.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or no limit
        return cores


def process_age_seconds() -> float:
    """Seconds since this process was started."""
    with open("/proc/self/stat") as file:
        started_ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")
