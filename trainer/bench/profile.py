"""The most expensive kernels of one call, so that one sees what is left to gain."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longspan.trainer.bench.clock import synchronize

TOP = 25
# by what the names of kernels contain; the first that fits counts
FAMILIES = (
    ("matrix products", r"gemm|nvjet|cutlass|xmma|splitk|addmm|\bmm\b|matmul|_dense_|feed_forward"),
    ("attention", r"flash|fmha|attention|attend|sdpa|window"),
    ("state path", r"chain|state|adjoint|recompute"),
    ("loss", r"cross_entropy|nll|softmax|logits"),
    ("norms", r"norm"),
    ("element-wise", r"elementwise|pointwise|triton_poi|triton_red|triton_per"),
    ("copies and fills", r"memcpy|memset|copy|fill|\bcat"),
    ("sums", r"reduce|sum"),
)


class Profile:
    """Collects one table a contender; `write` puts them all in one file."""

    def __init__(self, device: torch.device) -> None:
        """Args: device: kernels of a GPU, or operators on a CPU."""
        self.device = device
        self.sections: list[str] = []

    def add(self, title: str, call: Callable[[], object], ms: float) -> None:
        """Profile one call that takes `ms` when it is not profiled."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            call()
            synchronize(self.device)
        rows = [
            (event.key, event.count, _microseconds(event, self.device.type))
            for event in profiler.key_averages()
            if not getattr(event, "is_user_annotation", False)  # spans around kernels that are listed themselves
        ]
        self.sections.append(kernel_table(title, rows, ms))

    def write(self, path: Path) -> None:
        """All tables, in the order of the contenders."""
        path.write_text("\n\n".join(self.sections) + "\n", encoding="utf-8")


def kernel_table(title: str, rows: list[tuple[str, int, float]], ms: float) -> str:
    """A text table of kernels by time.

    Args:
        title: first line.
        rows: (name, launches, microseconds in all) of each kernel.
        ms: of the whole call, without profiler.
    """
    rows = sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])
    total = sum(row[2] for row in rows)
    launches = sum(row[1] for row in rows)
    families: dict[str, float] = defaultdict(float)
    for name, _, microseconds in rows:
        families[_family(name)] += microseconds
    lines = [f"== {title}: {ms:.3f} ms a call; {total / 1e3:.3f} ms in {launches} launches of {len(rows)} kernels"]
    lines += [
        f"   {family:<18}{microseconds / 1e3:9.3f} ms {share(microseconds, total)}"
        for family, microseconds in sorted(families.items(), key=lambda item: -item[1])
    ]
    lines.append(f"{'ms':>9} {'share':>6} {'calls':>6} {'us each':>9}  kernel")
    lines += [
        f"{microseconds / 1e3:9.3f} {share(microseconds, total)} {count:6d} {microseconds / count:9.1f}  {name[:120]}"
        for name, count, microseconds in rows[:TOP]
    ]
    if len(rows) > TOP:
        rest = sum(row[2] for row in rows[TOP:])
        lines.append(f"{rest / 1e3:9.3f} {share(rest, total)} {'':6} {'':9}  {len(rows) - TOP} more kernels")
    return "\n".join(lines)


def share(part: float, whole: float) -> str:
    """A share as a percentage, six characters wide."""
    return f"{100 * part / whole if whole else 0:5.1f}%"


def _family(name: str) -> str:
    return next((family for family, pattern in FAMILIES if re.search(pattern, name, re.IGNORECASE)), "other")


def _microseconds(event: Any, device_type: str) -> float:
    return float(event.self_device_time_total if device_type == "cuda" else event.self_cpu_time_total)
