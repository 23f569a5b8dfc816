"""`longspan plan`: parameters, memory and step time of a configuration, without a GPU. Imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from longspan.errors import UsageError
from longspan.trainer.plan.hardware import load_hardware
from longspan.trainer.plan.layout import read_only
from longspan.trainer.plan.parallel_report import make_parallel_plan, parallel_text, read_counts, save_plot
from longspan.trainer.plan.report import make_plan, text
from longspan.trainer.plan.setting import read_setting


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the plan; returns it as a dictionary, with what `--gpus` asks for under `parallel`.

    Raises:
        ConfigError, UsageError: recipe, options or the name of the hardware are wrong, or there is no layout for a
            number of GPUs; lists every problem.
    """
    if args.gpus is None and (args.plot or args.only):
        raise UsageError(f"{'--plot' if args.plot else '--only'} is of a plan over several GPUs. Add --gpus N.")
    counts = read_counts(args.gpus) if args.gpus is not None else []
    only = read_only(args.only)
    setting, config = read_setting(args)
    hardware = load_hardware(args.hardware)
    plan = make_plan(setting, hardware)
    if counts:
        plan["parallel"] = make_parallel_plan(
            setting,
            hardware,
            counts,
            lanes=args.lanes if config is None else config.data.lanes,
            state_grad="full" if config is None else config.parallel.state_grad,
            only=only,
        )
    if args.plot:
        title = (
            f"{setting.model.name}, segments of {setting.segment_tokens:,} tokens, {setting.precision}, {hardware.name}"
        )
        save_plot(plan["parallel"], title, Path(args.plot))
    if not args.json:
        print(text(plan))
        if counts:
            print(parallel_text(plan["parallel"]))
    return plan
