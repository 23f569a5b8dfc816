"""Bring evaluations up to date: every committed checkpoint has one result per spec.

Desired: committed checkpoints x specs. Observed: `_SUCCESS`, leases, failures. What is missing is pinned at once, so
that no pruning takes it before its turn, and evaluated newest first. Calling this again is always safe; it does
only what is still to do, and several may do it at once.

    RUN/evals/KEY/_SUCCESS      the result is whole          RUN/evals/KEY/_LOGGED       MLflow has it
    RUN/evals/leases/KEY        somebody works on it now     RUN/evals/failed/KEY.json   why there is no result
    RUN/evals/work/KEY/         finished shards              RUN/evals/events.jsonl      what happened
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from longspan.cluster.actor_pool import Shape, run_pool
from longspan.cluster.ray_local import ray_session
from longspan.errors import EXIT_FAULT, EXIT_UNEXPECTED, EXIT_USAGE, ClusterError, LongspanError, UsageError
from longspan.trainer.checkpoint.awaited import await_new_ones
from longspan.trainer.checkpoint.manifest import COMMITTED, committed_folders
from longspan.trainer.checkpoint.verify import CHECKPOINTS, pin, unpin
from longspan.trainer.evaluation import alert, failures
from longspan.trainer.evaluation.best import follow
from longspan.trainer.evaluation.events import note as note_event
from longspan.trainer.evaluation.folders import EVALS, LEASES, is_torn, key_of, read_result, work_folder
from longspan.trainer.evaluation.lease import Keeper
from longspan.trainer.evaluation.queue import Job, Queue
from longspan.trainer.evaluation.sink import Sink
from longspan.trainer.evaluation.specs import Spec
from longspan.trainer.evaluation.worker import EvaluationWorker, is_transient
from longspan.trainer.evaluation_tracking import move_best


@dataclass(frozen=True)
class Place:
    """Where evaluations run.

    Attributes:
        address: of a Ray cluster that runs; None: one of this process's own.
        shape: workers, and what each of them claims.
    """

    address: str | None
    shape: Shape


@dataclass
class Report:
    """What one pass saw and did; entries are checkpoint paths, of failures also key, reason, attempts.

    `refused` lists runs that could not be looked through, with reason and exit code; the others were.
    """

    submitted: list[str] = field(default_factory=list)
    evaluated: list[str] = field(default_factory=list)
    already_evaluated: list[str] = field(default_factory=list)
    in_progress_elsewhere: list[str] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    failed_before: list[dict[str, Any]] = field(default_factory=list)
    not_logged: list[str] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)


def reconcile(
    runs: Sequence[Path],
    specs: Sequence[Spec],
    place: Place,
    *,
    rule: alert.Rule | None = None,
    stopped: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = lambda message: print(message, file=sys.stderr, flush=True),
    worker: type = EvaluationWorker,
) -> Report:
    """One pass over all checkpoints of `runs`.

    Args:
        runs: run directories.
        specs: what to measure.
        place: where.
        rule: when to raise an alert, and how.
        stopped: asked before anything new begins.
        note: told about progress.
        worker: class of the workers.

    Raises:
        UsageError: no path is a run directory; nothing was submitted.
        ClusterError, SecurityError: Ray does not start, does not answer or has no room; nothing is lost. All of
            these say in `done` what the pass came to before.
    """
    runs, specs = _distinct(runs), list({spec.digest: spec for spec in specs}.values())
    report = Report()
    try:
        with Keeper() as leases:
            this = _Pass(leases, note, report)
            try:
                jobs = [job for run in runs for job in this.look_through(run, specs)]
                if len(report.refused) == len(runs) and all(e["exit_code"] == EXIT_USAGE for e in report.refused):
                    raise UsageError(" ".join(entry["reason"] for entry in report.refused))
                if jobs:
                    this.run(jobs, place, worker, stopped)
            finally:
                this.close(runs, specs)
            if rule is not None:
                this.raise_alerts(runs, specs, rule)
    except LongspanError as error:
        error.done = asdict(report)
        raise
    except OSError as error:  # of Ray's files, or a disk that is full everywhere
        fault = ClusterError(f"the pass was broken off: {error}. What is finished is kept; the next pass goes on.")
        fault.done = asdict(report)
        raise fault from error
    return report


def _distinct(runs: Sequence[Path]) -> list[Path]:
    """Each run once, whatever paths lead to it."""
    return list({run.resolve(): run for run in reversed(runs)}.values())[::-1]


class _Pass:
    """One pass: what it holds, and what it has to tell."""

    def __init__(self, leases: Keeper, note: Callable[[str], None], report: Report) -> None:
        self.report = report
        self._leases = leases
        self._note = note
        self._sink = Sink()

    def look_through(self, run: Path, specs: Sequence[Spec]) -> list[Job]:
        """Jobs of one run; one that cannot be looked through is reported, and keeps nobody else from its turn."""
        jobs: list[Job] = []
        try:
            if not (run / CHECKPOINTS).is_dir():
                raise UsageError(f"{run} is no run directory: there is no {CHECKPOINTS} folder in it.")
            for spec in specs:
                jobs += self.observe(run / EVALS, spec)
        except (LongspanError, OSError) as error:
            exit_code = error.exit_code if isinstance(error, LongspanError) else EXIT_FAULT
            self.report.refused.append({"run": str(run), "reason": str(error), "exit_code": exit_code})
            self._note(f"{run}: {error}")
        return jobs

    def observe(self, evals: Path, spec: Spec) -> list[Job]:
        """Jobs for the checkpoints of a run without a result, newest first; each is pinned. Logs what is not logged."""
        jobs = []
        await_new_ones(evals.parent / CHECKPOINTS, pin_owner(spec))
        for checkpoint in reversed(committed_folders(evals.parent / CHECKPOINTS)):
            try:
                job = Job(evals, checkpoint, spec, key_of(checkpoint, spec))
            except (LongspanError, OSError) as error:
                if (checkpoint / COMMITTED).is_file():  # else pruned just now
                    self._fail_unkeyed(evals, checkpoint, spec, error)
                continue
            known = failures.read_failure(evals, job.key)
            if read_result(evals / job.key) is not None:
                self._settle(job)
            elif known is not None and known.is_final:
                self.report.failed_before.append(asdict(known))
                unpin(checkpoint, pin_owner(spec))
            elif self._pin(job):
                if is_torn(evals / job.key):
                    self._note(f"{job.name}: its result is damaged, so it is evaluated again")
                job.attempt = known.attempts + 1 if known else 1
                jobs.append(job)
        return jobs

    def run(self, jobs: list[Job], place: Place, worker: type, stopped: Callable[[], bool]) -> None:
        """Evaluate what nobody else does; without Ray if that is nothing."""
        first = next((number for number, job in enumerate(jobs) if self._claim(job)), None)
        if first is None:
            return
        where = f"the Ray cluster at {place.address}" if place.address else "a local Ray cluster"
        shape = place.shape
        self._note(f"up to {len(jobs) - first} evaluations to do on {where}, workers: {shape.workers}")
        queue = Queue(
            jobs[first + 1 :],
            begun=jobs[first],
            claim=self._claim,
            evaluated=self._evaluated,
            failed=self._failed,
            is_lost=self._is_lost,
            stopped=stopped,
        )
        with ray_session(place.address, shape.workers * shape.cpus, shape.workers * shape.gpus) as ray:
            run_pool(ray, worker, shape, queue)

    def close(self, runs: Sequence[Path], specs: Sequence[Spec]) -> None:
        """Wait for MLflow; name the best checkpoints there, of those that were sent."""
        self.report.not_logged = sorted(str(evals / key) for evals, key in self._sink.close())
        for run in runs:
            if not self._sink.is_down(run / EVALS):
                with self._going_on(f"{run}: its best checkpoint is not known"):
                    for spec in specs:
                        follow(run / EVALS, spec, partial(move_best, run))

    def raise_alerts(self, runs: Sequence[Path], specs: Sequence[Spec], rule: alert.Rule) -> None:
        """Raise what alerts there are."""
        for run in runs:
            with self._going_on(f"{run}: alerts are not raised"):
                for spec in specs:
                    self.report.alerts += alert.check(run / EVALS, spec, rule, self._note)

    @contextmanager
    def _going_on(self, otherwise: str) -> Iterator[None]:
        """Do something about one run; if its files stand against it, say so, and go on with the next."""
        try:
            yield
        except (OSError, LookupError, TypeError, ValueError) as error:  # unreadable, or another version's
            self._note(f"{otherwise}: {type(error).__name__}: {error}")

    def _claim(self, job: Job) -> bool:
        """Whether this pass does the job: nobody else is at it or has done it, and the checkpoint is still there."""
        try:
            if not self._leases.take(job.place, job.evals / LEASES / job.key):
                self.report.in_progress_elsewhere.append(str(job.checkpoint))
                return False
            known = failures.read_failure(job.evals, job.key)
            done, refused = read_result(job.evals / job.key) is not None, known is not None and known.is_final
            if done or refused or not self._pin(job):  # somebody was faster
                if done:
                    self._settle(job)
                self._leases.release(job.place)
                return False
        except OSError as error:  # a full disk
            self._failed(job, str(error), EXIT_UNEXPECTED, is_transient(error))
            return False
        self.report.submitted.append(str(job.checkpoint))
        note_event(job.evals, "claimed", job.key, name=job.name)
        return True

    def _evaluated(self, job: Job) -> None:
        """Believe the result's `_SUCCESS` alone."""
        try:
            if read_result(job.evals / job.key) is None:
                self._failed(job, "ended without a result", None, False)
                return
        except OSError as error:
            self._failed(job, str(error), EXIT_UNEXPECTED, is_transient(error))
            return
        note_event(job.evals, "evaluated", job.key, name=job.name)
        self.report.evaluated.append(str(job.checkpoint))
        with suppress(OSError):  # the next pass clears up
            failures.forget_failure(job.evals, job.key)
        self._let_go(job)
        self._sink.add(job.evals, job.key)
        self._note(f"{job.name}: {time.monotonic() - job.started:.0f} s")

    def _failed(self, job: Job, reason: str, exit_code: int | None, transient: bool) -> None:
        failure = failures.note_failure(
            job.evals,
            job.key,
            checkpoint=job.checkpoint,
            spec=job.spec.name,
            reason=reason,
            exit_code=exit_code,
            transient=transient,
        )
        note_event(job.evals, "failed", job.key, name=job.name, reason=reason[:500])
        self.report.failed.append(asdict(failure))
        if failure.is_final:
            self._let_go(job)
        else:
            self._leases.release(job.place)  # stays pinned for the next try
        self._note(f"{job.name}: failed: {reason.strip().splitlines()[-1] if reason.strip() else 'no reason given'}")

    def _fail_unkeyed(self, evals: Path, checkpoint: Path, spec: Spec, error: LongspanError | OSError) -> None:
        """A checkpoint whose key cannot be made: damaged for good, or its corpus is not there at the moment."""
        key = failures.unkeyed(spec.digest, checkpoint.name)
        known = failures.read_failure(evals, key)
        if known is not None and known.is_final:
            self.report.failed_before.append(asdict(known))
            return
        exit_code = error.exit_code if isinstance(error, LongspanError) else EXIT_UNEXPECTED
        damaged = exit_code == EXIT_FAULT
        failure = failures.note_failure(
            evals,
            key,
            checkpoint=checkpoint,
            spec=spec.name,
            reason=str(error),
            exit_code=exit_code,
            transient=not damaged,
        )
        self.report.failed.append(asdict(failure))

    def _settle(self, job: Job) -> None:
        """A result that is there: clear up what a killed process left, and log it if that was not done."""
        self.report.already_evaluated.append(str(job.checkpoint))
        unpin(job.checkpoint, pin_owner(job.spec))
        failures.forget_failure(job.evals, job.key)
        for left in (work_folder(job.evals, job.key), *job.evals.glob(f".tmp-{job.key}-*")):
            shutil.rmtree(left, ignore_errors=True)
        self._sink.add(job.evals, job.key)

    def _pin(self, job: Job) -> bool:
        try:
            pin(job.checkpoint, pin_owner(job.spec))
        except UsageError:  # pruned just now
            return False
        return True

    def _let_go(self, job: Job) -> None:
        with suppress(OSError):  # the next pass clears up
            unpin(job.checkpoint, pin_owner(job.spec))
        self._leases.release(job.place)

    def _is_lost(self, job: Job) -> bool:
        lost = self._leases.is_lost(job.place)
        if lost:
            note_event(job.evals, "lost", job.key, name=job.name)
        return lost


def pin_owner(spec: Spec) -> str:
    """Under which name a checkpoint that waits for this spec is kept from being pruned."""
    return f"eval-{spec.digest}"
