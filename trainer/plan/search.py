"""Layouts of a job on so many GPUs by predicted tokens per second, and what to change where they waste time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from longspan.trainer.plan.hardware import Hardware, MeasuredStep
from longspan.trainer.plan.layout import AXES, Job, Layout, layouts
from longspan.trainer.plan.memory import GIB, plan_memory
from longspan.trainer.plan.predict import Prediction, predict, reference
from longspan.trainer.plan.setting import Setting, runs_by_block
from longspan.trainer.plan.simulate import MAX_RANKS, simulate
from longspan.trainer.plan.work import Workshop

LEAST_EFFICIENCY = 0.8
WORTH_SAYING = 0.02  # of efficiency that a change must gain
CAUSES = {
    "chain": "ranks wait for each other's state",
    "halo": "exchange of the window's keys and values",
    "ring": "keys and values of full attention arrive late",
    "scan": "summaries of linear layers",
    "shared_state": "the state after the segment goes to all ranks",
    "tensor": "sums over tensor-parallel ranks",
    "zero": "gradients and weights over dp x cp",
    "host": "launches are slower than kernels",
    "update": "the update in the host's memory",
}


@dataclass(frozen=True)
class Candidate:
    """A layout with what is predicted of it.

    Attributes:
        layout: how the job is spread.
        prediction: seconds of a step, by cause.
        tokens_per_second: of all GPUs.
        memory_gib: of one GPU at the peak, with allocator slack and context.
        fits: whether the GPU has as much.
    """

    layout: Layout
    prediction: Prediction
    tokens_per_second: float
    memory_gib: float
    fits: bool

    @property
    def waiting(self) -> float:
        """Share of the step in which the device waits for launches; 0 where the device is the slower."""
        return self.prediction.host / self.prediction.seconds

    @property
    def bound_by(self) -> str:
        """Who sets the pace: the device, its waits for other ranks with it, or the host that launches."""
        return "host" if self.prediction.host > 0 else "device"


class Planner:
    """Predictions of one job's layouts on one kind of hardware."""

    def __init__(self, job: Job, hardware: Hardware) -> None:
        """Args: job: what is trained; hardware: measured rates of devices and links."""
        self.job, self.hardware = job, hardware
        self.workshop = Workshop(job, hardware)
        self._memory = lru_cache(maxsize=None)(self._reserved)

    def candidate(self, layout: Layout) -> Candidate:
        """What is predicted of one layout."""
        prediction = predict(layout, self.workshop.work(layout), self.hardware)
        local = layout.local(self.job)
        memory = self._memory(local)
        rate = self.job.tokens / prediction.seconds
        return Candidate(layout, prediction, rate, memory, memory <= self.hardware.memory_gib)

    def ranked(self, gpus: int, only: dict[str, tuple[str, ...]]) -> list[Candidate]:
        """Candidates for `gpus` GPUs: those that fit by tokens per second, then the others by memory.

        A layout that does not fit is tried with the optimizer's state on the host too, unless `only` speaks of that.
        """
        found = [self.candidate(layout) for layout in layouts(self.job, gpus, only)]
        if "offload_optimizer" not in only:
            moved = [one.layout.offloaded(self.job) for one in found if not one.fits]
            found += [self.candidate(layout) for layout in moved if layout]
        return sorted(found, key=lambda one: (not one.fits, -one.tokens_per_second if one.fits else one.memory_gib))

    def efficiency(self, candidate: Candidate) -> float:
        """Tokens per second and GPU over those of one GPU with the same work, whether or not it would fit there."""
        job, alone = reference(self.job, candidate.layout)
        single = Planner(job, self.hardware).candidate(alone)
        return candidate.tokens_per_second / candidate.layout.gpus / single.tokens_per_second

    def simulated(self, candidate: Candidate) -> float | None:
        """Seconds of a step by simulation; None where a sequence has too many ranks for that."""
        if candidate.layout.cp > MAX_RANKS:
            return None
        return simulate(candidate.layout, self.workshop.work(candidate.layout), self.hardware)

    def _reserved(self, setting: Setting) -> float:
        memory = plan_memory(setting)
        return memory.total / GIB * (1 + self.hardware.allocator_slack) + self.hardware.context_gib


