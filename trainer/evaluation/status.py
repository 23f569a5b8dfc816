"""How far each (checkpoint, spec) is; reads only. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longspan.errors import LongspanError, UsageError
from longspan.trainer.checkpoint.manifest import committed_folders, step_of
from longspan.trainer.checkpoint.verify import CHECKPOINTS
from longspan.trainer.evaluation import failures, lease
from longspan.trainer.evaluation.folders import EVALS, LEASES, LOGGED, key_of, read_result, read_results
from longspan.trainer.evaluation.specs import Spec


def entries(run: Path, spec: Spec) -> list[dict[str, Any]]:
    """What `longspan evals status` shows of one run and spec, by step; results of pruned checkpoints included.

    Args:
        run: run directory.
        spec: of the evaluations.

    Returns:
        run, step, spec, key (None: it cannot be made), state (evaluated, in progress, failed, to be retried,
        pending), bits_per_byte (carried), logged, attempts, reason (of a failure, or who is at work).

    Raises:
        UsageError: no run directory.
    """
    if not (run / CHECKPOINTS).is_dir():
        raise UsageError(f"{run} is no run directory: there is no {CHECKPOINTS} folder in it.")
    found = {}
    for folder, result in read_results(run / EVALS, spec):
        found[result["key"]] = _entry(run, spec, result["checkpoint"]["step"], result["key"], folder)
    for checkpoint in committed_folders(run / CHECKPOINTS):
        step = step_of(checkpoint) or 0
        try:
            key = key_of(checkpoint, spec)
        except LongspanError as error:
            found[checkpoint.name] = {**_entry(run, spec, step, None, None), "state": "failed", "reason": str(error)}
            continue
        if key not in found:
            found[key] = _entry(run, spec, step, key, None)
    return sorted(found.values(), key=lambda entry: (entry["step"], entry["key"] or ""))


def _entry(run: Path, spec: Spec, step: int, key: str | None, folder: Path | None) -> dict[str, Any]:
    evals = run / EVALS
    failure = failures.read_failure(evals, key) if key else None
    result = read_result(folder) if folder else None
    holder = lease.holder(evals / LEASES / key) if key else None
    state, reason = "pending", ""
    if result is not None:
        state = "evaluated"
    elif holder:
        state, reason = "in progress", holder
    elif failure:
        state, reason = ("failed" if failure.is_final else "to be retried"), failure.reason
    return {
        "run": run.absolute().name,
        "step": step,
        "spec": spec.name,
        "key": key,
        "state": state,
        "bits_per_byte": None if result is None else float(result["carried"]["bits_per_byte"]),
        "logged": folder is not None and (folder / LOGGED).exists(),
        "attempts": failure.attempts if failure else 0,
        "reason": reason,
    }


def retry(run: Path, spec: Spec, step: int | None = None) -> list[dict[str, Any]]:
    """Forget the failures of a run and spec, so that the next pass evaluates those checkpoints again.

    Args:
        run: run directory.
        spec: of the evaluations.
        step: of this checkpoint alone.

    Returns:
        The entries, as they were, that have become pending.

    Raises:
        UsageError: no run directory.
    """
    evals, forgotten = run / EVALS, []
    for entry in entries(run, spec):
        name = f"step-{entry['step']:08d}"
        keys = [entry["key"]] if entry["key"] else []
        if step is None or entry["step"] == step:
            known = [failures.forget_failure(evals, key) for key in (*keys, failures.unkeyed(spec.digest, name))]
            if any(known):
                forgotten.append(entry)
    return forgotten
