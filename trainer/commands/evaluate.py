"""`longspan evaluate`: perplexity versus context length of one checkpoint, or its answers to a synthetic task, here."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longspan.cluster.environment import read_place
from longspan.trainer.evaluation.specs import load_spec

PROGRESS_SECONDS = 5.0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, log to MLflow, print the curve; returns the result without its per-document sums.

    Under torchrun the ranks divide the documents; rank 0 writes, logs and prints.

    Raises:
        ConfigError, UsageError: the spec is wrong, or spec, checkpoint and shards do not fit together.
        CheckpointError: the checkpoint does not verify.
    """
    spec = load_spec(args.spec, args.overrides)
    from longspan.trainer.checkpoint.verify import newest

    checkpoint = newest(Path(args.checkpoint))
    from longspan.trainer.evaluation.run import default_device, evaluate

    out = Path(args.out) if args.out else None
    if read_place().world_size == 1:
        result = evaluate(checkpoint, spec, out, device=default_device(), progress=_progress())
        return report(checkpoint, result, show=not args.json)
    from longspan.cluster.config import ParallelConfig
    from longspan.cluster.mesh import Mesh

    mesh = Mesh.build(ParallelConfig())
    try:
        progress = _progress() if mesh.rank == 0 else None
        result = evaluate(checkpoint, spec, out, device=mesh.device, progress=progress, mesh=mesh)
        return report(checkpoint, result, show=not args.json) if mesh.rank == 0 else {}
    finally:
        mesh.close()


def report(checkpoint: Path, result: dict[str, Any], show: bool) -> dict[str, Any]:
    """Send a result to MLflow and, with `show`, print it; returns what `--json` prints.

    Args:
        checkpoint: checkpoint folder.
        result: what `evaluate` returned.
        show: print the curve to standard output.
    """
    from longspan.trainer.evaluation.folders import CURVE, run_of
    from longspan.trainer.evaluation.plot import text_plot
    from longspan.trainer.evaluation.task_result import task_table
    from longspan.trainer.evaluation_tracking import log_evaluation

    folder, run = Path(result["folder"]), run_of(checkpoint)
    logged = (run / "config.yaml").is_file() and log_evaluation(run, result, folder / CURVE)
    plot = task_table(result) if result["kind"] == "synthetic" else text_plot(result)
    if show:
        print(plot)
        data = result["data"]
        if data.get("excluded"):
            names = ", ".join(entry["id"] for entry in data["excluded"])
            print(f"Left out, shorter than {data['needed_bytes']} bytes: {len(data['excluded'])} documents ({names})")
        print(f"{'Already evaluated' if result['reused'] else 'Evaluated'}: {folder}")
    short = {name: value for name, value in result.items() if name != "scores"}
    return {**short, "text_plot": plot, "logged": logged}


def _progress() -> Callable[[float], None]:
    """Prints how far the evaluation is to standard error, every few seconds."""
    started = shown = time.monotonic()

    def progress(fraction: float) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= PROGRESS_SECONDS or fraction == 1.0:
            shown = now
            print(f"evaluate: {fraction:4.0%}, {now - started:.0f} s", file=sys.stderr, flush=True)

    return progress