def describe(planner: Planner, candidate: Candidate, simulated: bool) -> dict[str, Any]:
    """One candidate as `--json` prints it."""
    efficiency = planner.efficiency(candidate)
    seconds = candidate.prediction.seconds
    return {
        **{axis: getattr(candidate.layout, axis) for axis in AXES},
        "micro_batches": candidate.layout.micro_batches,
        "tokens_per_second": candidate.tokens_per_second,
        "seconds": seconds,
        "simulated_seconds": planner.simulated(candidate) if simulated else None,
        "efficiency": efficiency,
        "memory_gib": candidate.memory_gib,
        "fits": candidate.fits,
        "bound_by": candidate.bound_by,
        "seconds_by_cause": vars(candidate.prediction),
        "warnings": warnings(planner, candidate, efficiency) if simulated else [],
    }


def warnings(planner: Planner, candidate: Candidate, efficiency: float) -> list[str]:
    """Why a layout wastes time and what gains most, if its efficiency is under `LEAST_EFFICIENCY`."""
    lines = []
    if not candidate.fits:
        lines.append(
            f"does not fit: {candidate.memory_gib:.1f} GiB of {planner.hardware.memory_gib:.1f}. "
            "Use more GPUs, shorter segments or a smaller model."
        )
    if candidate.waiting > WORTH_SAYING:
        lines.append(_launch_warning(planner, candidate))
    if efficiency >= LEAST_EFFICIENCY:
        return lines
    lost = {name: getattr(candidate.prediction, name) for name in CAUSES}
    if not candidate.layout.offload_optimizer:
        del lost["update"]  # one GPU has it too
    worst = [
        name for name in sorted(lost, key=lambda name: -lost[name]) if lost[name] > 0.02 * candidate.prediction.seconds
    ]
    causes = "; ".join(
        f"{CAUSES[name]}, {100 * lost[name] / candidate.prediction.seconds:.0f}% of the step" for name in worst[:3]
    )
    causes = causes or "smaller products and slices run slower"
    found = [change for change in _changes(planner, candidate) if change[1] > efficiency + WORTH_SAYING]
    kept = [change for change in found if change[2]][:2] + [change for change in found if not change[2]][:2]
    better = [f"{text} ({value:.2f})" for text, value, _ in kept]
    remedy = (
        f"Better: {', '.join(better)}." if better else "No change of layout, segment or lanes that was tried helps."
    )
    return [*lines, f"efficiency {efficiency:.2f} is under {LEAST_EFFICIENCY}: {causes}. {remedy}"]


