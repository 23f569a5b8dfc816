"""Bring evaluations up to date: every committed checkpoint has one result per spec.

Desired: committed checkpoints. Observed: `_SUCCESS`, leases, failures. What is missing runs as Ray jobs, newest
checkpoint first. Calling this again is always safe; it does only what is still to do.

    RUN/evals/KEY/_SUCCESS      the result is whole          RUN/evals/KEY/_LOGGED     MLflow has it
    RUN/evals/leases/KEY        somebody works on it now     RUN/evals/failed/KEY.json why there is no result
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longspan.cluster.evaljobs import Command, Outcome, run_commands
from longspan.errors import EXIT_FAULT, EXIT_USAGE, CheckpointError, ConfigError, UsageError
from longspan.trainer.checkpoint.manifest import committed_folders
from longspan.trainer.checkpoint.verify import CHECKPOINTS, pin, unpin
from longspan.trainer.evaluation.folders import CURVE, EVALS, LOGGED, key_of, read_result
from longspan.trainer.evaluation.lease import Lease
from longspan.trainer.evaluation.spec import EvaluationSpec
from longspan.trainer.tracking import log_evaluation

MAX_ATTEMPTS = 3
FINAL_EXIT_CODES = (EXIT_USAGE, EXIT_FAULT)  # the command looked at its inputs and said no: it will again


@dataclass
class Job:
    """One (checkpoint, spec) without a result."""

    run: Path
    checkpoint: Path
    key: str
    lease: Lease | None = None

    @property
    def folder(self) -> Path:
        """Where the result goes."""
        return self.run / EVALS / self.key

    @property
    def failure(self) -> Path:
        """Where a failure is noted."""
        return self.run / EVALS / "failed" / f"{self.key}.json"

    @property
    def pin_owner(self) -> str:
        """Under which name the checkpoint is kept from being pruned."""
        return f"eval-{self.key}"


@dataclass
class Report:
    """What one pass saw and did; entries are checkpoint paths."""

    submitted: list[str] = field(default_factory=list)
    evaluated: list[str] = field(default_factory=list)
    already_evaluated: list[str] = field(default_factory=list)
    in_progress_elsewhere: list[str] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    failed_before: list[dict[str, Any]] = field(default_factory=list)
    not_logged: list[str] = field(default_factory=list)


def reconcile(
    runs: Sequence[Path],
    spec: EvaluationSpec,
    *,
    slots: int,
    gpus: int = 0,
    note: Callable[[str], None] = lambda message: print(message, file=sys.stderr, flush=True),
) -> Report:
    """One pass over all checkpoints of `runs`.

    Args:
        runs: run directories.
        spec: what to measure.
        slots: evaluations at once.
        gpus: GPUs of this machine.
        note: told about progress.

    Raises:
        UsageError: a path is no run directory, or its shards are missing; nothing was submitted.
        ClusterError: Ray does not start.
    """
    report = Report()
    jobs = [job for run in runs for job in _missing(run, spec, report)]
    held = {job.key: job for job in jobs if _claim(job, report)}
    if not held:
        return report
    report.submitted = [str(job.checkpoint) for job in held.values()]
    note(f"submitting {len(held)} evaluations to a local Ray cluster, {slots} at once")
    threads = max(1, len(os.sched_getaffinity(0)) // slots)
    commands = [_command(job, spec, threads) for job in held.values()]

    def done(outcome: Outcome) -> None:
        job = held.pop(outcome.name)
        _finish(job, outcome, report)
        note(f"{job.checkpoint.name}: {outcome.seconds:.0f} s, {len(held)} left")

    def tick() -> None:
        for job in held.values():
            assert job.lease is not None
            job.lease.renew()

    try:
        run_commands(commands, slots=slots, gpus=gpus, on_done=done, on_tick=tick)
    finally:
        for job in held.values():
            _let_go(job)
    return report


def _missing(run: Path, spec: EvaluationSpec, report: Report) -> list[Job]:
    """Checkpoints of a run without a result, newest first; logs results that MLflow does not have yet."""
    if not (run / CHECKPOINTS).is_dir():
        raise UsageError(f"{run} is no run directory: there is no {CHECKPOINTS} folder in it.")
    jobs = []
    for checkpoint in reversed(committed_folders(run / CHECKPOINTS)):
        try:
            job = Job(run, checkpoint, key_of(checkpoint, spec))
        except (CheckpointError, ConfigError) as error:
            _note_failure(Job(run, checkpoint, f"unreadable-{checkpoint.name}"), str(error), EXIT_FAULT, report)
            continue
        if read_result(job.folder) is not None:
            report.already_evaluated.append(str(checkpoint))
            unpin(checkpoint, job.pin_owner)  # left by a reconciler that was killed
            _log(job, report)
            continue
        known = _read_failure(job)
        if known and (known["exit_code"] in FINAL_EXIT_CODES or known["attempts"] >= MAX_ATTEMPTS):
            report.failed_before.append(known)
            continue
        jobs.append(job)
    return jobs


def _claim(job: Job, report: Report) -> bool:
    """Take the lease and pin the checkpoint; False if somebody else is at it, or the checkpoint is gone."""
    job.lease = Lease.take(job.run / EVALS / "leases" / job.key)
    if job.lease is None:
        report.in_progress_elsewhere.append(str(job.checkpoint))
        return False
    if read_result(job.folder) is not None:  # finished between our look and our lease
        report.already_evaluated.append(str(job.checkpoint))
        job.lease.release()
        return False
    try:
        pin(job.checkpoint, job.pin_owner)
    except UsageError:
        job.lease.release()
        return False
    return True


def _command(job: Job, spec: EvaluationSpec, threads: int) -> Command:
    argv = (
        sys.executable,
        "-m",
        "longspan.trainer.evaluation.job",
        str(job.checkpoint.absolute()),
        spec.model_dump_json(),
        str(job.folder.parent.absolute()),
    )
    return Command(job.key, argv, {"OMP_NUM_THREADS": str(threads)})


def _finish(job: Job, outcome: Outcome, report: Report) -> None:
    """Believe the result's `_SUCCESS` alone; note anything else as a failure."""
    if read_result(job.folder) is not None:
        report.evaluated.append(str(job.checkpoint))
        job.failure.unlink(missing_ok=True)
        _log(job, report)
    else:
        reason = outcome.reason or outcome.output.strip() or f"ended with exit code {outcome.exit_code} and no result"
        _note_failure(job, reason, outcome.exit_code, report)
    _let_go(job)


