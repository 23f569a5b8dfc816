"""RMS normalisation in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6


def rms_norm(x: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """x / sqrt(mean x^2 + 1e-6) * weight, statistics in fp32 or more, times the mask tiled over the sequence.

    Args:
        x: [..., D]; with a mask [..., T, D].
        weight: [D].
        mask: [M, D], or None.

    Returns:
        Like x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
    h = (wide * factor * weight.to(wide.dtype)).to(x.dtype)
    return h if mask is None else multiply_tiled(h, mask)


def multiply_tiled(x: Tensor, mask: Tensor) -> Tensor:
    """Token t of every row times row t mod M of the mask.

    Args:
        x: [..., T, D].
        mask: [M, D].

    Returns:
        Like x.
    """
    tokens, tile = x.shape[-2], mask.shape[0]
    if tokens % tile == 0:  # nothing as long as the sequence is made from the mask
        return (x.unflatten(-2, (-1, tile)) * mask).flatten(-3, -2)
    return x * mask.repeat(-(-tokens // tile), 1)[:tokens]
