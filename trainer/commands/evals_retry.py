"""`longspan evals retry`: let failed evaluations run again in the next pass."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from longspan.trainer.commands.evals_reconcile import read_specs


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Forget failures.

    Returns:
        `retried`: run, step, spec, reason of each.

    Raises:
        ConfigError, UsageError: a spec is wrong, or a path is no run directory.
    """
    specs = read_specs(args)
    from longspan.trainer.evaluation.status import retry

    found = [entry for name in args.runs for spec in specs for entry in retry(Path(name), spec, args.step)]
    retried = [{name: entry[name] for name in ("run", "step", "spec", "reason")} for entry in found]
    if not args.json:
        for entry in retried:
            print(f"{entry['run']} step {entry['step']} {entry['spec']}: failed before with: {entry['reason']}")
        print(f"{len(retried)} evaluations will be tried again by the next `longspan evals reconcile`.")
    return {"retried": retried}
