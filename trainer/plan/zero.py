"""What DeepSpeed's ZeRO keeps on one rank, and what it sends, as the engine configures it. Imports no torch.

R ranks (dp x cp) hold the same parameters. Stages 0 to 2 sum gradients in buckets that the backward pass waits for
(`overlap_comm` is off); stages 1 and 2 then gather the updated weights. Stage 3 gathers the weights of each layer for
its forward and for its backward pass and scatters its gradients, both on a stream of their own.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from longspan.trainer.plan.setting import Setting

# Elements; DeepSpeed's and the engine's own limits, which a test compares.
BUCKET_ELEMENTS = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]


class Collective(NamedTuple):
    """One kind of collective of a step over dp x cp.

    Attributes:
        kind: what is done.
        num_bytes: of the whole vector, all calls of a step added.
        calls: how many in a step.
        overlapped: whether layers compute meanwhile.
    """

    kind: Kind
    num_bytes: float
    calls: int
    overlapped: bool


def traffic(
    stage: int, parameters: int, element: int, micro_batches: int, layers: int, update: bool
) -> list[Collective]:
    """The collectives of one optimizer step.

    Args:
        stage: 0 to 3.
        parameters: of one rank's model, P.
        element: bytes of a weight and of a gradient.
        micro_batches: forward and backward passes of the step; stages 2 and 3 sum gradients in each of them.
        layers: of the model; stage 3 works layer by layer.
        update: whether an optimizer changes weights; without one nothing is gathered at stages 1 and 2.
    """
    vector = float(parameters * element)
    buckets = -(-parameters // BUCKET_ELEMENTS)
    if stage == 3:
        return [
            Collective("all_gather", 2 * micro_batches * vector, 2 * micro_batches * layers, True),
            Collective("reduce_scatter", micro_batches * vector, micro_batches * layers, True),
        ]
    times = micro_batches if stage == 2 else 1
    found = [Collective("all_reduce", times * vector, times * buckets, False)]
    if stage and update:
        found.append(Collective("all_gather", vector, buckets, False))
    return found


def weight_bytes(setting: Setting, parameters: int) -> float:
    """Weights in the compute type. Stage 3 keeps a share, and beside it those in use, up to a limit of DeepSpeed's."""
    whole = float(setting.element_bytes * parameters)
    if setting.zero_stage < 3 or setting.shards == 1:
        return whole
    return whole / setting.shards + setting.element_bytes * min(parameters, MAX_LIVE_PARAMETERS)


def kept_gradient_bytes(setting: Setting, whole: float) -> float:
    """Gradients after the backward pass: all, or this rank's share at stages 2 and 3."""
    return whole / setting.shards if setting.zero_stage >= 2 else whole


def bucket_bytes(setting: Setting, parameters: int) -> float:
    """The buffer in which gradients are summed over the ranks; at stages 2 and 3, or offloaded, one rank has it too."""
    alone = setting.zero_stage > 1 or (setting.zero_stage == 1 and setting.offload_optimizer)
    fills = setting.shards > 1 or (alone and setting.optimizer != "none")
    return float(setting.element_bytes * min(parameters, BUCKET_ELEMENTS)) if fills else 0.0
