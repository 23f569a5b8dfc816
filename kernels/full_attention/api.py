"""Public function of full attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.errors import ShapeError
from longspan.kernels.full_attention.reference import attend_context
from longspan.kernels.rotary import rotate


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cached_keys: Tensor,
    cached_values: Tensor,
    cached_tokens: Tensor,
    *,
    reset: Tensor,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Causal softmax attention with rotary positions over the last C tokens of the document, itself included.

    Rotary positions are relative, so cached keys are stored unrotated and get their place in each call. Tokens of
    another document are masked.

    Args:
        q, k, v: [B, T, H, Dh], as projected.
        cached_keys, cached_values: [B, C-1, H, Dh], the tokens before, right-aligned, keys unrotated.
        cached_tokens: int64 [B], how many of them there are.
        reset: bool [B, T], a document starts with this token.
        dropout: probability of a dropped attention weight.

    Returns:
        out [B, T, H, Dh]; keys, values [B, C-1, H, Dh] and cached_tokens [B] for the next call.

    Raises:
        ShapeError: q, cache and reset do not fit together.
    """
    tokens, cached = q.shape[1], cached_keys.shape[1]
    if q.shape[:2] != reset.shape or cached_keys.shape != (q.shape[0], cached, *q.shape[2:]):
        raise ShapeError(
            f"q is {list(q.shape)}, the cache {list(cached_keys.shape)}, reset {list(reset.shape)}: they must be "
            "[B, T, H, Dh], [B, C-1, H, Dh] and [B, T]. Pass the state of the same rows."
        )
    keys = torch.cat([cached_keys, k], dim=1)
    values = torch.cat([cached_values, v], dim=1)
    document = F.pad(reset.long().cumsum(1), (cached, 0))
    out = attend_context(rotate(q, cached), rotate(keys, 0), values, document, cached - cached_tokens, dropout)
    own = (document == document[:, -1:])[:, cached:].sum(1)
    valid = torch.where(document[:, -1] > 0, own, own + cached_tokens).clamp(max=cached)
    kept = slice(tokens, tokens + cached)
    return out, keys[:, kept].contiguous(), values[:, kept].contiguous(), valid
