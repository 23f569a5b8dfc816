"""Window attention in plain PyTorch, one batched product over all blocks.

Letters: B rows, T tokens, W window, H heads, Dh width of a head, n blocks, b tokens of a block, K = W + b keys.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from longspan.kernels.rotary import rotate

NUM_BUCKETS = 32
MAX_DISTANCE = 128
MASKED = -1e6
Positions = Literal["t5", "rope"]
# In the exact softmax of the paper's code a further logit of -1000 takes part, so that a row without any key
# gives 0. Here every query has W keys (null keys are keys) with logits far above it: the term is exactly 0 in
# fp32 and is left out.


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` itself if fp32 or fp64, else `x` in fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def l2_normalise(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension, times |scale| per head; computed in fp32 or more.

    Args:
        x: [..., H, Dh].
        scale: [H] or None.

    Returns:
        [..., H, Dh] in x's dtype.
    """
    wide = at_least_fp32(x)
    factor = torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)
    if scale is not None:
        factor = factor * at_least_fp32(scale).abs()[:, None]
    return (wide * factor).to(x.dtype)


def t5_buckets(distance: Tensor) -> Tensor:
    """Unidirectional T5 bucket of each distance: exact below 16, then logarithmic up to 128; int64, same shape.

    Args:
        distance: int64, >= 0.
    """
    exact = NUM_BUCKETS // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(MAX_DISTANCE / exact)
    logarithmic = exact + (ratio * (NUM_BUCKETS - exact)).floor().long()
    return torch.where(distance < exact, distance, logarithmic.clamp(max=NUM_BUCKETS - 1))


@lru_cache(maxsize=32)
def _geometry(window: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(bucket int64 [b, W+b], invisible bool [b, W+b]) of queries that line up with the last b keys."""
    # never an inference tensor: a cached one would break the next training step
    with torch.inference_mode(False):
        queries = torch.arange(window, window + block)[:, None]
        distance = queries - torch.arange(window + block)[None, :]
        invisible = (distance <= 0) | (distance > window)
        return t5_buckets(distance.clamp(min=0)).to(device), invisible.to(device)


def scaled_bias(table: Tensor, scale: Tensor, window: int, block: int) -> Tensor:
    """(T5 bias) * |scale| with -1e6 where a query may not look: strictly earlier keys, at most W back.

    Args:
        table: [H, 32].
        scale: [H].

    Returns:
        [H, b, W+b] in fp32 or more.
    """
    bucket, invisible = _geometry(window, block, table.device)
    scaled = at_least_fp32(table) * at_least_fp32(scale).abs()[:, None]
    return scaled[:, bucket].masked_fill(invisible, MASKED)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, same: Tensor | None, drop: Tensor | None) -> Tensor:
    """Softmax attention of blocks; keys of another document are null keys: logit = bias, value 0.

    Args:
        q: [B, n, H, b, Dh] normalised and scaled.
        k, v: [B, n, H, K, Dh].
        bias: [H, b, K], masked.
        same: bool [B, n, 1, b, K], whether query and key are of one document; None: all are, or the others are
            zeroed already.
        drop: [H, b, K] multiplier of the probabilities, or None.

    Returns:
        [B, n, H, b, Dh] in v's dtype.
    """
    scores = at_least_fp32(torch.matmul(q, k.transpose(-1, -2)))
    if same is not None:
        scores = scores.masked_fill(~same, 0.0)
    probabilities = torch.softmax(scores.add_(bias), dim=-1)
    if drop is not None:
        probabilities = probabilities * drop
    if same is not None:
        probabilities = probabilities.masked_fill(~same, 0.0)
    return torch.matmul(probabilities.to(v.dtype), v)


def block_windows(full: Tensor, starts: Tensor | None, window: int) -> Tensor:
    """Keys (or values) that each whole block sees: the block before it and itself.

    Args:
        full: [B, W+T, H, Dh], cache in front; T >= W, tokens after the last whole block are left out.
        starts: bool [B, n], whether a document starts with the block: what comes before it is zeroed. None: nowhere.

    Returns:
        [B, n, H, 2W, Dh] contiguous.
    """
    length = full.shape[1]
    blocks = (length - window) // window
    cut = full[:, : (blocks + 1) * window].unflatten(1, (blocks + 1, window)).transpose(2, 3)
    before = cut[:, :-1]
    if starts is not None:
        before = before.masked_fill(starts[:, :, None, None, None], 0.0)
    return torch.cat([before, cut[:, 1:]], dim=3)


def last_window(full: Tensor, reset: Tensor, window: int) -> Tensor:
    """The next call's cache: the last W tokens, zeroed before the last document start.

    Args:
        full: [B, W+T, H, Dh].
        reset: bool [B, T], a document starts with this token.

    Returns:
        [B, W, H, Dh].
    """
    later_starts = reset.flip(1).cumsum(1).flip(1)  # document starts at or after each token
    stale = torch.nn.functional.pad(later_starts[:, 1:], (0, 1))  # a document starts after it
    first = later_starts[:, :1].expand(-1, full.shape[1] - reset.shape[1])  # tokens of the old cache
    stale = torch.cat([first, stale], dim=1)[:, -window:] > 0
    return full[:, -window:].masked_fill(stale[:, :, None, None], 0.0)


def attend_segment(
    qkv: Tensor,
    cached_keys: Tensor,
    cached_values: Tensor,
    bias_table: Tensor | None,
    scale: Tensor,
    reset: Tensor,
    reset_grid: int,
    drop: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`api.window_attention` in plain PyTorch; arguments as there, bias_table None for rotary positions.

    Returns:
        out [B, T, H, Dh]; keys, values [B, W, H, Dh]: the cache for the next call.
    """
    window = cached_keys.shape[1]
    q, k, v = qkv.unbind(2)
    q = l2_normalise(q, scale)
    keys = torch.cat([cached_keys, l2_normalise(k)], dim=1)
    values = torch.cat([cached_values, v], dim=1)
    turned = keys
    if bias_table is None:
        q, turned = rotate(q, window), rotate(keys, 0)
        bias_table = scale.new_zeros(scale.shape[0], NUM_BUCKETS)
    bias_of = (bias_table, scale)
    # asking costs one device synchronisation, the general form many passes over the scores
    if reset_grid % window == 0 or not bool(reset.any()):
        out = attend_windows(q, turned, values, bias_of, reset[:, ::window], drop)
    else:
        out = attend_anywhere(q, turned, values, bias_of, reset, drop)
    return out, last_window(keys, reset, window), last_window(values, reset, window)


def attend_windows(
    q: Tensor, keys: Tensor, values: Tensor, bias_of: tuple[Tensor, Tensor], starts: Tensor, drop: Tensor | None
) -> Tensor:
    """Attention of T tokens when documents start on edges of blocks of W tokens only.

    Args:
        q: [B, T, H, Dh] normalised and scaled.
        keys, values: [B, W+T, H, Dh], cache in front.
        bias_of: (table [H, 32], scale [H]).
        starts: bool [B, ceil(T/W)].
        drop: [H, W, 2W] or None.

    Returns:
        [B, T, H, Dh].
    """
    tokens, window = q.shape[1], keys.shape[1] - q.shape[1]
    blocks, rest = divmod(tokens, window)
    outputs = []
    if blocks:
        k, v = (block_windows(x, starts[:, :blocks], window) for x in (keys, values))
        outputs.append(attend_blocks(q[:, : blocks * window], k, v, bias_of, drop))
    if rest:
        outputs.append(attend_rest(q, keys, values, bias_of, starts, drop))
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, bias_of: tuple[Tensor, Tensor], drop: Tensor | None) -> Tensor:
    """Attention of whole blocks.

    Args:
        q: [B, n*W, H, Dh].
        k, v: [B, n, H, 2W, Dh] of `block_windows`.

    Returns:
        [B, n*W, H, Dh].
    """
    window = k.shape[3] // 2
    blocked = q.unflatten(1, (-1, window)).transpose(2, 3)
    out = attend(blocked, k, v, scaled_bias(*bias_of, window, window), None, drop)
    return out.transpose(2, 3).flatten(1, 2)


