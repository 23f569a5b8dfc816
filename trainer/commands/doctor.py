"""`longspan doctor`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from longspan.errors import ClusterError
from longspan.trainer.doctor import Row, as_dicts, examine

MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Examine this machine; the result has one row a check and the number of failed ones.

    Raises:
        ClusterError: something that is needed is broken (exit 70); the table is printed before.
    """
    rows = examine(Path.cwd())
    failed = [row.name for row in rows if row.status == "fail"]
    if not args.json or failed:
        print(table(rows), file=sys.stderr if args.json else sys.stdout)
    if failed:
        fixes = "; ".join(f"{row.name}: {row.found}. {row.fix}" for row in rows if row.status == "fail")
        raise ClusterError(f"{len(failed)} needed thing(s) broken on this machine. {fixes}")
    return {"rows": as_dicts(rows), "failed": len(failed), "warned": sum(row.status == "warn" for row in rows)}


def table(rows: list[Row]) -> str:
    """The rows as aligned text, each fix on a line of its own."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{MARKS[row.status]}  {row.name:<{width}}  {row.found}")
        if row.fix:
            lines.append(f"      {'':<{width}}  -> {row.fix}")
    return "\n".join(lines)
