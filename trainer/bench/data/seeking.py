"""Seeking far into a large lane plan, in a process of its own: seconds, and the most memory that it held.

The process is `python -m longspan.trainer.bench.data.seeking`, which reads its settings as JSON from standard input.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from longspan.data_pipeline.document_table import DocumentTable
from longspan.data_pipeline.manifest import Manifest, byte_vocabulary
from longspan.data_pipeline.plan import LanePlan
from longspan.errors import DataError
from longspan.trainer.bench.data.result import Bar, Pass, Row, row_of
from longspan.trainer.bench.result import OURS

PLAN = {"documents": 1_000_000, "tokens": 65_536, "lanes": 256, "segment_tokens": 4096, "step": 1_000_000}
BAR = Bar(seconds=2.0, gib=1.0)


def seek_rows(repeat: int, scratch: Path) -> list[Row]:
    """Without snapshots on disk, and with those that the run before left.

    Raises:
        DataError: a process failed, or the two found different tokens at the step.
    """
    without: list[Pass] = []
    again: list[Pass] = []
    found: set[str] = set()
    for _ in range(repeat):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            for passes in (without, again):
                answer = _seek_in_a_process({**PLAN, "snapshots": folder})
                found.add(answer["pieces"])
                passes.append(Pass(0, answer["seconds"], answer["cpu_seconds"], peak_gib=answer["peak_gib"]))
    if len(found) > 1:
        raise DataError(f"with and without snapshots, step {PLAN['step']:,} holds different tokens.")
    case = (
        f"seek to step {PLAN['step']:,}: {PLAN['documents']:,} documents of {PLAN['tokens']:,} tokens, "
        f"{PLAN['lanes']} x {PLAN['segment_tokens']:,}"
    )
    note = "in a new process: laying out the plan, and the step"
    return [
        row_of(OURS, f"{case}; no snapshots yet", without, BAR, note),
        row_of(OURS, f"{case}; with snapshots", again, BAR, note),
    ]


def _seek_in_a_process(settings: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "longspan.trainer.bench.data.seeking"]
    done = subprocess.run(  # noqa: S603 - this Python
        command, input=json.dumps(settings), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise DataError(f"the process that seeks ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def seek(settings: dict[str, Any]) -> dict[str, Any]:
    """Lay out the plan and look up the step, in this process; `pieces` is a hash of what was found."""
    lengths = np.full(settings["documents"], settings["tokens"], dtype=np.int64)
    table = DocumentTable.synthetic(lengths)
    digest = hashlib.sha256(lengths.tobytes()).hexdigest()
    manifest = Manifest(Path("nowhere"), "synthetic", byte_vocabulary(), [], [], table, digest)
    began, began_cpu = time.perf_counter(), time.process_time()
    plan = LanePlan(
        manifest,
        seed=0,
        lanes=settings["lanes"],
        segment_tokens=settings["segment_tokens"],
        quantum=512,
        boundary="pack",
        snapshots=Path(settings["snapshots"]),
    )
    pieces = plan.table(settings["step"], 0, settings["lanes"])
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_gib": peak_memory_gib(),
        "pieces": hashlib.sha256(b"".join(column.tobytes() for column in pieces)).hexdigest(),
    }


def peak_memory_gib() -> float:
    """Most memory that this process held; `getrusage` would count that of the process which started it, too."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) / 2**20


if __name__ == "__main__":
    print(json.dumps(seek(json.load(sys.stdin))))
