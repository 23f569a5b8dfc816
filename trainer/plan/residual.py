"""Passes over [tokens, dim] of what stands between mixers and feed-forward networks: norms, residual sums, copies.

Read off `modeling/stack.py`, `kernels/norm/triton.py` and `kernels/tensor_parallel/collectives.py`; a pass is one
tensor read or one written:

| what | forward | backward |
| --- | --- | --- |
| norm of a sum that a product has made in place | stream, norm | norm (or sum), its gradient, the stream's, result: 4 |
| sum and norm in one kernel | both summands, sum, norm | 4 |
| norm of a layer that begins with a whole stream | stream, norm | 4 |
| the sum behind a layer that is called alone (checkpointing `layer`), or behind the last one | summands, sum | 0 |
| dropout of the network's result | value, product | 2 |
| gradients of a mixer's input, if it has several projections: each addition | | both, sum |
| a sum over tensor-parallel ranks, which clones: two a layer in each pass | value, copy | value, copy |

That a product in place reads the residual too is left to its own time: of the 22 us of such a pass at 32,768 x 1024 it
showed 13.5 in the products 1024 deep and 0.1 in those 4096 deep (docs/decisions/022-residual-sums-in-place.md). So are
numbers of one a row (1 / RMS) and masks.
"""

from __future__ import annotations

from typing import NamedTuple

from longspan.modeling.config import (
    BlockRecurrentConfig,
    FullAttentionConfig,
    LinearAttentionConfig,
    SlidingWindowConfig,
)
from longspan.trainer.plan.memory import sums_in_place
from longspan.trainer.plan.setting import Setting

NORM, SUM_AND_NORM, SUM, COPY = 2, 4, 3, 2
NORM_BACKWARD = 4
FINAL_NORM_BACKWARD = 3  # no gradient goes past it


class Passes(NamedTuple):
    """Passes over [tokens, dim]; `again` is what recomputation repeats of the forward ones."""

    forward: int
    backward: int
    again: int = 0


def layer_passes(setting: Setting, layer: object) -> Passes:
    """Of one layer behind another; what the first and the last have otherwise is `ends_passes`'.

    Args:
        setting: of one rank.
        layer: its configuration.
    """
    dropout, divided = setting.model.dropout > 0, setting.tp > 1
    if setting.checkpointing == "layer":
        again = NORM + SUM_AND_NORM + COPY * sums_again(setting) * divided
        forward = NORM + SUM_AND_NORM + SUM
    else:
        again = 0
        forward = NORM + (NORM if _adds_in_place(setting, layer) else SUM_AND_NORM)
        if not sums_in_place(setting):  # the layer before leaves its sum to this one
            forward += SUM_AND_NORM - NORM
    copies = COPY * (dropout + 2 * divided)
    return Passes(forward + copies, 2 * NORM_BACKWARD + SUM * _gradients_added(setting, layer) + copies, again)


def ends_passes(setting: Setting) -> Passes:
    """Of the final norm, and what first and last layer have beside `layer_passes`."""
    forward = NORM
    if sums_in_place(setting):
        if _adds_in_place(setting, setting.model.layers[0]):
            forward += SUM_AND_NORM - NORM  # the first mixer must not write over the embedding's result
    elif setting.checkpointing != "layer":
        forward += SUM - (SUM_AND_NORM - NORM)  # behind the last layer, not in front of the first
    return Passes(forward, FINAL_NORM_BACKWARD)


def sums_again(setting: Setting) -> int:
    """How many of a layer's two sums over tensor-parallel ranks its recomputation repeats.

    The mixer's, in front of the second norm. Recomputation ends with the last tensor that is kept: the feed-forward
    network's input; with dropout the mask behind its sum.
    """
    if setting.checkpointing != "layer":
        return 0
    return 2 if setting.model.dropout else 1


def _gradients_added(setting: Setting, layer: object) -> int:
    """Gradients of a mixer's input that autograd adds up, one fewer than there are projections of their own."""
    if isinstance(layer, FullAttentionConfig | LinearAttentionConfig):
        return 2  # query, key and value
    return int(setting.model.feedback and isinstance(layer, SlidingWindowConfig))  # the query of the state


def _adds_in_place(setting: Setting, layer: object) -> bool:
    """Whether a mixer's output projection adds to the stream: not where the mixer runs again, and adds again."""
    has_projection = isinstance(layer, SlidingWindowConfig | BlockRecurrentConfig)
    return has_projection and sums_in_place(setting) and setting.checkpointing == "none"
