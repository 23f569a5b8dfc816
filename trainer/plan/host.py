"""Time of the process that launches the kernels: Python, autograd, Triton's launchers, DeepSpeed's hooks.

Launches are counted from profiles of a step; what one of them takes is a rate of the hardware file, fitted to steps
that were measured on one kind of host. A step is no shorter than its launches: `predict.py`, `timing.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

from longspan.modeling.config import BlockRecurrentConfig, ModelConfig, SlidingWindowConfig
from longspan.trainer.plan.hardware import HostRates
from longspan.trainer.plan.setting import Setting
from longspan.trainer.plan.traffic import LayerMessages

# Forward and backward, from profiles at 8 x 4096: slide_13l 477 launches, rec_fixed_skip_12l 582, of which 48 (six a
# block) belong to loops over blocks, which launch from prepared arguments and are left out.
ENDS_LAUNCHES = 22
WINDOW_LAUNCHES = 35
RECURRENT_LAUNCHES = 127
PLAIN_LAUNCHES = 120  # of a layer in plain PyTorch: not counted from a profile
# share of a layer's launches that recomputation repeats: the forward pass is a third of them
LAUNCHED_AGAIN = {"none": 0.0, "mixer": 0.25, "layer": 1 / 3}
# parameters as tensors, of each of which DeepSpeed has hooks
ENDS_TENSORS = 2
LAYER_TENSORS = 10
RECURRENT_TENSORS = 23


def host_seconds(setting: Setting, rates: HostRates, calls: float, messages: float = 0.0) -> float:
    """Time in which the host launches one micro-batch.

    Args:
        setting: of one rank.
        rates: of its host.
        calls: how often the stack runs for one segment.
        messages: to other ranks, collectives included.
    """
    layers = calls * sum(map(_launches, setting.model.expanded_layers())) * (1 + LAUNCHED_AGAIN[setting.checkpointing])
    seconds = (ENDS_LAUNCHES + layers) * rates.launch_us + messages * rates.message_us
    if setting.optimizer != "none" and setting.zero_stage >= 2:
        a_tensor = rates.stage2_tensor_us if setting.zero_stage == 2 else rates.stage3_tensor_us
        seconds += parameter_tensors(setting.model) * a_tensor
    return seconds * 1e-6


def engine_seconds(setting: Setting, rates: HostRates) -> float:
    """Once a step, while the device waits: agreement of the ranks, which reads sums from the device, and the update."""
    return 0.0 if setting.optimizer == "none" else rates.engine_us * 1e-6


def tensor_calls(messages: LayerMessages, sums_again: int, calls: float) -> float:
    """Sums and gathers over tensor-parallel ranks that one rank starts for one layer in a micro-batch.

    Every run of the stack has its own; gradients of the state path are summed once in a backward pass.

    Args:
        messages: of the layer.
        sums_again: how many sums its recomputation repeats.
        calls: how often the stack runs for one segment.
    """
    gathers = bool(messages.gather)
    return calls * ((4 + sums_again) * bool(messages.sums) + 2 * gathers) + gathers


def message_calls(layers: Iterable[tuple[LayerMessages, float]], slices: int, truncate: bool, ends: int) -> float:
    """Messages and collectives that one rank starts in a micro-batch, all hops of a halo counted as one.

    Args:
        layers: messages of each layer, and its `tensor_calls`.
        slices: parts in which a state is handed on.
        truncate: no gradient of a state crosses ranks.
        ends: those of embedding, loss and the state after the segment.
    """
    found: float = ends
    for layer, tensor in layers:
        found += tensor + 2 * bool(layer.halo) + (1 if truncate else 2) * slices * bool(layer.carry)
        found += 2 * layer.ring_hops + 3 * bool(layer.scan)
    return found


def parameter_tensors(config: ModelConfig) -> int:
    """Parameters of a model, counted as tensors; exact for sliding windows and for gate fixed in mode skip."""
    recurrent = sum(isinstance(layer, BlockRecurrentConfig) for layer in config.expanded_layers())
    others = len(config.expanded_layers()) - recurrent
    return ENDS_TENSORS + LAYER_TENSORS * others + RECURRENT_TENSORS * recurrent


def _launches(layer: object) -> int:
    if isinstance(layer, BlockRecurrentConfig):
        return RECURRENT_LAUNCHES
    return WINDOW_LAUNCHES if isinstance(layer, SlidingWindowConfig) else PLAIN_LAUNCHES
