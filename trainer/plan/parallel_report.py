"""The plan of many GPUs as a dictionary, as a table for people and as a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from longspan.errors import ConfigError, Problem, UsageError
from longspan.trainer.plan.hardware import Hardware
from longspan.trainer.plan.layout import Job, gpu_problems
from longspan.trainer.plan.report import width_notes
from longspan.trainer.plan.search import Planner, comparable, describe, predicted_of
from longspan.trainer.plan.setting import Setting

MAX_GPUS = 1024
SHOWN = 8  # layouts of a number of GPUs
ASSUMED = (
    "all ranks have the same work; hosts are full and follow one another in the order tensor, context, data parallel",
    "gradients are summed after the backward pass at stages 0 to 2, beside it at stage 3, as DeepSpeed is configured",
    "neighbours wait for each other at every halo, all ranks of a sequence where the state after a segment is shared",
    "recomputation repeats messages of rings and of tensor-parallel ranks; whatever else came was kept",
    "memory of several ranks was compared on two GPUs alone (ZeRO 1 to 3, tp 2, cp 2)",
    "launches of several ranks: fitted to steps of an engine on two GPUs; a small model in the trainer took twice that",
)


def read_counts(text: str) -> list[int]:
    """Numbers of GPUs: `8`, `1,2,8`, or `1..1024` for 1, 2, 4, ..., 1024.

    Raises:
        ConfigError: not such a list, numbers out of 1 to 1024, or a range that falls; lists every problem.
    """
    counts: list[int] = []
    problems = []
    for item in text.split(","):
        first, dots, last = item.partition("..")
        ends = [first, last] if dots else [first]
        if not all(end.isdecimal() and 1 <= int(end) <= MAX_GPUS for end in ends):
            problems.append(Problem(f"gpus = {item!r}", f"not a number of 1 to {MAX_GPUS}, nor a range like 8..256."))
            continue
        if int(ends[-1]) < int(first):
            problems.append(Problem(f"gpus = {item!r}", f"a range rises. Write {last}..{first}."))
            continue
        number = int(first)
        counts.append(number)
        while dots and number < int(last):
            number = min(2 * number, int(last))
            counts.append(number)
    if problems:
        raise ConfigError("plan", problems, "Mend --gpus.")
    return sorted(set(counts))


def make_parallel_plan(
    setting: Setting,
    hardware: Hardware,
    counts: list[int],
    *,
    lanes: int | None,
    state_grad: str,
    only: dict[str, tuple[str, ...]],
) -> dict[str, Any]:
    """What `--gpus` adds to the plan under `parallel`.

    Args:
        setting: of one device, as the recipe has it.
        hardware: measured rates.
        counts: numbers of GPUs.
        lanes: of a step over all GPUs; None: `setting.rows` for each GPU.
        state_grad: "full" or "truncate".
        only: axis -> values that layouts may have.

    Raises:
        ConfigError: some number of GPUs has no layout; says why for each.
    """
    jobs = {gpus: Job(setting, lanes or setting.rows * gpus, state_grad) for gpus in counts}
    problems = [problem for gpus, job in jobs.items() for problem in gpu_problems(job, [gpus], only)]
    if problems:
        advice = "Change --gpus, --only, or the recipe's lanes and segment." if lanes else "Change --gpus or --only."
        raise ConfigError("plan over several GPUs", problems, advice)
    points = []
    for gpus, job in jobs.items():
        planner = Planner(job, hardware)
        ranked = planner.ranked(gpus, only)
        points.append(
            {
                "gpus": gpus,
                "lanes": job.lanes,
                "layouts_considered": len(ranked),
                "layouts_that_fit": sum(one.fits for one in ranked),
                "layouts": [describe(planner, one, simulated=index == 0) for index, one in enumerate(ranked[:SHOWN])],
            }
        )
    return {
        "segment_tokens": setting.segment_tokens,
        "state_grad": state_grad,
        "links": hardware.links.model_dump(),
        "points": points,
        "measured": [_measured(setting, hardware, step) for step in comparable(setting, hardware)],
        "assumptions": [
            *ASSUMED,
            *width_notes(setting),
            f"not measured yet of the links: {hardware.links.estimate}",
            _offload_note(hardware),
        ],
    }


def _offload_note(hardware: Hardware) -> str:
    return f"offloading the optimizer, tried where a layout does not fit otherwise: {hardware.offload.source}"


def _measured(setting: Setting, hardware: Hardware, step: Any) -> dict[str, Any]:
    predicted = predicted_of(step, setting, hardware)
    tokens = step.lanes * step.segment_tokens
    return {
        **step.model_dump(),
        "gpus": step.gpus,
        "tokens_per_second": tokens / step.seconds,
        "predicted_seconds": predicted.prediction.seconds,
        "predicted_over_measured": predicted.prediction.seconds / step.seconds,
    }


def parallel_text(plan: dict[str, Any]) -> str:
    """The plan of many GPUs as lines for a terminal: the best layouts of few numbers, the best one of many."""
    points = plan["points"]
    shown = {1: SHOWN, 2: 4, 3: 3}.get(len(points), 1)
    header = (
        f"{'GPUs':>5}{'dp':>5}{'cp':>4}{'tp':>4}{'ZeRO':>5}{'slices':>7}{'again':>7}{'offl.':>6}{'rows':>5}{'micro':>6}"
        f"{'tokens/s':>14}{'step ms':>10}{'simulated':>10}{'eff.':>6}{'GiB':>7}  bound by"
    )
    lines = ["", f"Layouts by predicted tokens/s, segments of {plan['segment_tokens']:,} tokens", header]
    notes = []
    for point in points:
        for layout in point["layouts"][:shown]:
            simulated = layout["simulated_seconds"]
            lines.append(
                f"{point['gpus']:>5}{layout['dp']:>5}{layout['cp']:>4}{layout['tp']:>4}{layout['zero_stage']:>5}"
                f"{layout['state_slices']:>7}{layout['activation_checkpointing']:>7}"
                f"{'yes' if layout['offload_optimizer'] else 'no':>6}{layout['micro_batch_lanes']:>5}"
                f"{layout['micro_batches']:>6}{layout['tokens_per_second']:>14,.0f}{1e3 * layout['seconds']:>10.1f}"
                f"{f'{1e3 * simulated:.1f}' if simulated is not None else '':>10}{layout['efficiency']:>6.2f}"
                f"{layout['memory_gib']:>7.1f}  {layout['bound_by']}{'' if layout['fits'] else ', does not fit'}"
            )
            notes += [f"  {_gpus(point)}: {warning}" for warning in layout["warnings"]]
    if notes:
        lines += ["", "Warnings:", *notes]
    if plan["measured"]:
        lines += ["", "Measured steps of this model and segment:"]
    for step in plan["measured"]:
        lines.append(
            f"  {step['date']}, {_gpus(step)} (dp {step['dp']}, cp {step['cp']}, tp {step['tp']}, slices "
            f"{step['state_slices']}{_engine(step)}), {step['lanes']} lanes: {1e3 * step['seconds']:.0f} ms, predicted "
            f"{1e3 * step['predicted_seconds']:.0f} ({step['predicted_over_measured'] - 1:+.1%}"
            f"{', fitted to it' if step['fitted'] else ''})"
        )
    return "\n".join([*lines, "", "Assumed over several GPUs:", *(f"  {line}" for line in plan["assumptions"])])


def _gpus(of: dict[str, Any]) -> str:
    return f"{of['gpus']} GPU{'s' if of['gpus'] > 1 else ''}"


def _engine(step: dict[str, Any]) -> str:
    return "" if step["optimizer"] == "none" else f", {step['optimizer']} with ZeRO {step['zero_stage']}"


def plot_problems(path: Path) -> list[Problem]:
    """Why no picture can be written there; seen before a plan is computed."""
    where = f"--plot {path}"
    if path.suffix.lower() != ".png":
        return [
            Problem(where, f"the picture is a PNG. Name it {path.with_suffix('.png') if path.name else 'plan.png'}.")
        ]
    if path.is_dir():
        return [Problem(where, f"is a folder. Name a file in it, e.g. {path / 'plan.png'}.")]
    if not path.parent.is_dir():
        return [Problem(where, f"there is no folder {path.parent}. Make it, or choose another file.")]
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return [Problem(where, "no permission to write there. Choose another file.")]
    return []


def save_plot(plan: dict[str, Any], title: str, path: Path) -> None:
    """Tokens per second over GPUs: prediction, simulation, and what was measured, into a PNG file.

    Raises:
        UsageError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.add_subplot()
    points = plan["points"]
    gpus = [point["gpus"] for point in points]
    best = [point["layouts"][0] for point in points]
    rates = [layout["tokens_per_second"] for layout in best]
    ideal = [layout["tokens_per_second"] / layout["efficiency"] for layout in best]
    axes.plot(gpus, ideal, ":", color="0.55", label="GPUs x one GPU with the same work")
    axes.plot(gpus, rates, "-", color="#1f5fa8", label="predicted, best layout")
    for point, layout in zip(points, best, strict=True):
        axes.annotate(
            f"dp{layout['dp']} cp{layout['cp']} tp{layout['tp']}",
            (point["gpus"], layout["tokens_per_second"]),
            textcoords="offset points",
            xytext=(4, -10),
            fontsize=7,
        )
    simulated = [
        (count, layout["tokens_per_second"] * layout["seconds"] / layout["simulated_seconds"])
        for count, layout in zip(gpus, best, strict=True)
        if layout["simulated_seconds"]
    ]
    if simulated:
        axes.plot(*zip(*simulated, strict=True), "o", color="#1b7f4b", fillstyle="none", label="simulated")
    measured = plan["measured"]
    if measured:
        where = [step["gpus"] for step in measured]
        found = [step["tokens_per_second"] for step in measured]
        guess = [rate / step["predicted_over_measured"] for rate, step in zip(found, measured, strict=True)]
        dates = ", ".join(sorted({f"{step['date']}, {step['device']}" for step in measured}))
        axes.plot(where, found, "*", color="#c0392b", markersize=11, label=f"measured ({dates})")
        fitted = ", host rates fitted to some" if any(step["fitted"] for step in measured) else ""
        axes.plot(where, guess, "x", color="#8a6d3b", label=f"predicted for the measured layouts{fitted}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    ticks = sorted({*gpus, *(step["gpus"] for step in measured)})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.minorticks_off()
    axes.set_xlabel("GPUs")
    axes.set_ylabel("tokens/s")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7)
    FigureCanvasAgg(figure)
    try:
        figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
    except OSError as error:
        raise UsageError(f"cannot write the picture to {path}: {error.strerror}. Choose another --plot.") from None
