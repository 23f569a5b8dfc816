"""Time of the process that launches the kernels: Python, autograd, Triton's launchers, DeepSpeed's hooks.

Launches are counted from profiles of a step; what one of them takes is a rate of the hardware file, fitted to steps
that were measured on one kind of host. A step is no shorter than its launches: `predict.py`, `timing.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

from longspan.modeling.config import BlockRecurrentConfig, ModelConfig, SlidingWindowConfig
from longspan.trainer.plan.hardware import HostRates
from longspan.trainer.plan.memory import chain_chunks
from longspan.trainer.plan.setting import Setting
from longspan.trainer.plan.traffic import LayerMessages, state_path_tensors

# Forward and backward, from profiles at 8 x 4096: slide_13l 477 launches, rec_fixed_skip_12l 582, of which 48 (six a
# block) belong to loops over blocks, which launch from prepared arguments and are left out.
ENDS_LAUNCHES = 22
WINDOW_LAUNCHES = 35
RECURRENT_LAUNCHES = 127
# of every chunk of the state path after the first on its way back, with reads kept, gate fixed in mode skip (a test
# counts them): five kernels of gradients, two operations on a scale's, four sums, two products, seven additions to what
# chunks before have given
CHUNK_LAUNCHES = 20
PLAIN_LAUNCHES = 120  # of a layer in plain PyTorch: not counted from a profile
# share of a layer's launches that recomputation repeats: the forward pass is a third of them
LAUNCHED_AGAIN = {"none": 0.0, "mixer": 0.25, "layer": 1 / 3}
# parameters as tensors, of each of which DeepSpeed has hooks
ENDS_TENSORS = 2
LAYER_TENSORS = 10
RECURRENT_TENSORS = 12  # beside those of its state path


def host_seconds(setting: Setting, rates: HostRates, messages: float = 0.0) -> float:
    """Time in which the host launches one micro-batch.

    Args:
        setting: of one rank.
        rates: of its host.
        messages: to other ranks, collectives included.
    """
    layers = setting.model.expanded_layers()
    once = sum(map(_launches, layers)) * (1 + LAUNCHED_AGAIN[setting.checkpointing])
    once += CHUNK_LAUNCHES * sum(_further_chunks(setting, layer) for layer in layers)
    launches = ENDS_LAUNCHES + setting.stack_calls * once
    seconds = launches * rates.launch_us + messages * rates.message_us
    if setting.optimizer != "none" and setting.zero_stage >= 2:
        a_tensor = rates.stage2_tensor_us if setting.zero_stage == 2 else rates.stage3_tensor_us
        seconds += parameter_tensors(setting.model) * a_tensor
    return seconds * 1e-6


def engine_seconds(setting: Setting, rates: HostRates) -> float:
    """Once a step, while the device waits: agreement of the ranks, which reads sums from the device, and the update."""
    return 0.0 if setting.optimizer == "none" else rates.engine_us * 1e-6


def tensor_calls(messages: LayerMessages, sums_again: int, gathers_again: int) -> int:
    """Sums and gathers over tensor-parallel ranks that one rank starts for one layer in a micro-batch.

    Args:
        messages: of the layer.
        sums_again, gathers_again: how many of them its recomputation repeats.
    """
    sums, gathers = (4 + sums_again) * messages.sum_calls, (2 + gathers_again) * messages.gather_calls
    return sums + gathers + messages.path_calls


def message_calls(layers: Iterable[tuple[LayerMessages, int]], slices: int, truncate: bool, ends: int) -> int:
    """Messages and collectives that one rank starts in a micro-batch, all hops of a halo counted as one.

    Args:
        layers: messages of each layer, and its `tensor_calls`.
        slices: parts in which a state is handed on.
        truncate: no gradient of a state crosses ranks.
        ends: those of embedding, loss and the state after the segment.
    """
    found = ends
    for layer, tensor in layers:
        found += tensor + 2 * bool(layer.halo) + (1 if truncate else 2) * slices * layer.carry_calls
        found += 2 * layer.ring_hops + 3 * bool(layer.scan)
    return found


def parameter_tensors(config: ModelConfig) -> int:
    """Parameters of a model, counted as tensors; exact for sliding windows and recurrent layers without feedback."""
    recurrent = [layer for layer in config.expanded_layers() if isinstance(layer, BlockRecurrentConfig)]
    found = ENDS_TENSORS + LAYER_TENSORS * (len(config.expanded_layers()) - len(recurrent))
    return found + sum(RECURRENT_TENSORS + state_path_tensors(layer) for layer in recurrent)


def _further_chunks(setting: Setting, layer: object) -> int:
    if not isinstance(layer, BlockRecurrentConfig) or layer.update == "frozen":
        return 0
    return chain_chunks(setting, layer) - 1


def _launches(layer: object) -> int:
    if isinstance(layer, BlockRecurrentConfig):
        return RECURRENT_LAUNCHES
    return WINDOW_LAUNCHES if isinstance(layer, SlidingWindowConfig) else PLAIN_LAUNCHES