def attend_rest(
    q: Tensor, keys: Tensor, values: Tensor, bias_of: tuple[Tensor, Tensor], starts: Tensor, drop: Tensor | None
) -> Tensor:
    """Attention of the r = T % W > 0 tokens after the last whole block; arguments as `attend_windows`.

    Returns:
        [B, r, H, Dh].
    """
    tokens, window = q.shape[1], keys.shape[1] - q.shape[1]
    rest = tokens % window
    fresh = starts[:, -1, None, None, None]
    k, v = (
        torch.cat([x[:, -window - rest : -rest].masked_fill(fresh, 0.0), x[:, -rest:]], dim=1)
        .transpose(1, 2)
        .unsqueeze(1)
        for x in (keys, values)
    )
    drop = None if drop is None else drop[:, :rest, : window + rest]
    out = attend(q[:, -rest:].transpose(1, 2).unsqueeze(1), k, v, scaled_bias(*bias_of, window, rest), None, drop)
    return out[:, 0].transpose(1, 2)


def attend_anywhere(
    q: Tensor, keys: Tensor, values: Tensor, bias_of: tuple[Tensor, Tensor], reset: Tensor, drop: Tensor | None
) -> Tensor:
    """Attention of T tokens when documents start anywhere; slower. Arguments as `attend_windows`.

    Args:
        reset: bool [B, T].

    Returns:
        [B, T, H, Dh].
    """
    tokens, window = q.shape[1], keys.shape[1] - q.shape[1]
    pad = -tokens % window
    document = torch.nn.functional.pad(reset.cumsum(1), (window, 0))  # the cache belongs to document 0
    q, keys, values, document = (
        torch.nn.functional.pad(q, (0, 0, 0, 0, 0, pad)),
        torch.nn.functional.pad(keys, (0, 0, 0, 0, 0, pad)),
        torch.nn.functional.pad(values, (0, 0, 0, 0, 0, pad)),
        torch.nn.functional.pad(document, (0, pad), value=-1),
    )
    blocked = document.unflatten(1, (-1, window))
    of_keys = torch.cat([blocked[:, :-1], blocked[:, 1:]], dim=2)
    same = (blocked[:, 1:, :, None] == of_keys[:, :, None, :]).unsqueeze(2)
    k, v = (block_windows(x, None, window) for x in (keys, values))
    out = attend(q.unflatten(1, (-1, window)).transpose(2, 3), k, v, scaled_bias(*bias_of, window, window), same, drop)
    return out.transpose(2, 3).flatten(1, 2)[:, :tokens]
