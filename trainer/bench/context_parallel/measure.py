"""Starts the ranks of `longspan bench context-parallel` and makes rows of what they found."""

from __future__ import annotations

import statistics
import tempfile

import torch

from longspan.errors import UsageError
from longspan.trainer.bench.ceilings import Ceilings
from longspan.trainer.bench.contender import Session
from longspan.trainer.bench.context_parallel.messages import Measurement, Verdict
from longspan.trainer.bench.context_parallel.processes import Story, run_ranks
from longspan.trainer.bench.context_parallel.settings import ContextParallelSettings
from longspan.trainer.bench.context_parallel.worker import PARTS, live
from longspan.trainer.bench.floors import floor_ms
from longspan.trainer.bench.measured import Measured
from longspan.trainer.bench.result import OURS, Row


def measure(settings: ContextParallelSettings, session: Session) -> Measured:
    """Every part over all ranks; a rank that ends early leaves the rows before, and one that says why.

    Raises:
        UsageError: this machine has fewer GPUs than there are ranks.
    """
    kind = session.device.type
    if kind == "cuda" and torch.cuda.device_count() < settings.nproc:
        raise UsageError(
            f"--nproc = {settings.nproc}: each rank needs a GPU of its own, and this machine has "
            f"{torch.cuda.device_count()}. Use fewer ranks, two or more."
        )
    with tempfile.TemporaryDirectory(prefix="longspan-bench-") as folder:
        story = run_ranks(live, settings.nproc, settings, kind, folder)
    rows = table(story, session.ceilings)
    ms = {row.case: row.ms for row in rows if row.ms is not None}
    ratios = [ratio for part in settings.parts for ratio in PARTS[part].ratios(settings, ms)]
    notes = [
        f"{settings.nproc} ranks over {'NCCL' if kind == 'cuda' else 'gloo'}, activation checkpointing by layer. All "
        "ranks begin a call together, and its time is the slowest rank's. Tokens/s are of all ranks; operations, "
        "memory and floors of the busiest. A step includes one sum of all gradients over the ranks.",
        "Asked of two GPUs: a step at least 1.85 times as fast as on one; ring attention at most 1.10 times, exchange "
        "of states at most 0.05 times the computation.",
    ]
    return Measured(rows, ratios, notes)


def table(story: Story, ceilings: Ceilings) -> list[Row]:
    """A row of each verdict, of each case that all ranks measured, and of what ended the ranks early."""
    rows = []
    for told in story.told[0]:
        if isinstance(told, Verdict):
            rows.append(Row(OURS, told.case, "measured" if told.passed else "failed", note=told.note))
            continue
        everyone = [one for of_rank in story.told for one in of_rank if one.case == told.case]
        if len(everyone) == len(story.told):
            rows.append(_row(everyone, ceilings))
    if story.failure is not None:
        case, reason = story.failure
        rows.append(Row(OURS, case, "failed", note=f"{reason}; what comes after was not measured"))
    return rows


def _row(found: list[Measurement], ceilings: Ceilings) -> Row:
    """One case: of each call the slowest rank's time, then the median of these."""
    about = found[0]
    times = [max(of_call) for of_call in zip(*(one.times_ms for one in found), strict=True)]
    low, median, high = (times[0],) * 3 if len(times) == 1 else statistics.quantiles(times, n=4, method="inclusive")
    flops = sum(cost.flops for cost in about.costs)
    peaks = [one.peak_gib for one in found if one.peak_gib is not None]
    return Row(
        contender=OURS,
        case=about.case,
        status="measured",
        ms=median,
        low_ms=low,
        high_ms=high,
        host_ms=max(statistics.fmean(one.hosts_ms) for one in found),
        repeats=len(times),
        first_call_seconds=max(one.first_call_seconds for one in found),
        tokens_per_second=about.tokens / (median * 1e-3),
        matrix_share=flops / (median * 1e-3) / ceilings.matrix_flops if about.costs else None,
        peak_gib=max(peaks) if peaks else None,
        floor_ms=floor_ms(about.costs, ceilings) if about.costs else None,
        flops=flops if about.costs else None,
        num_bytes=sum(cost.num_bytes for cost in about.costs) if about.costs else None,
        parameters=about.parameters,
    )
