"""`longspan report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from longspan.trainer.report import write_report
from longspan.trainer.report_compare import write_comparison


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write RUN/report.html, or one page that compares several runs; the result says where it is.

    Raises:
        UsageError: a path is no run directory, the runs have nothing in common, or the page cannot be written.
    """
    runs = [Path(name) for name in args.runs]
    out = Path(args.out) if args.out else None
    path = write_report(runs[0], out) if len(runs) == 1 else write_comparison(runs, out)
    if not args.json:
        print(path)
    return {"report": str(path), "bytes": path.stat().st_size}
