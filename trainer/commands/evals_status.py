"""`longspan evals status`: what each checkpoint's evaluation has come to."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from longspan.errors import UsageError
from longspan.trainer.commands.evals_reconcile import read_specs

HEADINGS = ("run", "step", "spec", "state", "bits/byte", "logged")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print a table; changes nothing.

    Returns:
        `evaluations`: run, step, spec, key, state, bits_per_byte, logged, attempts, reason; `counts` by state.

    Raises:
        ConfigError, UsageError: a spec is wrong, or a path is no run directory; the other runs are shown.
    """
    specs = read_specs(args)
    from longspan.trainer.evaluation.status import entries

    found: list[dict[str, Any]] = []
    problems = []
    for name in args.runs:
        try:
            found += [entry for spec in specs for entry in entries(Path(name), spec)]
        except UsageError as error:
            problems.append(str(error))
    counts: dict[str, int] = {}
    for entry in found:
        counts[entry["state"]] = counts.get(entry["state"], 0) + 1
    if not args.json:
        print(_table(found))
        print(", ".join(f"{state}: {count}" for state, count in counts.items()) or "No committed checkpoint yet.")
    shown = {"evaluations": found, "counts": counts}
    if problems:
        wrong = UsageError("\n".join(problems))
        wrong.done = shown
        raise wrong
    return shown


def _table(found: list[dict[str, Any]]) -> str:
    rows = [HEADINGS] + [
        (
            entry["run"],
            str(entry["step"]),
            entry["spec"],
            entry["state"],
            "" if entry["bits_per_byte"] is None else f"{entry['bits_per_byte']:.4f}",
            "yes" if entry["logged"] else "no",
        )
        for entry in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = []
    for row, entry in zip(rows, [None, *found], strict=True):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        reason = entry["reason"].strip().splitlines() if entry and entry["reason"] else []
        lines.append(f"{line}  {reason[0]}" if reason else line)
    return "\n".join(lines)
