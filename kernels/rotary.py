"""Rotary positions in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

ROTARY_BASE = 10000.0


def rotary_angles(positions: Tensor, half: int) -> Tensor:
    """Angle of each pair of a head at each position (arXiv:2104.09864): position * 10000^(-i / half).

    Args:
        positions: int64 [N].
        half: pairs of a head.

    Returns:
        fp64 [N, half]: at position 4096 the rounding of an fp32 angle alone moves logits by 2e-5.
    """
    frequency = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float64, device=positions.device) / half)
    return positions.to(torch.float64)[:, None] * frequency


def rotate(x: Tensor, first: int) -> Tensor:
    """Rotary positions first, first+1, ... (arXiv:2104.09864): halves of a head are the pairs.

    Args:
        x: [B, T, H, Dh], Dh even.
        first: position of the first token.

    Returns:
        [B, T, H, Dh] in x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    angle = rotary_angles(torch.arange(first, first + x.shape[1], device=x.device), x.shape[-1] // 2)
    cos, sin = angle.cos().to(wide)[:, None, :], angle.sin().to(wide)[:, None, :]
    a, b = x.to(wide).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
