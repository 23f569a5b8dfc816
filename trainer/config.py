"""The training configuration: the rooms' schemas assembled, and the checks that need more than one of them.

Imports no torch, so that `--help`, `plan` and configuration errors answer at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from longspan.cluster.config import ParallelConfig
from longspan.data_pipeline.config import DataConfig
from longspan.errors import Problem
from longspan.modeling.config import ActivationCheckpointing, FullAttentionConfig, ModelConfig


class Section(BaseModel):
    """Frozen, strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


_Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """Optimizer and gradient clipping."""

    name: Literal["adamw", "adafactor"] = Field("adamw", description="update rule")
    lr_peak: float = Field(3e-4, gt=0, description="highest learning rate (adafactor: relative to the parameter's RMS)")
    gain_lr_multiplier: float = Field(
        1.0, gt=0, description="learning rate of attention scales, position tables and gate biases over the others'"
    )
    betas: tuple[_Decay, _Decay] = Field((0.9, 0.95), description="adamw: decay of first and second moment")
    eps: float = Field(1e-8, gt=0, description="adamw: added to the denominator")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices; never of norms, scales and gates")
    momentum: float = Field(0.9, ge=0, lt=1, description="adafactor: first moment")
    decay_rate: float = Field(0.8, gt=0, lt=1, description="adafactor: second moment decays as 1 - step^-decay_rate")
    clip_norm: float = Field(1.0, ge=0, description="global gradient norm is clipped to this; 0 = no clipping")


class ScheduleConfig(Section):
    """Learning rate over steps."""

    name: Literal["cosine", "rsqrt"] = Field("cosine", description="shape after the warm-up")
    warmup_steps: int = Field(1000, ge=0, description="linear rise from 0")
    final_fraction: float = Field(0.1, ge=0, le=1, description="cosine: last learning rate over lr_peak")


class TrainingConfig(Section):
    """Length and batch of a run."""

    steps: int = Field(ge=1, description="optimizer updates")
    micro_batch_lanes: int = Field(1, ge=1, description="lanes that one rank runs at once; the rest accumulates")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 keeps fp32 master weights")
    activation_checkpointing: ActivationCheckpointing = Field(
        "none", description="computed again in the backward pass, to save memory: none, each mixer, or each whole layer"
    )
    max_consecutive_skips: int = Field(10, ge=1, description="bad steps in a row that end the run (exit 72)")
    threads: int | None = Field(None, ge=1, description="CPU threads of one process; cores / processes if unset")


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    interval_steps: int = Field(1000, ge=1, description="steps between saves; the last step is always saved")
    keep_last: int = Field(3, ge=1, description="newest checkpoints kept")
    folder: str | None = Field(
        None, description="where checkpoints go: a folder, or s3://, gs://, memory://; RUN/checkpoints if unset"
    )
    milestone_interval_steps: int | None = Field(None, ge=1, description="multiples of this are never pruned")


class ValidationConfig(Section):
    """Held-out loss and a text sample while training."""

    interval_steps: int = Field(1000, ge=1, description="steps between validations; the last step is always validated")
    max_document_tokens: int = Field(16384, ge=1, description="head of each held-out document that is scored")
    sample_prompt: str = Field("In the beginning", description="text that the sample continues")
    sample_tokens: int = Field(128, ge=0, description="tokens of the sample; 0 = no sample")


class TrackingConfig(Section):
    """Where metrics go besides log.jsonl."""

    uri: str | None = Field(None, description="MLflow tracking URI; sqlite file mlflow.db beside the run if unset")
    experiment: str = Field("longspan", description="MLflow experiment")
    enabled: bool = Field(True, description="send metrics to MLflow")


class RunConfig(Section):
    """Everything that a training run depends on."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run's recipe; no path")
    seed: int = Field(0, ge=0, description="weights, data order and dropout")
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    tracking: TrackingConfig = TrackingConfig()


def cross_problems(config: RunConfig) -> list[Problem]:
    """What is wrong between sections that are each right by themselves."""
    return [*_segment_problems(config), *_batch_problems(config), *_engine_problems(config)]


def untrained_state_problems(model: ModelConfig, segment_tokens: int, where: str) -> list[Problem]:
    """What is wrong with segments in which nothing reads the state that the model's blocks write.

    Args:
        model: the model.
        segment_tokens: N, tokens between two cuts of the gradient.
        where: what the problem names, for example "data.segment_tokens = 8".
    """
    window = model.window_tokens
    if not model.is_recurrent or segment_tokens >= 2 * window:
        return []
    what = (
        f"shorter than two blocks of model.window_tokens = {window}. The state that a segment's last block "
        f"writes is read only by the next segment, without gradient, so its update would never be trained. "
        f"Use {2 * window} or more."
    )
    return [Problem(where, what)]


def _segment_problems(config: RunConfig) -> list[Problem]:
    segment, window = config.data.segment_tokens, config.model.window_tokens
    where = f"data.segment_tokens = {segment}"
    problems = []
    if segment % window:
        below, above = segment // window * window, (segment // window + 1) * window
        nearest = f"{below} or {above}" if below else f"{above}"
        problems.append(Problem(where, f"not a multiple of model.window_tokens = {window}. Nearest: {nearest}."))
    problems += untrained_state_problems(config.model, segment, where)
    limit = config.data.max_document_tokens
    if limit is not None and limit % config.model.quantum:
        problems.append(
            Problem(
                f"data.max_document_tokens = {limit}",
                f"not a multiple of the model's quantum = {config.model.quantum}; documents start on its edges.",
            )
        )
    return problems


def _batch_problems(config: RunConfig) -> list[Problem]:
    lanes, micro = config.data.lanes, config.training.micro_batch_lanes
    if lanes % micro:
        return [Problem(f"data.lanes = {lanes}", f"not a multiple of training.micro_batch_lanes = {micro}.")]
    return []


def lane_problems(config: RunConfig, dp: int) -> list[Problem]:
    """What is wrong with the recipe's lanes for `dp` data-parallel ranks, and not for one."""
    lanes, micro = config.data.lanes, config.training.micro_batch_lanes
    if lanes % micro or lanes % (dp * micro) == 0:
        return []
    smaller = "" if lanes % dp else f", or use training.micro_batch_lanes: {lanes // dp}"
    what = (
        f"do not divide over {dp} data-parallel ranks in micro-batches of training.micro_batch_lanes = {micro}. "
        f"Make lanes a multiple of {dp * micro}{smaller}."
    )
    return [Problem(f"data.lanes = {lanes}", what)]


