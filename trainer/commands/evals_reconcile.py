"""`longspan evals reconcile`: evaluate every committed checkpoint that has no result yet, once or again and again."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longspan.errors import EXIT_USAGE, ClusterError, LongspanError, Stopped, UsageError
from longspan.trainer.evaluation.specs import Spec, load_spec

CORES_PER_WORKER = 4
_UNITS = {"s": 1, "m": 60, "h": 3600}
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One pass over all runs, or one every so often until a signal comes.

    Returns:
        What the last pass saw and did, as `trainer.evaluation.reconcile.Report`.

    Raises:
        ConfigError, UsageError: a spec or an option is wrong, or a path is no run directory; the other runs are done.
        ClusterError: Ray does not start, or (with --once) an evaluation failed in this pass, or a run cannot be read;
            the others are done.
        Stopped: a signal came in the middle of a pass; what was begun is kept.
    """
    specs = read_specs(args)
    seconds = None if args.once else interval_seconds(args.every)
    from longspan.trainer.evaluation.alert import Rule

    if (args.alert_worse_by is None) != (args.alert_command is None):
        raise UsageError("--alert-worse-by and --alert-command belong together: give both, or none.")
    rule = None if args.alert_command is None else Rule(args.alert_worse_by, args.alert_command)
    with _stop_on_signals() as stop:
        while True:
            report = _pass(args, specs, rule, stop, keep_going=seconds is not None)
            if seconds is None or stop.wait(seconds):
                return report


def _pass(
    args: argparse.Namespace, specs: list[Spec], rule: Any, stop: threading.Event, keep_going: bool
) -> dict[str, Any]:
    from longspan.trainer.evaluation.reconcile import reconcile

    runs = [Path(name) for name in args.runs]
    try:
        report = reconcile(runs, specs, _place(args), rule=rule, stopped=stop.is_set)
    except LongspanError as error:
        if not keep_going or isinstance(error, UsageError):
            raise
        print(f"longspan: {error} The next pass tries again.", file=sys.stderr, flush=True)
        return {**error.done, "error": str(error)}
    shown = dataclasses.asdict(report)
    if not args.json:
        print(_text(shown), flush=True)
    problem: LongspanError | None = _problem(shown)
    if stop.is_set() and not keep_going:
        problem = Stopped("stopped by a signal; finished shards are kept, the next pass goes on with them.")
    if problem is not None and not keep_going:
        problem.done = shown
        raise problem
    if problem is not None:
        print(f"longspan: {problem}", file=sys.stderr, flush=True)
    return shown


def _problem(report: dict[str, list[dict[str, Any]]]) -> LongspanError | None:
    """What went wrong in a pass that did everything else; None for nothing."""
    failed, refused, parts = report["failed"], report["refused"], []
    if failed:
        reasons = "\n".join(f"  {entry['checkpoint']}: {entry['reason'].strip()}" for entry in failed)
        parts.append(
            f"{len(failed)} evaluations failed, noted in RUN/evals/failed. `longspan evals status` lists them; "
            f"mend the cause, then `longspan evals retry`:\n{reasons}"
        )
    if refused:
        reasons = "\n".join(f"  {entry['run']}: {entry['reason']}" for entry in refused)
        parts.append(
            f"{len(refused)} runs were left out; what could be done for the others is done. Mend them or name "
            f"run directories only:\n{reasons}"
        )
    usage = not failed and all(entry["exit_code"] == EXIT_USAGE for entry in refused)
    return (UsageError if usage else ClusterError)("\n".join(parts)) if parts else None


def read_specs(args: argparse.Namespace) -> list[Spec]:
    """The specs of `--spec`, with the overrides on each."""
    return [load_spec(path, args.overrides) for path in args.spec]


def interval_seconds(text: str) -> int:
    """`90s`, `10m` or `2h` as seconds.

    Raises:
        UsageError: written differently.
    """
    match = re.fullmatch(r"([1-9]\d*)([smh])", text)
    if match is None:
        raise UsageError(f"--every {text}: write a number and s, m or h, like 10m.")
    return int(match[1]) * _UNITS[match[2]]


def _place(args: argparse.Namespace) -> Any:
    """Where evaluations run: one worker a GPU, or one for every few cores.

    Raises:
        UsageError: not a number of workers.
    """
    from longspan.cluster.actor_pool import Shape
    from longspan.trainer.evaluation.reconcile import Place

    if args.workers is not None and args.workers < 1:
        raise UsageError(f"--workers {args.workers}: use 1 or more.")
    if args.address is not None:
        gpus = args.gpus_per_worker if args.gpus_per_worker is not None else 0
        return Place(args.address, Shape(args.workers or 1, gpus=gpus))
    import torch

    gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    each = args.gpus_per_worker if args.gpus_per_worker is not None else min(gpus, 1)
    workers = args.workers or (gpus // each if each else max(1, cores // CORES_PER_WORKER))
    return Place(None, Shape(workers, cpus=max(1, cores // workers), gpus=each))


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """Set by SIGTERM or SIGINT; a second one ends the process at once. What was done at them before is done after."""
    stop = threading.Event()

    def stopping(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stopping) for number in _STOP_SIGNALS} if in_main else {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _text(report: dict[str, list[Any]]) -> str:
    if not report["submitted"]:
        head = "Nothing to submit: every committed checkpoint has its result, its failure, or somebody at work on it."
    else:
        head = f"Submitted {len(report['submitted'])}, evaluated {len(report['evaluated'])}."
    counts = ", ".join(
        f"{name.replace('_', ' ')}: {len(report[name])}"
        for name in (
            "already_evaluated",
            "in_progress_elsewhere",
            "failed",
            "failed_before",
            "not_logged",
            "alerts",
            "refused",
        )
    )
    return f"{head}\n  {counts}"
