"""Causal attention with rotary positions and a cache of fixed size, in plain PyTorch.

Letters: B rows, T tokens, C context tokens, H heads, Dh width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

QUERY_CHUNK_TOKENS = 512


def attend_context(
    q: Tensor, keys: Tensor, values: Tensor, document: Tensor, first_valid: Tensor, dropout: float
) -> Tensor:
    """Each token attends itself and at most C - 1 tokens before it, of its document only.

    Args:
        q: [B, T, H, Dh], rotated.
        keys: [B, C-1+T, H, Dh], rotated, cache in front.
        values: [B, C-1+T, H, Dh].
        document: int64 [B, C-1+T], number of the document of each key.
        first_valid: int64 [B], first key that holds a token.
        dropout: probability of a dropped attention weight.

    Returns:
        [B, T, H, Dh].
    """
    tokens = q.shape[1]
    cached = keys.shape[1] - tokens
    place = torch.arange(keys.shape[1], device=q.device)
    usable = place[None, :] >= first_valid[:, None]
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    outputs = []
    for begin in range(0, tokens, QUERY_CHUNK_TOKENS):
        end = min(begin + QUERY_CHUNK_TOKENS, tokens)
        seen = slice(begin, cached + end)
        distance = place[cached + begin : cached + end, None] - place[None, seen]
        mask = (distance >= 0) & (distance <= cached) & usable[:, None, seen]
        mask = mask & (document[:, cached + begin : cached + end, None] == document[:, None, seen])
        out = F.scaled_dot_product_attention(
            q[:, begin:end].transpose(1, 2), keys[:, :, seen], values[:, :, seen], mask.unsqueeze(1), dropout
        )
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1)
