"""`longspan bench data`: measure readers, seeking and encoding here, beside their peers."""

from __future__ import annotations

import argparse
import json
from typing import Any

from longspan.errors import ClusterError
from longspan.trainer.bench.data.settings import read_data_settings
from longspan.trainer.commands.bench import command_line


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table unless `args.json`, write what was asked for; the result is `Result.as_dict`.

    Raises:
        ConfigError: options are wrong; lists every problem. UsageError, DataError: the corpus cannot be read.
        ClusterError: something of our own did not run; everything else was measured, printed and written before.
    """
    settings = read_data_settings(args)  # what is wrong is said before torch is loaded
    from longspan.trainer.bench.data import table
    from longspan.trainer.bench.data.measure import measure

    result = measure(settings, command_line(args))
    if not args.json:
        table.print_result(result)
    if settings.report is not None:
        table.append_report(result, settings.report)
    if result.failures:
        if args.json:
            print(json.dumps(result.as_dict(), allow_nan=False), flush=True)
        failed = "; ".join(f"{row.case}: {row.note}" for row in result.failures)
        raise ClusterError(f"{len(result.failures)} of our own rows failed: {failed}. The traceback is above.")
    return result.as_dict()
