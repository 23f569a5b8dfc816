"""Time of one optimizer step of a layout, by formulas; `simulate.py` checks them.

What ranks do alone, plus what they wait for, by cause. The waits are worst cases of ranks in lock step: neighbours meet
at every halo, and all ranks of a sequence when its last state is shared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from longspan.trainer.plan.hardware import Hardware, LinkRates
from longspan.trainer.plan.layout import Job, Layout
from longspan.trainer.plan.links import (
    Group,
    collective_seconds,
    hop_seconds,
    message_seconds,
    neighbour_link,
)
from longspan.trainer.plan.work import LayerWork, Seconds, Work


@dataclass(frozen=True)
class Prediction:
    """Seconds of one optimizer step, by what they go to.

    Attributes:
        compute: what one rank does alone, recomputation included.
        chain: waiting for the state of the rank before, and for its gradient of the rank after.
        halo: exchange of the last W keys and values. ring: keys and values that computation does not hide.
        scan: summaries of linear layers. shared_state: the state after the segment, from the last rank to all.
        tensor: sums and gathers inside layers. zero: gradients and weights over dp x cp.
        host: time in which the device waits for launches. engine: the host's time once a step, around the update.
        update: of the weights.
    """

    compute: float
    chain: float = 0.0
    halo: float = 0.0
    ring: float = 0.0
    scan: float = 0.0
    shared_state: float = 0.0
    tensor: float = 0.0
    zero: float = 0.0
    host: float = 0.0
    engine: float = 0.0
    update: float = 0.0

    @property
    def seconds(self) -> float:
        """The whole step."""
        return float(sum(vars(self).values()))


@dataclass(frozen=True)
class Passes:
    """Seconds that one layer adds to the passes of a micro-batch."""

    forward: float = 0.0
    again: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Of all three."""
        return self.forward + self.again + self.backward


def groups(layout: Layout, links: LinkRates) -> tuple[Group, Group, Group]:
    """Ranks that divide layers, ranks that divide sequences, ranks over which ZeRO divides."""
    tp, cp, dp = layout.tp, layout.cp, layout.dp
    host = links.gpus_per_host
    return Group.of(tp, 1, host), Group.of(cp, tp, host), Group.of(dp * cp, tp, host)


def predict(layout: Layout, work: Work, hardware: Hardware) -> Prediction:
    """Predicted time of one optimizer step."""
    links = hardware.links
    tensor, sequence, _ = groups(layout, links)
    compute = work.ends_forward + work.ends_backward
    passes = ((count, layer.forward, layer.again, layer.backward) for layer, count in work.kinds)
    compute += sum(count * sum(one.total for one in three) for count, *three in passes)
    waits = {
        "chain": chain_seconds(work, sequence, links),
        "halo": _over_layers(work, halo_seconds, sequence, links),
        "ring": _over_layers(work, ring_seconds, sequence, links),
        "scan": _over_layers(work, scan_seconds, sequence, links),
        "shared_state": collective_seconds(links, sequence, "broadcast", *work.shared_state),
        "tensor": tensor_seconds(work, tensor, links),
    }
    host = max(0.0, work.host - compute - sum(waits.values()))
    times = work.micro_batches
    return Prediction(
        compute=times * compute,
        **{name: times * seconds for name, seconds in waits.items()},
        zero=zero_seconds(work, layout, links),
        host=times * host,
        engine=work.engine,
        update=work.update,
    )


def _over_layers(
    work: Work, cost: Callable[[LayerWork, Group, LinkRates], Passes], group: Group, links: LinkRates
) -> float:
    """All layers' seconds; equal ones are asked once."""
    return sum(count * cost(layer, group, links).total for layer, count in work.kinds)


def chain_seconds(work: Work, group: Group, links: LinkRates) -> float:
    """Waits of one micro-batch for states and their gradients.

    R ranks in M slices take 1 + (R-1)/M times one rank's chain, and R-1 messages on the way; what runs beside the chain
    fills that. A chain waits so when all ranks begin it together. A second one of the same pass finds its ranks
    staggered by the first, as it wants them, except where the halos of k layers between have brought k neighbours back
    into step, or stage 3's gathers, which all ranks join, all of them. Recomputation waits for nobody.
    """
    if group.size == 1:
        return 0.0
    gathers = any(collective.overlapped for collective in work.collectives)

    def one_pass(layers: Iterable[LayerWork], which: str) -> float:
        total = 0.0
        for layer, share in _in_step(layers, group.size):
            seconds: Seconds = getattr(layer, which)
            part, size = seconds.chain / work.slices, layer.messages.carry / work.slices
            wait = (group.size - 1) * part + hop_seconds(links, group, size)
            # slices come no faster than the slowest link takes them
            wait += (work.slices - 1) * max(0.0, message_seconds(neighbour_link(links, group), size) - part)
            if gathers or not total:
                total += max(0.0, wait - seconds.beside)
            else:  # those before have left ranks apart by as much as this one's work beside fills
                total += share * wait
        return total

    forward = one_pass(work.layers, "forward")
    return forward if work.truncate else forward + one_pass(work.layers[::-1], "backward")


def _in_step(layers: Iterable[LayerWork], ranks: int) -> Iterable[tuple[LayerWork, float]]:
    """Each layer with a chain, and the share of ranks that reach it together."""
    met: float = ranks
    for layer in layers:
        messages = layer.messages
        met += len(messages.halo) + messages.ring_hops + (ranks if messages.scan else 0)
        if layer.forward.chain:
            yield layer, min(1.0, met / (ranks - 1))
            met = 0