def _engine_problems(config: RunConfig) -> list[Problem]:
    stage = config.parallel.zero_stage
    problems = []
    if config.optimizer.name == "adafactor" and stage > 0:
        problems.append(
            Problem(
                f"parallel.zero_stage = {stage}",
                "optimizer.name = adafactor needs the real shapes of the parameters, which ZeRO 1 to 3 flatten. "
                "Use zero_stage: 0, or optimizer.name: adamw.",
            )
        )
    if config.parallel.offload_optimizer and stage == 0:
        problems.append(
            Problem(
                "parallel.offload_optimizer = true",
                "parallel.zero_stage = 0 keeps weights and optimizer state where the parameters are. Use zero_stage: 1 "
                "to 3, or offload_optimizer: false.",
            )
        )
    if config.training.precision == "bf16" and stage == 0:
        problems.append(
            Problem(
                "parallel.zero_stage = 0",
                "training.precision = bf16 keeps its fp32 master weights in ZeRO 1 to 3. Use zero_stage: 1.",
            )
        )
    return [
        *problems,
        *_tensor_parallel_problems(config),
        *_context_parallel_problems(config),
        *_dropout_problems(config),
    ]


def _tensor_parallel_problems(config: RunConfig) -> list[Problem]:
    tp = config.parallel.tp
    problems = [
        Problem(
            f"model.{name} = {size}",
            f"does not divide over parallel.tp = {tp} ranks. Use {-(-size // tp) * tp}, or another parallel.tp.",
        )
        for name, size in config.model.indivisible(tp)
    ]
    if config.optimizer.name == "adafactor" and tp > 1:
        problems.append(
            Problem(
                f"parallel.tp = {tp}",
                "optimizer.name = adafactor takes means over whole parameters, of which each rank then has a part. "
                "Use parallel.tp: 1, or optimizer.name: adamw.",
            )
        )
    return problems


def _context_parallel_problems(config: RunConfig) -> list[Problem]:
    cp, segment, quantum = config.parallel.cp, config.data.segment_tokens, config.model.quantum
    if cp == 1:
        return []
    if segment % (cp * quantum):
        return [
            Problem(
                f"parallel.cp = {cp}",
                f"data.segment_tokens = {segment} does not divide into {cp} shares of whole blocks of {quantum} "
                f"tokens. Use a multiple of {cp * quantum}.",
            )
        ]
    return _one_block_problems(config) if config.model.is_recurrent and segment == cp * quantum else []


def _one_block_problems(config: RunConfig) -> list[Problem]:
    """Where each rank has one block, the last rank's only update of the state is read by nobody in the segment."""
    cp, stage, wanted = config.parallel.cp, config.parallel.zero_stage, 2 * config.data.segment_tokens
    where = f"parallel.cp = {cp}, data.segment_tokens = {config.data.segment_tokens}"
    if config.parallel.state_grad == "truncate":
        return [
            Problem(
                where,
                f"with parallel.state_grad = truncate and one block a rank no update of the state is ever trained. "
                f"Use data.segment_tokens: {wanted} or more, or state_grad: full.",
            )
        ]
    if stage:
        return [
            Problem(
                where,
                f"with one block a rank the last rank has no gradient of the state's update, and "
                f"parallel.zero_stage = {stage} needs one of every parameter on every rank. Use data.segment_tokens: "
                f"{wanted} or more, or zero_stage: 0.",
            )
        ]
    return []


def _dropout_problems(config: RunConfig) -> list[Problem]:
    full = any(isinstance(layer, FullAttentionConfig) for layer in config.model.expanded_layers())
    if not full or not config.model.dropout or config.parallel.cp == config.parallel.tp == 1:
        return []
    return [
        Problem(
            f"model.dropout = {config.model.dropout}",
            "full attention over several ranks has no dropout. Set model.dropout: 0, or parallel.cp and tp: 1.",
        )
    ]
