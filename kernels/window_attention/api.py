"""Public function of window attention."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.errors import ShapeError
from longspan.kernels.window_attention.reference import (
    attend_anywhere,
    attend_windows,
    l2_normalise,
    last_window,
)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cached_keys: Tensor,
    cached_values: Tensor,
    bias_table: Tensor,
    scale: Tensor,
    *,
    reset: Tensor,
    reset_grid: int = 1,
    drop: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention to exactly the W earlier tokens of each token, itself not included (arXiv:2203.07852).

    Queries and keys are l2-normalised per head; logit = (q . k + T5 bias of the distance) * |scale|. Positions
    before a document's start are null keys: zero key and value, not masked, so their logit is the bias alone.

    Args:
        q, k, v: [B, T, H, Dh], as projected; any T.
        cached_keys, cached_values: [B, W, H, Dh] of the W tokens before, keys normalised; zero before a document.
        bias_table: [H, 32].
        scale: [H].
        reset: bool [B, T], a document starts with this token.
        reset_grid: resets fall on multiples of this many tokens only. A multiple of W is fastest.
        drop: [H, W, 2W] multiplier of the probabilities, shared by rows and blocks; None: no dropout.

    Returns:
        out [B, T, H, Dh]; keys, values [B, W, H, Dh]: the cache for the next call.

    Raises:
        ShapeError: q, cache and reset do not fit together.
    """
    window = cached_keys.shape[1]
    if q.shape[:2] != reset.shape or cached_keys.shape != (q.shape[0], window, *q.shape[2:]):
        raise ShapeError(
            f"q is {list(q.shape)}, the cache {list(cached_keys.shape)}, reset {list(reset.shape)}: they must be "
            "[B, T, H, Dh], [B, W, H, Dh] and [B, T]. Pass the state of the same rows."
        )
    q = l2_normalise(q, scale)
    keys = torch.cat([cached_keys, l2_normalise(k)], dim=1)
    values = torch.cat([cached_values, v], dim=1)
    bias_of = (bias_table, scale)
    # asking costs one device synchronisation, the general form many passes over the scores
    if reset_grid % window == 0 or not bool(reset.any()):
        out = attend_windows(q, keys, values, bias_of, reset[:, ::window], drop)
    else:
        out = attend_anywhere(q, keys, values, bias_of, reset, drop)
    return out, last_window(keys, reset, window), last_window(values, reset, window)
