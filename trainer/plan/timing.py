"""Time of one step, part by part, from counted operations, counted bytes and measured rates."""

from __future__ import annotations

from dataclasses import dataclass, field

from longspan.modeling.config import BlockRecurrentConfig
from longspan.modeling.flops import Operation, layer_operations, stack_tokens_per_token, train_flops_per_token
from longspan.trainer.plan.hardware import Hardware
from longspan.trainer.plan.host import engine_seconds, host_seconds
from longspan.trainer.plan.memory import keeps_reads
from longspan.trainer.plan.parameters import total_parameters
from longspan.trainer.plan.residual import ends_passes, layer_passes
from longspan.trainer.plan.setting import Setting

# passes over [tokens, hidden] of the FFN's activation that no product's own traffic includes
ACTIVATION_PASSES_BACKWARD = 1
# share of a layer's forward time that the backward pass spends again, by checkpointing policy; products that only give
# a result, and keep nothing, are left out: the output projection, the second product of the FFN
MIXER_AGAIN = {"projections": 1.0, "window attention": 1.0, "full attention": 1.0, "linear attention": 1.0}
MIXER_AGAIN |= {"state chain": 1.0, "state read": 1.0}
# of the feed-forward network the hidden vectors alone; the norms: `residual.layer_passes`
LAYER_AGAIN = MIXER_AGAIN | {"output projection": 1.0, "feed-forward": 0.5}
# kernels of a layer beside its matrix products
KERNELS_FORWARD = 8
KERNELS_BACKWARD = 12
PARAMETER_BYTES_PER_UPDATE = 40  # gradients, masters, moments and weights, read and written


@dataclass
class Part:
    """One kind of work in a step.

    Attributes:
        forward, backward: seconds; recomputation belongs to backward.
        again: seconds of `backward` that are recomputation.
        flops: executed operations, both passes.
        num_bytes: bytes moved, of memory-bound parts.
    """

    forward: float = 0.0
    backward: float = 0.0
    flops: float = 0.0
    num_bytes: float = 0.0
    again: float = 0.0


@dataclass
class StepTime:
    """Time of one optimizer step.

    Attributes:
        parts: of one micro-batch by name.
        host: seconds that launching one micro-batch takes; the step lasts no shorter.
        update: seconds of the optimizer.
        engine: seconds of the host around the update, once a step, in which the device waits.
        micro_batches: of the step.
        tokens: of the step.
        model_flops: of the step, counted once, without recomputation.
    """

    micro_batches: int
    tokens: int
    model_flops: float
    parts: dict[str, Part] = field(default_factory=dict)
    host: float = 0.0
    update: float = 0.0
    engine: float = 0.0

    def part(self, name: str) -> Part:
        """The part of this name, made on first use."""
        return self.parts.setdefault(name, Part())

    def add(self, other: StepTime) -> None:
        """Adds the parts of `other` to those of this."""
        for name, part in other.parts.items():
            total = self.part(name)
            for field_name, value in vars(part).items():
                setattr(total, field_name, getattr(total, field_name) + value)

    @property
    def device(self) -> float:
        """Seconds of the device for one micro-batch."""
        return sum(part.forward + part.backward for part in self.parts.values())

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.micro_batches * max(self.device, self.host) + self.update + self.engine


def plan_step(setting: Setting, hardware: Hardware) -> StepTime:
    """Predicted time of one optimizer step on one device."""
    config = setting.model
    tokens = setting.tokens * setting.micro_batches
    step = StepTime(
        micro_batches=setting.micro_batches,
        tokens=tokens,
        model_flops=tokens * train_flops_per_token(config, setting.segment_tokens),
    )
    for layer in config.layers:
        once = layer_time(setting, hardware, layer)
        for _ in range(layer.repeat):
            step.add(once)
    step.add(ends_time(setting, hardware))
    step.host = host_seconds(setting, hardware.host)
    step.engine = engine_seconds(setting, hardware.host)
    step.update = update_seconds(setting, hardware, total_parameters(config, setting.tp))
    return step


