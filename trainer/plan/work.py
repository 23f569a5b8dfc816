"""What one rank does in a micro-batch, layer by layer: seconds of its own computation and messages to others.

Formulas (`predict.py`) and simulation (`simulate.py`) both start from here; they share nothing else but the time of a
single message and of a single collective.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from longspan.modeling.config import BlockRecurrentConfig
from longspan.trainer.plan.hardware import Hardware
from longspan.trainer.plan.host import engine_seconds, host_seconds, message_calls, tensor_calls
from longspan.trainer.plan.layout import Job, Layout
from longspan.trainer.plan.parameters import total_parameters
from longspan.trainer.plan.residual import sums_again
from longspan.trainer.plan.setting import Setting, runs_by_block
from longspan.trainer.plan.timing import StepTime, ends_time, layer_time, update_seconds
from longspan.trainer.plan.traffic import (
    LayerMessages,
    ends_sums,
    layer_messages,
    memory_bytes,
    whole_state_bytes,
    whole_state_tensors,
)
from longspan.trainer.plan.zero import Collective, traffic

# Before keys and values exist; all else of a layer follows the exchange of the halo.
ENTRY = frozenset({"projections", "norms and residuals"})
# Between the receipt of a state and its sending.
CHAIN = frozenset({"state read", "state chain", "state reads again"})
# On another stream at the same time, except where tensor-parallel ranks divide heads: there it is part of the chain.
BESIDE = "window attention"
RING = frozenset({"full attention"})
TENSOR_ENDS = 4  # sums over tensor-parallel ranks of embedding (one) and loss (two, and one of its gradient)


@dataclass(frozen=True)
class Seconds:
    """Of one layer in one pass; all slices, all blocks of keys.

    Attributes:
        entry: before messages of this layer are needed.
        chain: between receiving a state and sending it.
        beside: on another stream; it fills the wait for the state and delays no sending.
        ring: attention to blocks of keys, of which all but the first come from other ranks.
        rest: what follows.
    """

    entry: float = 0.0
    chain: float = 0.0
    ring: float = 0.0
    rest: float = 0.0
    beside: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.entry + self.chain + self.ring + self.rest + self.beside


@dataclass(frozen=True)
class LayerWork:
    """One layer of one rank.

    Attributes:
        forward, backward: the passes, without recomputation.
        again: recomputation in front of the backward pass. Of the forward pass's messages it repeats a ring's, and
            sums and gathers of tensor-parallel ranks; the others were kept.
        messages: of this layer.
        sums_again: how many of the two sums over tensor-parallel ranks the recomputation repeats.
        gathers_again: the same of the one gather.
    """

    forward: Seconds
    backward: Seconds
    again: Seconds
    messages: LayerMessages
    sums_again: int = 0
    gathers_again: int = 0


@dataclass(frozen=True)
class Work:
    """One rank's share of a step; all ranks have the same.

    Attributes:
        layers: from the bottom up; a stack that is serial as a whole is one layer.
        ends_forward, ends_backward: embedding, final norm and loss of a micro-batch.
        ends_sums: bytes summed over tensor-parallel ranks: embedding, loss forward, loss backward.
        shared_state: bytes that the last rank of a sequence sends to the others after a segment, and in how many calls.
        host: seconds that launching one micro-batch takes.
        engine: seconds of the host once a step, in which the device waits.
        update: seconds of the optimizer.
        collectives: of ZeRO, over dp x cp, of the whole step.
        slices: parts in which a state is handed on.
        micro_batches: of a step.
        truncate: no gradient of a state crosses ranks.
    """

    layers: tuple[LayerWork, ...]
    ends_forward: float
    ends_backward: float
    ends_sums: tuple[float, float, float]
    shared_state: tuple[float, int]
    host: float
    engine: float
    update: float
    collectives: tuple[Collective, ...]
    slices: int
    micro_batches: int
    truncate: bool

    @cached_property
    def kinds(self) -> list[tuple[LayerWork, int]]:
        """Layers that differ, and how many there are of each."""
        found: dict[int, tuple[LayerWork, int]] = {}
        for layer in self.layers:
            found[id(layer)] = layer, found.get(id(layer), (layer, 0))[1] + 1
        return [*found.values()]


class Workshop:
    """Makes the work of a job's layouts; what they have in common is timed once."""

    def __init__(self, job: Job, hardware: Hardware) -> None:
        """Args: job: what is trained; hardware: measured rates."""
        self.job, self.hardware = job, hardware
        self._made: dict[tuple[object, ...], tuple[tuple[LayerWork, ...], StepTime]] = {}
        self._parameters = lru_cache(maxsize=None)(lambda tp: total_parameters(job.setting.model, tp))
        self._times: dict[tuple[object, ...], StepTime] = {}

    def work(self, layout: Layout) -> Work:
        """One rank's work under `layout`."""
        local = layout.local(self.job)
        model = local.model
        layers, ends = self._layers(layout)
        parameters = self._parameters(layout.tp)
        shards = layout.dp * layout.cp
        truncate = self.job.state_grad == "truncate"
        tensors = whole_state_tensors(model) if layout.cp > 1 else 0
        messages = message_calls(
            [(one.messages, tensor_calls(one.messages, one.sums_again, one.gathers_again)) for one in layers],
            layout.state_slices,
            truncate,
            tensors + (TENSOR_ENDS if layout.tp > 1 else 0),
        )
        return Work(
            layers=layers,
            ends_forward=_sum(ends, "forward"),
            ends_backward=_sum(ends, "backward"),
            ends_sums=ends_sums(local) if layout.tp > 1 else (0.0, 0.0, 0.0),
            shared_state=(whole_state_bytes(local), tensors) if layout.cp > 1 else (0.0, 0),
            host=host_seconds(local, self.hardware.host, messages),
            engine=engine_seconds(local, self.hardware.host),
            update=update_seconds(local, self.hardware, parameters),
            collectives=tuple(
                traffic(
                    layout.zero_stage,
                    parameters,
                    local.element_bytes,
                    layout.micro_batches,
                    len(model.expanded_layers()),
                    local.optimizer != "none",
                )
            )
            if shards > 1
            else (),
            slices=layout.state_slices,
            micro_batches=layout.micro_batches,
            truncate=truncate,
        )

    def _layers(self, layout: Layout) -> tuple[tuple[LayerWork, ...], StepTime]:
        """All layers, and embedding and loss; layouts of other dp or stage have the same."""
        key = (layout.micro_batch_lanes, layout.cp, layout.tp, layout.activation_checkpointing, layout.state_slices)
        if key not in self._made:
            plain = replace(layout.local(self.job), zero_stage=0, shards=1, micro_batches=1)
            again = sums_again(plain), int(plain.checkpointing != "none")
            layers = []
            for layer in plain.model.layers:
                seconds = self._timed_layer(plain, layer, layout.state_slices, layout.cp)
                messages = layer_messages(plain, layer, layout.cp)
                layers += [LayerWork(*seconds, messages, *again)] * layer.repeat
            if layout.cp > 1 and runs_by_block(plain.model):
                layers = [_one_chain(layers, plain)]
            self._made[key] = tuple(layers), ends_time(plain, self.hardware)
        return self._made[key]

    def _timed_layer(self, setting: Setting, layer: object, slices: int, cp: int) -> tuple[Seconds, Seconds, Seconds]:
        """Forward, backward without recomputation, recomputation."""
        step = self._layer_time(setting, layer)
        # of a stack that runs block by block all is one chain, whose slices `stack_calls` counts
        chained = cp > 1 and not runs_by_block(setting.model)
        chained = chained and isinstance(layer, BlockRecurrentConfig) and layer.update == "trained"
        in_chain = CHAIN if setting.tp == 1 else CHAIN | {BESIDE}
        sliced = step
        if slices > 1 and chained:  # fewer rows at a time: what launches and latency cost is paid for each slice
            sliced = self._layer_time(replace(setting, rows=setting.rows // slices), layer)

        def seconds(which: str) -> Seconds:
            found = dict.fromkeys(("entry", "chain", "ring", "rest", "beside"), 0.0)
            for name, part in step.parts.items():
                if name in ENTRY:
                    place = "entry"
                elif chained and name in in_chain:
                    place, part = "chain", sliced.part(name)
                elif chained and name == BESIDE:
                    place = "beside"
                else:
                    place = "ring" if name in RING else "rest"
                value = part.backward - part.again if which == "backward" else getattr(part, which)
                found[place] += value * (slices if place == "chain" else 1)
            return Seconds(**found)

        return seconds("forward"), seconds("backward"), seconds("again")

    def _layer_time(self, setting: Setting, layer: object) -> StepTime:
        """`layer_time`, once for all numbers of slices."""
        key = (setting.rows, setting.segment_tokens, setting.tp, setting.checkpointing, setting.stack_calls, id(layer))
        if key not in self._times:
            self._times[key] = layer_time(setting, self.hardware, layer)
        return self._times[key]


def _sum(step: StepTime, name: str) -> float:
    return float(sum(getattr(part, name) for part in step.parts.values()))


def _one_chain(layers: list[LayerWork], setting: Setting) -> LayerWork:
    """A stack of which every block waits for the whole state of the block before: recomputation is inside the chain."""
    forward = sum(layer.forward.total for layer in layers)
    backward = sum(layer.backward.total + layer.again.total for layer in layers)
    model = setting.model
    carry = whole_state_bytes(setting) if model.memory is None else setting.rows * memory_bytes(model)
    names = ("sums", "sum_calls", "gather", "gather_calls", "path_gradients", "path_calls")
    summed = {name: sum(getattr(layer.messages, name) for layer in layers) for name in names}
    messages = LayerMessages(carry=carry, carry_calls=whole_state_tensors(model), **summed)
    again = layers[0].sums_again, layers[0].gathers_again
    return LayerWork(Seconds(chain=forward), Seconds(chain=backward), Seconds(), messages, *again)