def halo_seconds(layer: LayerWork, group: Group, links: LinkRates) -> Passes:
    """One exchange a pass, that is waited for."""
    if not layer.messages.halo:
        return Passes()
    one = message_seconds(neighbour_link(links, group), sum(layer.messages.halo))
    return Passes(forward=one, backward=one)


def ring_seconds(layer: LayerWork, group: Group, links: LinkRates) -> Passes:
    """What the attention to h + 1 blocks of keys does not hide.

    The next block is under way while one is attended to. In the backward pass the gradients of a block go back behind
    the fetch of the next but one; those of the last block are waited for.
    """
    messages = layer.messages
    hops = messages.ring_hops
    if not hops:
        return Passes()
    link = neighbour_link(links, group)
    fetch, back = message_seconds(link, messages.ring), message_seconds(link, messages.ring_gradients)

    def exposed(seconds: float, attention: float) -> float:
        return max(0.0, seconds - attention / (hops + 1))

    attention = layer.backward.ring
    backward = min(hops, 2) * exposed(fetch, attention) + back
    if hops > 1:
        backward += (hops - 2) * exposed(fetch + back, attention) + exposed(back, attention)
    again = hops * exposed(fetch, layer.again.ring) if layer.again.ring else 0.0
    return Passes(hops * exposed(fetch, layer.forward.ring), again, backward)


def scan_seconds(layer: LayerWork, group: Group, links: LinkRates) -> Passes:
    """Two gathers forward (factor and sum), one backward."""
    messages = layer.messages
    if not messages.scan:
        return Passes()
    forward = collective_seconds(links, group, "all_gather", group.size * messages.scan, 2)
    backward = collective_seconds(links, group, "all_gather", group.size * messages.scan_gradients)
    return Passes(forward=forward, backward=backward)


def layer_tensor_seconds(layer: LayerWork, group: Group, links: LinkRates) -> Passes:
    """Sums and gathers of one layer over tensor-parallel ranks."""
    messages = layer.messages
    if group.size == 1:
        return Passes()
    one = collective_seconds(links, group, "all_reduce", messages.sums, messages.sum_calls)
    gather = collective_seconds(links, group, "all_gather", messages.gather, messages.gather_calls)
    path = collective_seconds(links, group, "all_reduce", messages.path_gradients, messages.path_calls)
    again = layer.sums_again * one + layer.gathers_again * gather
    if layer.again.total:
        return Passes(2 * one + gather, again, 2 * one + gather + path)
    return Passes(2 * one + gather, 0.0, 2 * one + gather + path + again)


def tensor_seconds(work: Work, group: Group, links: LinkRates) -> float:
    """Sums and gathers over tensor-parallel ranks of one micro-batch: computation waits for every one."""
    if group.size == 1:
        return 0.0
    layers = _over_layers(work, layer_tensor_seconds, group, links)
    embedding, loss, loss_gradient = work.ends_sums
    calls = ((embedding, 1), (loss, 2), (loss_gradient, 1))
    return layers + sum(collective_seconds(links, group, "all_reduce", size, count) for size, count in calls)


def zero_seconds(work: Work, layout: Layout, links: LinkRates) -> float:
    """What ZeRO adds to a step: all of it where nothing overlaps, else what the layers do not hide."""
    tensor, sequence, data = groups(layout, links)
    if not any(collective.overlapped for collective in work.collectives):
        return sum(collective_seconds(links, data, c.kind, c.num_bytes, c.calls) for c in work.collectives)
    gather, scatter = (
        collective_seconds(links, data, c.kind, c.num_bytes, c.calls) / c.calls for c in work.collectives
    )
    beside: dict[int, tuple[float, float]] = {}
    for layer, _ in work.kinds:
        waits = [function(layer, sequence, links) for function in (halo_seconds, ring_seconds, scan_seconds)]
        waits.append(layer_tensor_seconds(layer, tensor, links))
        own = layer.again.total + layer.backward.total
        beside[id(layer)] = (
            layer.forward.total + sum(wait.forward for wait in waits),
            own + sum(wait.again + wait.backward for wait in waits),
        )
    forward, backward = zip(*(beside[id(layer)] for layer in work.layers), strict=True)
    exposed = 2 * gather + scatter  # the first layer of each pass, and the last gradients
    exposed += sum(max(0.0, gather - seconds) for seconds in forward[:-1])
    exposed += sum(max(0.0, gather + scatter - seconds) for seconds in backward[1:])
    return work.micro_batches * exposed


def reference(job: Job, layout: Layout) -> tuple[Job, Layout]:
    """One GPU with the same work: the tokens that one GPU of `layout` has, in the same number of micro-batches."""
    segment, rows, tp = job.setting.segment_tokens // layout.cp, layout.micro_batch_lanes, layout.tp
    if rows % tp == 0:
        rows //= tp
    elif segment % (tp * job.setting.model.quantum) == 0:
        segment //= tp
    setting = dataclasses.replace(job.setting, segment_tokens=segment)
    stage = 1 if setting.optimizer == "adamw" and setting.precision == "bf16" else 0
    alone = Layout(1, 1, 1, stage, 1, layout.activation_checkpointing, rows, layout.micro_batches)
    return Job(setting, rows * layout.micro_batches), alone
