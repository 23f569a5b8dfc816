"""What is planned: a model and how it is trained, from a training recipe or from a bare model recipe and options."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from longspan.errors import Problem, UsageError
from longspan.modeling.config import ActivationCheckpointing, ModelConfig
from longspan.modeling.flops import divided
from longspan.trainer import recipes
from longspan.trainer.config import RunConfig, cross_problems, untrained_state_problems
from longspan.trainer.plan.hardware import Precision, hardware_problems

Optimizer = Literal["none", "adamw", "adafactor"]

# option of the command -> the field of a training recipe that says the same
OPTIONS = {
    "rows": "training.micro_batch_lanes",
    "segment_tokens": "data.segment_tokens",
    "vocab_size": "model.vocab_size",
    "precision": "training.precision",
    "activation_checkpointing": "training.activation_checkpointing",
    "lanes": "data.lanes",
    "optimizer": "optimizer.name",
}


class BareStep(BaseModel):
    """One step of a bare model; by default a forward and backward pass alone, what `longspan bench step` times."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: ModelConfig
    rows: int = Field(1, ge=1, description="sequences of one step")
    segment_tokens: int = Field(4096, ge=1, description="tokens of one sequence in one step")
    precision: Precision = Field("bf16", description="of weights and activations")
    activation_checkpointing: ActivationCheckpointing = Field(
        "none", description="what the backward pass computes again"
    )
    lanes: int | None = Field(None, ge=1, description="sequences of a step over all GPUs; `rows` a GPU if unset")
    optimizer: Optimizer = Field("none", description="update rule; none = forward and backward alone")


@dataclass(frozen=True)
class Setting:
    """A model and one optimizer step of it on one device.

    Attributes:
        model: the model.
        rows: B, sequences of a micro-batch.
        segment_tokens: N, tokens of each.
        micro_batches: forward and backward passes before the update.
        precision: of weights and activations.
        checkpointing: what the backward pass computes again.
        optimizer: "none" for a step without update.
        zero_stage: what DeepSpeed does to the optimizer's state.
        tp: ranks that divide every layer; this device is one of them.
        shards: ranks over which ZeRO divides; this device is one of them.
        cp: ranks that hold each sequence together; `segment_tokens` is one rank's share of it.
        offload_optimizer: fp32 weights and optimizer state are in the host's memory, where the update runs.
        state_slices: parts of the batch in which ranks of a sequence hand their state on.
    """

    model: ModelConfig
    rows: int
    segment_tokens: int
    micro_batches: int
    precision: Precision
    checkpointing: ActivationCheckpointing
    optimizer: Optimizer
    zero_stage: int
    tp: int = 1
    shards: int = 1
    cp: int = 1
    offload_optimizer: bool = False
    state_slices: int = 1

    @cached_property
    def local(self) -> ModelConfig:
        """The model with the sizes that one tensor-parallel rank has of it; the state path has those of `model`."""
        return divided(self.model, self.tp)

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.rows * self.segment_tokens

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight or activation."""
        return 2 if self.precision == "bf16" else 4

    @property
    def stack_calls(self) -> int:
        """How often the stack runs for one segment: once, or for each block, then for each slice of the batch too."""
        if not runs_by_block(self.model):
            return 1
        return self.run_slices * -(-self.segment_tokens // self.model.window_tokens)

    @property
    def run_slices(self) -> int:
        """Slices of the batch that go through the whole stack one after another: where it runs block by block."""
        return self.state_slices if self.cp > 1 and runs_by_block(self.model) else 1


def runs_by_block(config: ModelConfig) -> bool:
    """Whether the stack runs once a block, so that a longer segment takes more launches: memory and feedback."""
    return config.memory is not None or config.feedback


def read_setting(args: argparse.Namespace) -> tuple[Setting, RunConfig | None]:
    """The setting that a command line asks for; a recipe of a model alone takes the options of `OPTIONS`.

    Returns:
        The setting of one device, and the training recipe if it is one.

    Raises:
        ConfigError: with every problem of recipe, options and hardware name.
        UsageError: no such recipe, or an option that the training recipe already answers.
    """
    raw = recipes.apply_overrides(recipes.read_recipe(args.config), args.overrides)
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    subject = f"plan of {args.config}"
    if set(raw) == {"model"}:
        return _bare(raw, given, subject, args.hardware), None
    if given:
        name, value = next(iter(given.items()))
        option = f"--{name.replace('_', '-')}"
        raise UsageError(
            f"{option} {value} is for recipes of a model alone; {args.config} is a training recipe. "
            f"Use --set {OPTIONS[name]}={value}."
        )

    def check(config: RunConfig) -> list[Problem]:
        return [*cross_problems(config), *hardware_problems(args.hardware)]

    config = recipes.validate(RunConfig, raw, subject, check)
    setting = Setting(
        model=config.model,
        rows=config.training.micro_batch_lanes,
        segment_tokens=config.data.segment_tokens,
        micro_batches=config.data.lanes // config.training.micro_batch_lanes,
        precision="fp32" if config.training.precision == "fp32" else "bf16",
        checkpointing=config.training.activation_checkpointing,
        optimizer=config.optimizer.name,
        zero_stage=config.parallel.zero_stage,
        offload_optimizer=config.parallel.offload_optimizer,
    )
    return setting, config


def _bare(raw: dict[str, Any], given: dict[str, Any], subject: str, hardware: str) -> Setting:
    if "vocab_size" in given and isinstance(raw["model"], dict):
        raw["model"]["vocab_size"] = given.pop("vocab_size")

    def check(step: BareStep) -> list[Problem]:
        return [*_segment_problems(step), *hardware_problems(hardware)]

    step = recipes.validate(BareStep, raw | given, subject, check)
    return Setting(
        model=step.model,
        rows=step.rows,
        segment_tokens=step.segment_tokens,
        micro_batches=1 if step.lanes is None else step.lanes // step.rows,
        precision=step.precision,
        checkpointing=step.activation_checkpointing,
        optimizer=step.optimizer,
        zero_stage=int(step.optimizer == "adamw" and step.precision == "bf16"),
    )


def _segment_problems(step: BareStep) -> list[Problem]:
    segment, window = step.segment_tokens, step.model.window_tokens
    problems = []
    if step.lanes is not None and step.lanes % step.rows:
        problems.append(Problem(f"lanes = {step.lanes}", f"not a multiple of rows = {step.rows}."))
    if segment % window:
        below, above = segment // window * window, (segment // window + 1) * window
        nearest = f"{below} or {above}" if below else f"{above}"
        what = f"not a multiple of model.window_tokens = {window}. Nearest: {nearest}."
        problems.append(Problem(f"segment_tokens = {segment}", what))
    problems += untrained_state_problems(step.model, segment, f"segment_tokens = {segment}")
    return problems
