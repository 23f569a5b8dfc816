"""`longspan report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from longspan.trainer.report import write_report


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write RUN/report.html; the result says where it is."""
    path = write_report(Path(args.run))
    if not args.json:
        print(path)
    return {"report": str(path), "bytes": path.stat().st_size}