def _launch_warning(planner: Planner, candidate: Candidate) -> str:
    """That launches bound a step, and the least change each of lanes, segment and micro-batch that ends it."""
    layout, job = candidate.layout, planner.job
    found = {}
    for factor in (16, 8, 4, 2):  # the smallest that serves stays
        rows, segment = layout.micro_batch_lanes * factor, job.setting.segment_tokens * factor
        wider = dataclasses.replace(layout, micro_batch_lanes=rows)
        longer, more = (Planner(_job(job, *by), planner.hardware) for by in ((factor, 1), (1, factor)))
        options = [
            (f"micro_batch_lanes = {rows} of {more.job.lanes} lanes", more, wider),
            (f"segment_tokens = {segment}", longer, layout),
        ]
        if layout.micro_batches % factor == 0:
            fewer = dataclasses.replace(wider, micro_batches=layout.micro_batches // factor)
            options.append((f"micro_batch_lanes = {rows} of the same lanes", planner, fewer))
        for place, (text, other_planner, other) in enumerate(options):
            changed = other_planner.candidate(other)
            if changed.fits and changed.waiting <= WORTH_SAYING:
                found[place] = f"{text} (x{changed.tokens_per_second / candidate.tokens_per_second:.2f} tokens/s)"
    served = ", or ".join(found[place] for place in sorted(found, reverse=True))
    remedy = f": {served}." if served else ", fewer ranks of cp and tp, or a lower ZeRO stage."
    share = f"the GPU waits {100 * candidate.waiting:.0f}% of the step for launches"
    larger = "larger micro-batches" + ("" if runs_by_block(job.setting.model) else " or longer segments")
    return f"bound by the host: {share}. Take {larger}{remedy}"


def _job(job: Job, longer: int, more: int) -> Job:
    """The same with segments `longer` times as long and `more` times as many lanes."""
    return Job(_segment(job.setting, longer), job.lanes * more, job.state_grad)


def _changes(planner: Planner, candidate: Candidate) -> list[tuple[str, float, bool]]:
    """What could be changed, the efficiency that is predicted then, and whether job and GPUs stay; only what fits."""
    layout, job = candidate.layout, planner.job
    found = [(text, planner, other) for text, other in _other_layouts(job, layout)]
    for factor in (2, 4, 8):
        longer = _job(job, factor, 1)
        text = f"segment_tokens = {longer.setting.segment_tokens}"
        found.append((text, Planner(longer, planner.hardware), layout))
        more = Planner(_job(job, 1, factor), planner.hardware)
        slices = layout.state_slices * factor if layout.cp > 1 and job.has_chain else 1
        rows = layout.micro_batch_lanes * factor
        wider = dataclasses.replace(layout, micro_batch_lanes=rows, state_slices=slices)
        found.append((f"lanes = {more.job.lanes} in micro-batches of {rows}, state_slices = {slices}", more, wider))
        longer_step = dataclasses.replace(layout, micro_batches=layout.micro_batches * factor)
        found.append((f"lanes = {more.job.lanes} in {longer_step.micro_batches} micro-batches", more, longer_step))
    results = []
    for text, other_planner, other in found:
        changed = other_planner.candidate(other)
        if not changed.fits and other.activation_checkpointing != "layer":
            text += ", activation_checkpointing = layer"
            changed = other_planner.candidate(dataclasses.replace(other, activation_checkpointing="layer"))
        if changed.fits:
            same = other_planner is planner and other.gpus == layout.gpus
            results.append((text, other_planner.efficiency(changed), same))
    return sorted(results, key=lambda change: -change[1])


def _other_layouts(job: Job, layout: Layout) -> list[tuple[str, Layout]]:
    """Near layouts of the same job, on as many GPUs or half of them."""
    fields: list[dict[str, int]] = [{"state_slices": layout.state_slices * 2}, {"zero_stage": 1}, {"zero_stage": 2}]
    for axis in ("cp", "tp"):
        size = getattr(layout, axis)
        if size % 2 == 0:
            fields += [{axis: size // 2, "dp": layout.dp * 2}, {axis: size // 2}]
    found = []
    for changed in fields:
        other = dataclasses.replace(layout, **changed)  # type: ignore[arg-type]
        lanes = job.lanes // other.dp
        rows = min(layout.micro_batch_lanes, lanes)
        slices = min(other.state_slices, rows) if other.cp > 1 else 1
        other = dataclasses.replace(
            other, micro_batch_lanes=rows, micro_batches=lanes // max(1, rows), state_slices=slices
        )
        if other != layout and dataclasses.replace(other, offload_optimizer=False) in layouts(job, other.gpus):
            text = ", ".join(f"{name} = {value}" for name, value in changed.items())
            found.append((text if other.gpus == layout.gpus else f"{other.gpus} GPUs with {text}", other))
    return found


def _segment(setting: Setting, factor: int) -> Setting:
    return dataclasses.replace(setting, segment_tokens=setting.segment_tokens * factor)


def predicted_of(measured: MeasuredStep, setting: Setting, hardware: Hardware) -> Candidate:
    """The prediction of a step that was measured, in the layout in which it ran."""
    stage, rows = measured.zero_stage, measured.lanes // measured.dp
    plain = dataclasses.replace(
        setting,
        segment_tokens=measured.segment_tokens,
        rows=rows,
        precision="bf16",
        optimizer=measured.optimizer,
        zero_stage=stage,
    )
    policy = measured.activation_checkpointing
    layout = Layout(measured.dp, measured.cp, measured.tp, stage, measured.state_slices, policy, rows, 1)
    return Planner(Job(plain, measured.lanes), hardware).candidate(layout)


def comparable(setting: Setting, hardware: Hardware) -> list[MeasuredStep]:
    """Measured steps of the same model and segment."""
    model = setting.model
    return [
        step
        for step in hardware.measured
        if (step.model, step.vocab_size, step.segment_tokens) == (model.name, model.vocab_size, setting.segment_tokens)
    ]