def _let_go(job: Job) -> None:
    unpin(job.checkpoint, job.pin_owner)
    if job.lease is not None:
        job.lease.release()


def _log(job: Job, report: Report) -> None:
    if (job.folder / LOGGED).exists():
        return
    result = read_result(job.folder)
    assert result is not None
    if not log_evaluation(job.run, result, job.folder / CURVE):
        report.not_logged.append(str(job.checkpoint))


def _read_failure(job: Job) -> dict[str, Any] | None:
    try:
        known: dict[str, Any] = json.loads(job.failure.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return known


def _note_failure(job: Job, reason: str, exit_code: int | None, report: Report) -> None:
    known = _read_failure(job)
    failure = {
        "checkpoint": str(job.checkpoint),
        "key": job.key,
        "exit_code": exit_code,
        "attempts": (known["attempts"] if known else 0) + 1,
        "time": time.time(),
        "reason": reason,
    }
    if known and known["exit_code"] in FINAL_EXIT_CODES:
        report.failed_before.append(known)
        return
    job.failure.parent.mkdir(parents=True, exist_ok=True)
    temporary = job.failure.with_suffix(".tmp")
    temporary.write_text(json.dumps(failure, indent=1) + "\n", encoding="utf-8")
    temporary.replace(job.failure)
    report.failed.append(failure)
