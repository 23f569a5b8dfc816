"""`longspan train`."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

from longspan.errors import UsageError
from longspan.trainer import recipes
from longspan.trainer.config import RunConfig, cross_problems


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train as the recipe says; returns the summary of the run.

    Raises:
        UsageError: --fork-data without --resume. ConfigError: the recipe is wrong; lists every problem.
    """
    if args.fork_data and not args.resume:
        raise UsageError("--fork-data changes the data of a run that goes on: give it together with --resume.")
    config = recipes.load(RunConfig, args.config, args.overrides, cross_problems)
    run_dir = Path(args.run_dir or Path("runs") / config.name)

    from longspan.trainer.loop import train  # after the recipe is known to be right: this loads torch and deepspeed

    _log_to_standard_error()
    init_from = Path(args.init_from) if args.init_from else None
    summary = train(config, run_dir, resume=args.resume, init_from=init_from, fork_data=args.fork_data)
    if not args.json and os.environ.get("RANK", "0") == "0":
        from longspan.trainer.progress import print_summary

        print_summary(
            summary,
            [
                f"longspan evaluate {run_dir} --spec configs/evals/quickstart.yaml",
                f"longspan export {run_dir} {run_dir / 'export'}",
                f"longspan report {run_dir}",
            ],
        )
    return summary


def _log_to_standard_error() -> None:
    """Warnings of the rooms, in the form of all messages; on rank 0, since the ranks say the same."""
    logger = logging.getLogger("longspan")
    handler = logging.StreamHandler() if os.environ.get("RANK", "0") == "0" else logging.NullHandler()
    handler.setFormatter(logging.Formatter("longspan: %(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.WARNING)  # whatever a library does to the level of all
    logger.propagate = False
