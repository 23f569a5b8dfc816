"""`longspan plan`: parameters, memory and step time of a configuration, without a GPU. Imports no torch."""

from __future__ import annotations

import argparse
from typing import Any

from longspan.trainer.plan.hardware import load_hardware
from longspan.trainer.plan.report import make_plan, text
from longspan.trainer.plan.setting import read_setting


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the plan; returns it as a dictionary.

    Raises:
        ConfigError, UsageError: recipe, options or the name of the hardware are wrong; lists every problem.
    """
    setting = read_setting(args)
    plan = make_plan(setting, load_hardware(args.hardware))
    if not args.json:
        print(text(plan))
    return plan
