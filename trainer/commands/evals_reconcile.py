"""`longspan evals reconcile`: evaluate every committed checkpoint that has no result yet, once."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from longspan.errors import ClusterError
from longspan.trainer import recipes
from longspan.trainer.evaluation.spec import EvaluationSpec

CORES_PER_EVALUATION = 4


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One pass over all runs.

    Returns:
        Lists of checkpoints: submitted, evaluated, already_evaluated, in_progress_elsewhere, failed_before, not_logged.

    Raises:
        ConfigError, UsageError: the spec is wrong, or a path is no run directory.
        ClusterError: Ray does not start, or an evaluation failed in this pass; the others are done.
    """
    spec = recipes.load(EvaluationSpec, args.spec, args.overrides)
    import torch

    from longspan.trainer.evaluation.reconcile import reconcile

    gpus = torch.cuda.device_count()
    slots = gpus or max(1, len(os.sched_getaffinity(0)) // CORES_PER_EVALUATION)
    report = reconcile([Path(name) for name in args.runs], spec, slots=slots, gpus=gpus)
    if not args.json:
        print(_text(dataclasses.asdict(report)))
    if report.failed:
        reasons = "\n".join(f"  {entry['checkpoint']}: {entry['reason']}" for entry in report.failed)
        raise ClusterError(
            f"{len(report.failed)} evaluations failed, noted in RUN/evals/failed. Mend the cause, then delete the note "
            f"to try again:\n{reasons}"
        )
    return dataclasses.asdict(report)


def _text(report: dict[str, list[Any]]) -> str:
    if not report["submitted"]:
        head = "Nothing to submit: every committed checkpoint has its result, its failure, or somebody at work on it."
    else:
        head = f"Submitted {len(report['submitted'])}, evaluated {len(report['evaluated'])}."
    counts = ", ".join(
        f"{name.replace('_', ' ')}: {len(report[name])}"
        for name in ("already_evaluated", "in_progress_elsewhere", "failed", "failed_before", "not_logged")
    )
    return f"{head}\n  {counts}"
