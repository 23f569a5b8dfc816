"""A command that runs when a checkpoint is worse than the best one before it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.trainer.evaluation.events import note as note_event
from longspan.trainer.evaluation.folders import read_results
from longspan.trainer.evaluation.specs import Spec

ALERTED = "_ALERTED"
COMMAND_SECONDS = 60.0


@dataclass(frozen=True)
class Rule:
    """When to raise an alert.

    Attributes:
        worse_by: bits per byte (carried) above the best earlier checkpoint of the run.
        command: program and arguments, split as a shell would; no shell runs it. It gets the alert as one JSON object
            on standard input.
    """

    worse_by: float
    command: str


def check(evals: Path, spec: Spec, rule: Rule, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Raise an alert for every checkpoint that asks for one, once each.

    Args:
        evals: RUN/evals.
        spec: whose results to look at.
        rule: when, and what to run.
        note: told about every alert, and about a command that fails: that alert is raised again in the next pass.

    Returns:
        The alerts: run, spec, step, bits_per_byte, best_step, best_bits_per_byte, key.
    """
    raised = []
    best: tuple[float, int] | None = None
    for folder, result in sorted(read_results(evals, spec), key=lambda entry: entry[1]["checkpoint"]["step"]):
        step, value = int(result["checkpoint"]["step"]), float(result["carried"]["bits_per_byte"])
        if best is not None and value > best[0] + rule.worse_by and not (folder / ALERTED).exists():
            alert = {
                "run": evals.parent.name,
                "spec": spec.name,
                "step": step,
                "bits_per_byte": value,
                "best_step": best[1],
                "best_bits_per_byte": best[0],
                "key": result["key"],
            }
            problem = _run(rule.command, alert)
            note(
                f"{alert['run']} step {step}: {value:.4f} bits per byte, {value - best[0]:.4f} worse than at {best[1]}"
                + (f"; the alert command failed, it is tried again: {problem}" if problem else "")
            )
            if not problem:
                (folder / ALERTED).touch()
                note_event(evals, "alerted", result["key"])
                raised.append(alert)
        if best is None or value < best[0]:
            best = (value, step)
    return raised


def _run(command: str, alert: dict[str, Any]) -> str:
    """Why the command did not work; empty if it did."""
    try:
        done = subprocess.run(  # noqa: S603 - the user's own command, no shell
            shlex.split(command),
            input=json.dumps(alert) + "\n",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ,
            timeout=COMMAND_SECONDS,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr.strip()[-300:]}"
