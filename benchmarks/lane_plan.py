"""How long a fresh process takes to seek to step 1,000,000 of a large lane plan, and its steps per second from there.

    python benchmarks/lane_plan.py [--sources 2] [--unequal] [--snapshots FOLDER] [--step N]

Prints one JSON line: seconds of laying out the plan's columns and of seeking, CPU seconds of both (the same if nothing
else runs), steps per CPU second of going on, and peak memory. Run it twice with the same --snapshots: the first run
walks the plan and writes the file, the second starts from it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import time
from pathlib import Path

import numpy as np

from longspan.data_pipeline.document_table import DocumentTable
from longspan.data_pipeline.manifest import Manifest, byte_vocabulary
from longspan.data_pipeline.plan import LanePlan

_STEPS_TIMED = 20_000


def synthetic_manifest(documents: int, tokens: int, sources: int, *, unequal: bool) -> Manifest:
    """Documents of `tokens` tokens, or of a log-normal with that mean, dealt to the sources in turn."""
    lengths = np.full(documents, tokens, dtype=np.int64)
    if unequal:
        spread = np.random.default_rng(0).lognormal(0.0, 1.0, documents)
        lengths = np.maximum(2, (spread / spread.mean() * tokens).astype(np.int64))
    names = [f"source-{index}" for index in range(sources)]
    table = DocumentTable.synthetic(lengths, np.arange(documents) % sources, names)
    digest = hashlib.sha256(lengths.tobytes() + str(sources).encode()).hexdigest()
    return Manifest(Path("nowhere"), "synthetic", byte_vocabulary(), [], [], table, digest)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    for name, default in (("documents", 1_000_000), ("tokens", 65_536), ("sources", 1), ("lanes", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--step", type=int, default=1_000_000)
    parser.add_argument("--unequal", action="store_true")
    parser.add_argument("--snapshots", type=Path)
    options = parser.parse_args()
    manifest = synthetic_manifest(options.documents, options.tokens, options.sources, unequal=options.unequal)
    weights = None
    if options.sources > 1:
        weights = {"source-0": 0.7, **{f"source-{i}": 0.3 / (options.sources - 1) for i in range(1, options.sources)}}
        weights["source-0"] += 1 - sum(weights.values())
    began, began_cpu = time.perf_counter(), time.process_time()
    plan = LanePlan(
        manifest,
        seed=0,
        lanes=options.lanes,
        segment_tokens=4096,
        quantum=512,
        boundary="pack",
        source_weights=weights,
        snapshots=options.snapshots,
    )
    loaded = time.perf_counter()
    pieces = plan.table(options.step, 0, options.lanes)
    sought, cpu = time.perf_counter(), time.process_time() - began_cpu
    checksum = hashlib.sha256(b"".join(column.tobytes() for column in pieces)).hexdigest()[:16]
    began_steps = time.process_time()
    for step in range(options.step, options.step + _STEPS_TIMED):
        plan.table(step, 0, options.lanes)
    rate = _STEPS_TIMED / (time.process_time() - began_steps)
    result = {
        "plan_seconds": round(loaded - began, 3),
        "seek_seconds": round(sought - loaded, 3),
        "cpu_seconds": round(cpu, 3),
        "steps_per_cpu_second": round(rate),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "pieces": checksum,
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