def update_seconds(setting: Setting, hardware: Hardware, parameters: int) -> float:
    """Time of the optimizer over this device's share of `parameters`."""
    if setting.optimizer == "none":
        return 0.0
    share = parameters / (setting.shards if setting.zero_stage else 1)
    if not setting.offload_optimizer:
        return hardware.traffic_seconds(PARAMETER_BYTES_PER_UPDATE * share, 10)
    rates = hardware.offload
    # every micro-batch's gradients go there, the updated weights come back; one after the other
    moved = (setting.micro_batches + 1) * setting.element_bytes * share / rates.link_gigabytes_per_second
    return (moved + PARAMETER_BYTES_PER_UPDATE * share / rates.update_gigabytes_per_second) * 1e-9


def layer_time(setting: Setting, hardware: Hardware, layer: object) -> StepTime:
    """The parts of one layer and micro-batch, recomputation included; neither host nor update."""
    step = StepTime(1, setting.tokens, 0.0)
    _layer(step, setting, hardware, layer, setting.stack_calls)
    if setting.checkpointing != "none":
        _recompute(step, _again(setting, layer))
    return step


def _again(setting: Setting, layer: object) -> dict[str, float]:
    """Share of a part's forward time that the backward pass spends again."""
    if setting.checkpointing == "mixer":
        return MIXER_AGAIN
    passes = layer_passes(setting, layer)
    again = LAYER_AGAIN | {"norms and residuals": passes.again / passes.forward}
    # the network's dropout keeps its mask, and what runs again ends with the last that is kept: behind both products
    return again | {"feed-forward": 1.5} if setting.model.dropout else again


def ends_time(setting: Setting, hardware: Hardware) -> StepTime:
    """The parts of embedding, final norm and loss of one micro-batch."""
    step = StepTime(1, setting.tokens, 0.0)
    _ends(step, setting, hardware)
    return step


def _layer(step: StepTime, setting: Setting, hardware: Hardware, layer: object, calls: float) -> None:
    """Adds one layer; `calls` is how often the stack runs for one segment."""
    config, element = setting.model, setting.element_bytes
    tokens = setting.tokens * stack_tokens_per_token(config)
    operations = layer_operations(config, layer, setting.tp)
    for operation in operations:
        if not operation.serial:
            _parallel(step, setting, hardware, operation, tokens, calls)
    if isinstance(layer, BlockRecurrentConfig):
        _state(step, setting, hardware, layer, [operation for operation in operations if operation.serial])
    row, hidden = tokens * config.dim * element, tokens * setting.local.ffn_dim * element
    passes = layer_passes(setting, layer)
    _traffic(step, hardware, "norms and residuals", passes.forward * row, KERNELS_FORWARD * calls, 0)
    _traffic(step, hardware, "norms and residuals", passes.backward * row, KERNELS_BACKWARD * calls, 1)
    _traffic(step, hardware, "activations", ACTIVATION_PASSES_BACKWARD * hidden, calls, 1)


def _traffic(step: StepTime, hardware: Hardware, name: str, num_bytes: float, kernels: float, backward: int) -> None:
    part, seconds = step.part(name), hardware.traffic_seconds(num_bytes, kernels)
    part.num_bytes += num_bytes
    part.forward += 0.0 if backward else seconds
    part.backward += seconds if backward else 0.0


def _parallel(
    step: StepTime, setting: Setting, hardware: Hardware, operation: Operation, tokens: float, calls: float
) -> None:
    """An operation over all tokens of the segment at once."""
    part = step.part(operation.part)
    if operation.kind == "dense":
        m = tokens * operation.rows / calls
        _dense(part, setting, hardware, m, operation, calls)
        return
    flops = tokens * operation.flops
    if operation.kind == "window_attention":
        config = setting.local
        forward, backward = hardware.window_seconds(tokens, operation.inner, config.num_heads, config.head_dim)
        waste = (operation.inner + hardware.window_attention.tile_tokens) / operation.inner
        slower = _attention_slowdown(setting, hardware)
        part.forward += forward * slower
        part.backward += backward * slower
        part.flops += 3.5 * flops * waste
        return
    rates = hardware.dense_attention
    slower = _attention_slowdown(setting, hardware)
    part.forward += slower * flops / (rates.forward_tflops * 1e12)
    part.backward += slower * 2.5 * flops / (rates.backward_tflops * 1e12)
    part.flops += 3.5 * flops


