"""`longspan plan`: parameters, memory and step time of a configuration, without a GPU. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from longspan.errors import ConfigError, Problem, UsageError
from longspan.trainer.config import RunConfig
from longspan.trainer.plan.hardware import load_hardware
from longspan.trainer.plan.layout import read_only
from longspan.trainer.plan.parallel_report import (
    make_parallel_plan,
    parallel_text,
    plot_problems,
    read_counts,
    save_plot,
)
from longspan.trainer.plan.report import make_plan, text
from longspan.trainer.plan.setting import Setting, read_setting

Read = TypeVar("Read")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the plan; returns it as a dictionary, with what `--gpus` asks for under `parallel`.

    Raises:
        ConfigError: recipe, options or the name of the hardware are wrong, or there is no layout for a number of
            GPUs; lists every problem.
    """
    counts, only, (setting, config) = _checked(args)
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


def _checked(
    args: argparse.Namespace,
) -> tuple[list[int], dict[str, tuple[str, ...]], tuple[Setting, RunConfig | None]]:
    """Numbers of GPUs, what layouts may be, and the setting; raises ConfigError with every problem of all options."""
    problems: list[Problem] = []
    unusable: list[UsageError] = []

    def collect(read: Callable[[], Read]) -> Read | None:
        try:
            return read()
        except ConfigError as error:
            problems.extend(error.problems)
        except UsageError as error:
            unusable.append(error)
            problems.append(Problem(args.config, str(error)))
        return None

    setting = collect(lambda: read_setting(args))
    counts = collect(lambda: read_counts(args.gpus)) if args.gpus is not None else []
    only = collect(lambda: read_only(args.only))
    if args.plot is not None:
        problems += plot_problems(Path(args.plot))
    for option in ("plot", "only"):
        if args.gpus is None and getattr(args, option):
            problems.append(Problem(f"--{option}", "is of a plan over several GPUs. Add --gpus N."))
    if unusable and len(problems) == 1:
        raise unusable[0]
    if setting is None or counts is None or only is None or problems:
        raise ConfigError(f"plan of {args.config}", problems, "Mend recipe and options.")
    return counts, only, setting
