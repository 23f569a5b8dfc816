"""Which inputs the fused window attention takes. Imports no triton."""

from __future__ import annotations

import torch
from torch import Tensor

WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float32)


def unsupported(qkv: Tensor) -> str | None:
    """Why the fused form cannot take this qkv [B, T, 3, H, Dh], or None."""
    if qkv.dtype not in DTYPES:
        return f"the fused kernel takes bf16 and fp32, not {str(qkv.dtype).removeprefix('torch.')}."
    if qkv.shape[-1] not in WIDTHS:
        return f"the fused kernel takes heads of width {', '.join(map(str, WIDTHS))}, not {qkv.shape[-1]}."
    return None
