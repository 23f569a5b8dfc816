"""Layouts of a training step over many GPUs: which there are, and why others are not possible. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from longspan.errors import ConfigError, Problem
from longspan.modeling.config import ActivationCheckpointing, BlockRecurrentConfig, FullAttentionConfig
from longspan.trainer.plan.setting import Setting

POLICIES: tuple[ActivationCheckpointing, ...] = get_args(ActivationCheckpointing)
MAX_ROWS = 64  # of a micro-batch: more rows make no kernel faster
AXES = (
    "dp",
    "cp",
    "tp",
    "zero_stage",
    "state_slices",
    "activation_checkpointing",
    "micro_batch_lanes",
    "offload_optimizer",
)
YES_OR_NO = ("true", "false")


@dataclass(frozen=True)
class Job:
    """What is trained, whatever the layout.

    Attributes:
        setting: model, segment, types and optimizer; its rows, micro-batches and stage are one GPU's.
        lanes: sequences of one optimizer step over all GPUs.
        state_grad: "full" or "truncate", as in the training recipe.
    """

    setting: Setting
    lanes: int
    state_grad: str = "full"

    @property
    def tokens(self) -> int:
        """Of one optimizer step."""
        return self.lanes * self.setting.segment_tokens

    @property
    def has_chain(self) -> bool:
        """Whether a state goes from rank to rank of a sequence, one after another."""
        model = self.setting.model
        layers = model.expanded_layers()
        trained = any(isinstance(layer, BlockRecurrentConfig) and layer.update == "trained" for layer in layers)
        return trained or model.feedback or model.memory is not None


@dataclass(frozen=True)
class Layout:
    """One way to spread a job.

    Attributes:
        dp, cp, tp: ranks over which lanes, segments and layers are divided.
        zero_stage: what ZeRO divides over dp x cp.
        state_slices: parts in which a micro-batch's state is handed on.
        activation_checkpointing: what the backward pass computes again.
        micro_batch_lanes: rows that a rank runs at once.
        micro_batches: of a step, on each rank.
        offload_optimizer: fp32 weights and optimizer state are in the host's memory.
    """

    dp: int
    cp: int
    tp: int
    zero_stage: int
    state_slices: int
    activation_checkpointing: ActivationCheckpointing
    micro_batch_lanes: int
    micro_batches: int
    offload_optimizer: bool = False

    @property
    def gpus(self) -> int:
        """dp x cp x tp."""
        return self.dp * self.cp * self.tp

    def local(self, job: Job) -> Setting:
        """One rank's micro-batch: its share of the segment, its part of every layer."""
        return dataclasses.replace(
            job.setting,
            rows=self.micro_batch_lanes,
            segment_tokens=job.setting.segment_tokens // self.cp,
            micro_batches=self.micro_batches,
            checkpointing=self.activation_checkpointing,
            zero_stage=self.zero_stage,
            tp=self.tp,
            shards=self.dp * self.cp,
            cp=self.cp,
            offload_optimizer=self.offload_optimizer,
            state_slices=self.state_slices,
        )

    def offloaded(self, job: Job) -> Layout | None:
        """The same with the optimizer's state in the host's memory; None where nothing is divided that could move."""
        if self.zero_stage == 0 or job.setting.optimizer == "none":
            return None
        return dataclasses.replace(self, offload_optimizer=True)


