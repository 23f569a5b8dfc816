"""Public function of full attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.errors import ShapeError
from longspan.kernels.checks import check_devices, check_reset, check_shapes
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
        q, k, v: [B, T, H, Dh], as projected; any T > 0, Dh even.
        cached_keys, cached_values: [B, C-1, H, Dh], the tokens before, right-aligned, keys unrotated.
        cached_tokens: int64 [B], how many of them there are.
        reset: bool [B, T], a document starts with this token.
        dropout: probability of a dropped attention weight.

    Returns:
        out [B, T, H, Dh]; keys, values [B, C-1, H, Dh] and cached_tokens [B] for the next call.

    Raises:
        ShapeError: the tensors do not fit together, have no tokens or heads of odd width, or are on different
            devices; reset is not bool.
    """
    _check(q, k, v, cached_keys, cached_values, cached_tokens, reset)
    tokens, cached = q.shape[1], cached_keys.shape[1]
    keys = torch.cat([cached_keys, k], dim=1)
    values = torch.cat([cached_values, v], dim=1)
    document = F.pad(reset.long().cumsum(1), (cached, 0))
    out = attend_context(rotate(q, cached), rotate(keys, 0), values, document, cached - cached_tokens, dropout)
    own = (document == document[:, -1:])[:, cached:].sum(1)
    valid = torch.where(document[:, -1] > 0, own, own + cached_tokens).clamp(max=cached)
    kept = slice(tokens, tokens + cached)
    return out, keys[:, kept].contiguous(), values[:, kept].contiguous(), valid


def _check(
    q: Tensor, k: Tensor, v: Tensor, cached_keys: Tensor, cached_values: Tensor, cached_tokens: Tensor, reset: Tensor
) -> None:
    if q.ndim != 4 or 0 in q.shape[1:] or q.shape[3] % 2:
        raise ShapeError(
            f"q is {list(q.shape)}: it must be [B, T, H, Dh] with at least one token and one head, of an even width "
            "(rotary positions turn pairs). Skip the call where there are no tokens."
        )
    if cached_keys.ndim != 4:
        raise ShapeError(f"cached_keys is {list(cached_keys.shape)}: it must be [B, C-1, H, Dh]. Pass the last state.")
    rows, tokens, heads, width = q.shape
    cache = (rows, cached_keys.shape[1], heads, width)
    check_shapes(
        {
            "k": (k, q.shape),
            "v": (v, q.shape),
            "cached_keys": (cached_keys, cache),
            "cached_values": (cached_values, cache),
            "cached_tokens": (cached_tokens, (rows,)),
            "reset": (reset, (rows, tokens)),
        }
    )
    check_reset(reset)
    check_devices("full_attention", q, k, v, cached_keys, cached_values, cached_tokens, reset)
