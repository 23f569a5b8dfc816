"""Halo exchange: the rows just before a rank's share, from the ranks to its left, with gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longspan.errors import ShapeError
from longspan.kernels.context_parallel.messages import Exchange, once
from longspan.kernels.context_parallel.shard import SequenceShard
from longspan.kernels.window_attention.reference import l2_normalise


def halo_exchange(rows: Tensor, first: Tensor, shard: SequenceShard) -> Tensor:
    """The W rows before this rank's share of the sequence.

    With a share shorter than W they come from several ranks, each sending straight to where its rows are needed.
    One message of W rows in each direction where a share is at least W long: 2 * B * W * C elements in forward and
    backward together.

    Args:
        rows: [B, t, C], the last t rows of this rank's share: all of them, or at least W.
        first: [B, W, C], the rows before the whole sequence; the same on all ranks.
        shard: of this rank.

    Returns:
        [B, W, C]; its gradient goes back to the ranks that the rows came from, and to `first`.

    Raises:
        ShapeError: rows and first do not fit together.
    """
    if rows.dim() != 3 or first.dim() != 3 or rows.shape[0] != first.shape[0] or rows.shape[2] != first.shape[2]:
        raise ShapeError(
            f"rows are {list(rows.shape)} and first {list(first.shape)}: they must be [B, t, C], [B, W, C]."
        )
    if shard.size == 1:
        return first
    received = _Halo.apply(rows, first.shape[1], shard)
    return torch.cat([first[:, received.shape[1] :], received], dim=1)


def _lengths(tokens: int, width: int, shard: SequenceShard) -> list[int]:
    """Rows that come from the rank 1, 2, ... places to the left."""
    lengths: list[int] = []
    while sum(lengths) < width and len(lengths) < shard.size - 1:
        lengths.append(min(tokens, width - sum(lengths)))
    return lengths


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, width: int, shard: SequenceShard) -> Tensor:
        batch, tokens, channels = rows.shape
        lengths = list(enumerate(_lengths(tokens, width, shard), 1))

        def exchange() -> list[Tensor]:
            sends = [(rows[:, tokens - n :].contiguous(), hop) for hop, n in lengths if shard.has(hop)]
            received = [(rows.new_empty(batch, n, channels), -hop) for hop, n in lengths if shard.has(-hop)]
            Exchange("halo", shard, sends, received).wait()
            return [tensor for tensor, _ in reversed(received)]

        ctx.lengths, ctx.shard, ctx.shape = lengths, shard, rows.shape
        parts = once(exchange)
        return torch.cat(parts, dim=1) if parts else rows.new_empty(batch, 0, channels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        batch, tokens, channels = ctx.shape
        sends, received, stop = [], [], grad.shape[1]
        for hop, n in ctx.lengths:
            if ctx.shard.has(-hop):
                sends.append((grad[:, stop - n : stop].contiguous(), -hop))
                stop -= n
            if ctx.shard.has(hop):
                received.append((grad.new_empty(batch, n, channels), hop))
        Exchange("halo", ctx.shard, sends, received).wait()
        total = grad.new_zeros(ctx.shape)
        for part, _ in received:  # in order of the hops: the same sum in every run
            total[:, tokens - part.shape[1] :] += part
        return total, None, None


class _WithTail(torch.autograd.Function):
    """A tensor and its last rows; one addition of as many rows in the backward, where an index costs two passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        return x.view_as(x), x[:, -rows:].clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dtail: Tensor | None) -> tuple[Tensor | None, None]:
        if dtail is None:
            return dx, None
        # the gradient of the view given out is this node's alone: its readers made it, or autograd their sum
        total = dtail.new_zeros(ctx.shape) if dx is None else dx
        total[:, -dtail.shape[1] :] += dtail
        return total, None


def window_cache(
    qkv: Tensor, first_keys: Tensor, first_values: Tensor, reset: Tensor, shard: SequenceShard
) -> tuple[Tensor, Tensor, Tensor]:
    """The cache of W keys and values that window attention over this rank's share begins with.

    Rows of a document that ended before the share are zero, as a document start leaves them in a cache; the start
    of a document in the share's first token is the attention's own business.

    Args:
        qkv: [B, T, 3, H, Dh] of this rank's tokens, as projected.
        first_keys, first_values: [B, W, H, Dh] before the whole sequence, keys normalised; the same on all ranks.
        reset: bool [B, T], a document starts with this token.
        shard: of this rank.

    Returns:
        qkv again, for the attention, whose gradient is added to in place; keys, values [B, W, H, Dh].
    """
    if shard.size == 1:
        return qkv, first_keys, first_values
    window, heads = first_keys.shape[1:3]
    qkv, tail = _WithTail.apply(qkv, min(window, qkv.shape[1]))
    keys, values = l2_normalise(tail[:, :, 1]), tail[:, :, 2]
    # document starts travel with the rows: one message instead of two
    starts = reset[:, -window:, None].to(keys.dtype)
    rows = torch.cat([keys.flatten(2), values.flatten(2), starts], dim=-1)
    none = first_keys.new_zeros(first_keys.shape[0], window, 1)
    first = torch.cat([first_keys.flatten(2), first_values.flatten(2), none], dim=-1)
    halo = halo_exchange(rows, first, shard)
    starts = halo[..., -1].detach()
    later = starts.flip(1).cumsum(1).flip(1) - starts  # document starts after each row
    halo = halo[..., :-1].masked_fill((later > 0)[..., None], 0.0).unflatten(-1, (2, heads, -1))
    return qkv, halo[:, :, 0].contiguous(), halo[:, :, 1].contiguous()
