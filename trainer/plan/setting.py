"""What is planned: a model and how it is trained, from a training recipe or from a bare model recipe and options."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from longspan.errors import Problem, UsageError
from longspan.modeling.config import ActivationCheckpointing, ModelConfig
from longspan.trainer import recipes
from longspan.trainer.config import RunConfig, cross_problems
from longspan.trainer.plan.hardware import Precision, hardware_problems

Optimizer = Literal["none", "adamw", "adafactor"]

# option of the command -> the field of a training recipe that says the same
OPTIONS = {
    "rows": "training.micro_batch_lanes",
    "segment_tokens": "data.segment_tokens",
    "vocab_size": "model.vocab_size",
    "precision": "training.precision",
    "activation_checkpointing": "training.activation_checkpointing",
}


class BareStep(BaseModel):
    """One forward and backward pass of a bare model, without optimizer: what `longspan bench step` times."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: ModelConfig
    rows: int = Field(1, ge=1, description="sequences of one step")
    segment_tokens: int = Field(4096, ge=1, description="tokens of one sequence in one step")
    precision: Precision = Field("bf16", description="of weights and activations")
    activation_checkpointing: ActivationCheckpointing = Field(
        "none", description="what the backward pass computes again"
    )


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
    """

    model: ModelConfig
    rows: int
    segment_tokens: int
    micro_batches: int
    precision: Precision
    checkpointing: ActivationCheckpointing
    optimizer: Optimizer
    zero_stage: int

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.rows * self.segment_tokens

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight or activation."""
        return 2 if self.precision == "bf16" else 4


def read_setting(args: argparse.Namespace) -> Setting:
    """The setting that a command line asks for; a recipe of a model alone takes the options of `OPTIONS`.

    Raises:
        ConfigError: with every problem of recipe, options and hardware name.
        UsageError: no such recipe, or an option that the training recipe already answers.
    """
    raw = recipes.apply_overrides(recipes.read_recipe(args.config), args.overrides)
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    subject = f"plan of {args.config}"
    if set(raw) == {"model"}:
        return _bare(raw, given, subject, args.hardware)
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
    return Setting(
        model=config.model,
        rows=config.training.micro_batch_lanes,
        segment_tokens=config.data.segment_tokens,
        micro_batches=config.data.lanes // config.training.micro_batch_lanes,
        precision="fp32" if config.training.precision == "fp32" else "bf16",
        checkpointing=config.training.activation_checkpointing,
        optimizer=config.optimizer.name,
        zero_stage=config.parallel.zero_stage,
    )


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
        micro_batches=1,
        precision=step.precision,
        checkpointing=step.activation_checkpointing,
        optimizer="none",
        zero_stage=0,
    )


def _segment_problems(step: BareStep) -> list[Problem]:
    segment, window = step.segment_tokens, step.model.window_tokens
    if segment % window == 0:
        return []
    below, above = segment // window * window, (segment // window + 1) * window
    nearest = f"{below} or {above}" if below else f"{above}"
    what = f"not a multiple of model.window_tokens = {window}. Nearest: {nearest}."
    return [Problem(f"segment_tokens = {segment}", what)]
