"""Public function of the feed-forward network."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.errors import ShapeError
from longspan.kernels import backend
from longspan.kernels.feed_forward import reference

__all__ = ["feed_forward"]


def feed_forward(x: Tensor, hidden_weight: Tensor, output_weight: Tensor, *, keep_hidden: bool = True) -> Tensor:
    """relu(x W1^T) W2^T with a backward pass that keeps no more than it needs.

    Args:
        x: [..., D].
        hidden_weight: W1 [F, D].
        output_weight: W2 [D', F].
        keep_hidden: keep relu(x W1^T) for the backward pass. Otherwise it is computed there again, a chunk of tokens
            at a time, for a sixth more arithmetic: for long inputs, whose hidden vectors do not fit into memory. The
            plain PyTorch form always keeps it.

    Returns:
        [..., D'], x's type.

    Raises:
        ShapeError: the widths differ.
    """
    flat = x.dim() == 0 or hidden_weight.dim() != 2 or output_weight.dim() != 2
    if flat or hidden_weight.shape[1] != x.shape[-1] or output_weight.shape[1] != hidden_weight.shape[0]:
        raise ShapeError(
            f"x is {list(x.shape)}, W1 {list(hidden_weight.shape)}, W2 {list(output_weight.shape)}: "
            "expected [..., D], [F, D], [D', F]."
        )
    unsupported = None
    if x.dtype == torch.float64:
        unsupported = "the kernel computes in fp32 and these tensors are fp64."
    elif backend.autocasting(x):
        unsupported = backend.NO_AUTOCAST
    elif not x.dtype == hidden_weight.dtype == output_weight.dtype:
        unsupported = f"x is {x.dtype}, the weights {hidden_weight.dtype} and {output_weight.dtype}."
    if backend.choose("feed_forward", x, hidden_weight, output_weight, unsupported=unsupported) == "triton":
        from longspan.kernels.feed_forward.autograd import lean_feed_forward

        return lean_feed_forward(x, hidden_weight, output_weight, keep_hidden)
    return reference.feed_forward(x, hidden_weight, output_weight)