def _attention_slowdown(setting: Setting, hardware: Hardware) -> float:
    """Attention rates are of bf16; fp32 runs slower by as much as tf32 products do."""
    return 2.0 if setting.precision == "fp32" else 1.0


def _dense(
    part: Part, setting: Setting, hardware: Hardware, m: float, operation: Operation, calls: float = 1.0
) -> None:
    n, k = operation.outer, operation.inner

    def seconds(form: str) -> float:
        return calls * hardware.matrix_seconds(form, m, n, k, setting.precision)

    part.forward += seconds("forward")
    part.backward += seconds("input_gradient") + seconds("weight_gradient")
    part.flops += 3 * calls * 2.0 * m * n * k


def _state(
    step: StepTime, setting: Setting, hardware: Hardware, layer: BlockRecurrentConfig, operations: list[Operation]
) -> None:
    """The state path: a serial chain forward and, with weight gradients, backward; its reads again if not kept."""
    if layer.update == "frozen":
        return  # one projection of one state a step
    window = setting.model.window_tokens
    blocks = setting.run_slices * setting.segment_tokens / window
    flops = sum(operation.flops for operation in operations)
    forward, backward = hardware.chain_seconds(setting.rows / setting.run_slices, window * flops / 1e9)
    if layer.mode != "skip":
        forward, backward = (x * hardware.state_chain.general_factor for x in (forward, backward))
    chain = step.part("state chain")
    chain.forward += blocks * forward
    chain.backward += blocks * backward
    chain.flops += 3 * setting.tokens * flops
    # the state's view of the tokens: keys and values are read and written
    copies = 4 * setting.tokens * setting.model.num_heads * setting.model.head_dim * setting.element_bytes
    _traffic(step, hardware, "state read", copies, 1, 0)
    if keeps_reads(setting, layer):
        return
    _traffic(step, hardware, "state read", copies, 1, 1)
    again = step.part("state reads again")
    for operation in operations:
        if operation.kind == "dense":
            shape = (setting.tokens * operation.rows, operation.outer, operation.inner)
            again.backward += hardware.matrix_seconds("forward", *shape, setting.precision)
        else:
            again.backward += setting.tokens * operation.flops / (hardware.dense_attention.forward_tflops * 1e12)
        again.flops += setting.tokens * operation.flops


def _recompute(step: StepTime, again: dict[str, float]) -> None:
    """Adds one layer's forward time to its backward time."""
    for name, part in step.parts.items():
        part.again = again.get(name, 0.0) * part.forward
        part.backward += part.again
        part.flops += again.get(name, 0.0) * part.flops / 3


def _ends(step: StepTime, setting: Setting, hardware: Hardware) -> None:
    """Embedding, final norm and loss."""
    config, element = setting.local, setting.element_bytes
    row = setting.tokens * config.dim * element
    _traffic(step, hardware, "embedding", 2 * row, 1, 0)
    # gradients of equal tokens are sorted and added, then the dense gradient of the table is written
    _traffic(step, hardware, "embedding", 4 * row + 2 * config.vocab_size * config.dim * element, 10, 1)
    passes = ends_passes(setting)
    _traffic(step, hardware, "norms and residuals", passes.forward * row, 1, 0)
    _traffic(step, hardware, "norms and residuals", passes.backward * row, 1, 1)
    loss = step.part("cross-entropy")
    if setting.precision == "fp32":
        for form in ("forward", "input_gradient", "weight_gradient"):
            loss.backward += hardware.matrix_seconds(form, setting.tokens, config.vocab_size, config.dim, "fp32")
    else:
        seconds = hardware.loss_seconds(setting.tokens, config.dim, config.vocab_size)
        loss.forward += seconds / 3
        loss.backward += 2 * seconds / 3
    loss.flops += 3 * 2.0 * setting.tokens * config.dim * config.vocab_size