def layouts(job: Job, gpus: int, only: dict[str, tuple[str, ...]] | None = None) -> list[Layout]:
    """Every layout of `gpus` GPUs that the trainer accepts; with the optimizer's state on the host only if asked for.

    Args:
        job: what is trained.
        gpus: how many.
        only: axis -> values as text; layouts with others are left out.
    """
    only = only or {}

    def wanted(axis: str, value: object) -> bool:
        return axis not in only or str(value).lower() in only[axis]

    found = []
    for dp, cp, tp in _meshes(job, gpus):
        if not all(wanted(axis, value) for axis, value in (("dp", dp), ("cp", cp), ("tp", tp))):
            continue
        for rows in _rows(job, dp):
            for stage in _stages(job, dp * cp):
                for slices in _slices(job, cp, rows):
                    for policy in POLICIES:
                        layout = Layout(dp, cp, tp, stage, slices, policy, rows, job.lanes // dp // rows)
                        forms = [layout, layout.offloaded(job)] if "offload_optimizer" in only else [layout]
                        found += [
                            form for form in forms if form and all(wanted(axis, getattr(form, axis)) for axis in only)
                        ]
    return found


def _meshes(job: Job, gpus: int) -> Iterator[tuple[int, int, int]]:
    for tp in divisors(gpus):
        for cp in divisors(gpus // tp):
            dp = gpus // tp // cp
            if job.lanes % dp == 0 and not axis_problems(job, cp, tp):
                yield dp, cp, tp


def _rows(job: Job, dp: int) -> list[int]:
    """Rows of a micro-batch: powers of two, and what the recipe says, that divide a replica's lanes."""
    lanes = job.lanes // dp
    powers = {2**power for power in range(MAX_ROWS.bit_length())}
    return sorted(rows for rows in powers | {job.setting.rows} if lanes % rows == 0 and rows <= MAX_ROWS)


def _stages(job: Job, shards: int) -> list[int]:
    setting = job.setting
    if setting.optimizer in ("none", "adafactor"):
        return [0]
    lowest = 1 if setting.precision == "bf16" else 0
    return [lowest] if shards == 1 else list(range(lowest, 4))


def _slices(job: Job, cp: int, rows: int) -> list[int]:
    if cp == 1 or not job.has_chain:
        return [1]
    return [number for number in divisors(rows) if number & (number - 1) == 0]


def divisors(number: int) -> list[int]:
    """All of them, rising."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def axis_problems(job: Job, cp: int, tp: int) -> list[Problem]:
    """Why a model cannot be divided over so many ranks; the trainer's own rules, which a test compares."""
    setting, model = job.setting, job.setting.model
    problems = [
        Problem(f"model.{name} = {size}", f"does not divide over tp = {tp}") for name, size in model.indivisible(tp)
    ]
    if tp > 1 and setting.optimizer == "adafactor":
        problems.append(Problem(f"tp = {tp}", "optimizer adafactor takes means over whole parameters"))
    share = setting.segment_tokens / cp
    if share % model.quantum:
        problems.append(
            Problem(
                f"cp = {cp}", f"{setting.segment_tokens} tokens are not {cp} shares of whole blocks of {model.quantum}"
            )
        )
    if cp > 1 and job.state_grad == "truncate" and job.has_chain and share < 2 * model.window_tokens:
        problems.append(Problem(f"cp = {cp}", "with state_grad: truncate a share needs two blocks"))
    full = any(isinstance(layer, FullAttentionConfig) for layer in model.layers)
    if full and model.dropout and cp * tp > 1:
        problems.append(Problem(f"model.dropout = {model.dropout}", "full attention over several ranks has no dropout"))
    return problems


def gpu_problems(job: Job, counts: list[int], only: dict[str, tuple[str, ...]]) -> list[Problem]:
    """For each number of GPUs without any layout, why, and the nearest numbers that have one."""
    problems = []
    for gpus in counts:
        if layouts(job, gpus, only):
            continue
        others = [count for count in range(1, 1025) if _possible(job, count, only)]
        below, above = [n for n in others if n < gpus][-1:], [n for n in others if n > gpus][:1]
        nearest = " or ".join(str(n) for n in below + above)
        remedy = f"Nearest: {nearest}." if nearest else "No number up to 1024 has any."
        problems.append(Problem(f"gpus = {gpus}", f"no layout: {_limits(job, only)}. {remedy}"))
    return problems


def _possible(job: Job, gpus: int, only: dict[str, tuple[str, ...]]) -> bool:
    if only:
        return bool(layouts(job, gpus, only))
    return next(_meshes(job, gpus), None) is not None


def _limits(job: Job, only: dict[str, tuple[str, ...]]) -> str:
    """What dp, cp and tp may be."""
    setting = job.setting
    blocks = setting.segment_tokens // setting.model.quantum
    largest = max(tp for tp in divisors(setting.model.num_heads) if not axis_problems(job, 1, tp))
    restricted = "".join(f"; --only {axis}={','.join(values)}" for axis, values in only.items())
    return (
        f"dp must divide {job.lanes} lanes, cp the {blocks} blocks of a segment, and tp heads, hidden units and "
        f"vocabulary (at most {largest}){restricted}"
    )


def read_only(texts: list[str]) -> dict[str, tuple[str, ...]]:
    """`--only AXIS=VALUE,...` as a mapping; an axis may come several times.

    Raises:
        ConfigError: no such axis, or a value that it cannot have; lists every problem.
    """
    found: dict[str, tuple[str, ...]] = {}
    problems = []
    for text in texts:
        axis, equals, values = text.partition("=")
        if axis not in AXES or not equals:
            near = difflib.get_close_matches(axis, AXES, n=1, cutoff=0.6) if axis not in AXES else []
            hint = f" Did you mean {near[0]}?" if near else ""
            problems.append(Problem(f"--only {text}", f"write it as AXIS=VALUE,...; axes: {', '.join(AXES)}.{hint}"))
            continue
        for value in values.split(","):
            known = _axis_value(axis, value)
            if known is None:
                problems.append(Problem(f"--only {axis}={value}", f"allowed: {_allowed(axis)}."))
            else:
                found[axis] = (*found.get(axis, ()), known)
    if problems:
        raise ConfigError("plan", problems, "Mend the options.")
    return found


_NAMED = {"activation_checkpointing": POLICIES, "offload_optimizer": YES_OR_NO, "zero_stage": ("0", "1", "2", "3")}


def _axis_value(axis: str, text: str) -> str | None:
    """The value as `layouts` compares it; None if the axis cannot have it."""
    if axis in _NAMED:
        return text if text in _NAMED[axis] else None
    return str(int(text)) if text.isascii() and text.isdecimal() and int(text) > 0 else None


def _allowed(axis: str) -> str:
    return ", ".join(_NAMED.get(axis, ("whole numbers from 1 on",)))
