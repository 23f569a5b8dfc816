"""What DeepSpeed's ZeRO optimizers need not do: the engine has done it, or there is nothing to do.

Whether a step is taken, and the norm of its gradient, come out of the one sum over all ranks that the engine waits for
anyway. DeepSpeed would look at every parameter by itself (stages 1 and 2 with bf16: 13 kernels for the check and 2 for
the norm of each, most of what a step of a small model launches), and wait for the device and the other ranks again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from longspan.errors import ClusterError


def leave_gradients(zero: Any) -> None:
    """At stage 1 on one rank: let gradients stay where autograd has put them.

    DeepSpeed would copy each into a bucket, divide the bucket by one rank, and copy each back. If it did not ask this
    method any more it would do so again: slower, and as right.

    Args:
        zero: its optimizer, made with `contiguous_gradients: false` (which leaves out a hook for each parameter too).
    """
    _replace(zero, "reduce_ready_partitions_and_remove_grads", lambda param, group: None)


class AgreedNorm:
    """The norm by which one ZeRO optimizer clips; one that is not finite makes it refuse its step.

    Of stages 1 and 2 the check of every gradient, which comes before the norm, is left out: what it looks for makes
    the norm infinite or NaN too.
    """

    def __init__(self, zero: Any, stage: int) -> None:
        """
        Args:
            zero: DeepSpeed's optimizer of this stage; anything at stage 0, where the engine clips.
            stage: ZeRO stage.

        Raises:
            ClusterError: this DeepSpeed has not the methods that would compute it.
        """
        self._norm = torch.tensor(math.inf)
        if stage in (1, 2):
            _replace(zero, "check_overflow", lambda partition_gradients: None)
            _replace(zero, "scaled_global_norm", lambda: self._norm)
        if stage == 3:
            _replace(zero, "_get_norm_groups", lambda: [self._norm])  # parts of a norm, of which the whole is one

    def set(self, norm: float) -> None:
        """Of the gradients that the next step finds; infinity lets it forget them and change nothing."""
        # a scalar on the host, which needs no kernel and no waiting
        self._norm = torch.tensor(norm, dtype=torch.float32)


def _replace(zero: Any, name: str, answer: Callable[..., Any]) -> None:
    """Of this one optimizer. DeepSpeed never promised to keep these methods: better an error than to set in vain."""
    if not callable(getattr(zero, name, None)):
        raise ClusterError(
            f"deepspeed's {type(zero).__name__} has no method {name}, on which training builds. "
            "Install deepspeed 0.19.8."
        )
    setattr(zero, name, answer)
