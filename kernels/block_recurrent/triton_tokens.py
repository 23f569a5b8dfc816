"""The tokens' side in Triton: normalised keys with the cache in front, and the read of the states.

Letters: B rows, T tokens, W window, n blocks, S state vectors, H heads, Dh width of a head. Tensors of tokens may lie
apart by any stride; heads are dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from longspan.kernels.block_recurrent.tiles import (
    READ,
    READ_KEYS,
    READ_KEYS_POINTERS,
    READ_QUERIES,
    TOKEN_WIDE,
    Tiles,
    divide,
    fitting,
)
from longspan.kernels.block_recurrent.triton_token_kernels import (
    read_key_gradient_kernel,
    read_query_gradient_kernel,
    read_states_kernel,
    token_keys_kernel,
)
from longspan.kernels.launches import blocks_of
from longspan.kernels.window_attention.fused import copies_tiles

KEY_ROWS = 32  # tokens of one head in a tile of the normalisation


def dense_heads(x: Tensor) -> Tensor:
    """`x` [..., H, Dh] itself if its heads are dense, else a copy."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def token_keys(
    qkv: Tensor, cached_keys: Tensor, cached_values: Tensor, first: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values as the state sees them, a part of the segment.

    Args:
        qkv: [B, T, 3, H, Dh] as projected, dense but for the first two dimensions.
        cached_keys, cached_values: [B, W, H, Dh], dense, keys normalised.
        first, count: rows first..first+count-1, counted from the first of the cache.

    Returns:
        keys, normalised, and values [B, count, H, Dh]; fp32 [B, count, H], what normalised the keys.
    """
    rows, _, _, heads, width = qkv.shape
    keys = qkv.new_empty(rows, count, heads, width)
    values, inv = torch.empty_like(keys), qkv.new_empty(rows, count, heads, dtype=torch.float32)
    token_keys_kernel[(blocks_of(count, KEY_ROWS), heads, rows)](
        qkv, cached_keys, cached_values, keys, values, inv, first, count, cached_keys.shape[1], *qkv.stride()[:2],
        heads, width, KEY_ROWS,
    )  # fmt: skip
    return keys, values, inv


def read_tiles(window: int, states: int, wide: bool) -> Tiles:
    """Tiles of the read: queries (tokens), keys (states)."""
    return fitting(TOKEN_WIDE if wide else READ, window, states)


def query_tiles(window: int, states: int, wide: bool) -> Tiles:
    """Tiles of the gradient of the queries: queries (tokens), keys (states)."""
    return fitting(TOKEN_WIDE if wide else READ_QUERIES, window, states)


def key_tiles(window: int, states: int, wide: bool, fetched: bool) -> Tiles:
    """Tiles of the gradient of the states' keys and values: queries (tokens), keys (states)."""
    return fitting(TOKEN_WIDE if wide else READ_KEYS if fetched else READ_KEYS_POINTERS, window, states)


def _fetched(tokens: int, window: int, states: int, *tensors: Tensor) -> bool:
    """Whether the copy engine can fetch tiles of tensors [..., H, Dh] for every kernel of the read.

    It can if nothing is cut off, all rows begin at multiples of 16 bytes and none is another one again. With 8 x 4096
    tokens on an H100 the read then takes 165 us instead of 176, and its gradient 616 instead of 684.
    """
    whole = tokens % window == 0 and divide(fitting(READ_KEYS, window, states), window, states)
    starts = all(x.data_ptr() % 16 == 0 for x in tensors)
    rows = all(step > 0 and step * x.element_size() % 16 == 0 for x in tensors for step in x.stride()[:-1])
    return whole and starts and rows and copies_tiles(tensors[0].device)


def _pieces(x: Tensor, fetched: bool, *piece: int) -> Tensor | TensorDescriptor:
    """x [..., H, Dh], dense heads, as the kernels load it: if fetched, in pieces of this shape of [..., H * Dh]."""
    if not fetched:
        return x
    return TensorDescriptor(x, [*x.shape[:-2], x.shape[-2] * x.shape[-1]], [*x.stride()[:-2], 1], list(piece))


def _options(tiles: Tiles, queries: Tensor, window: int, states: int, fetched: bool) -> dict[str, Any]:
    """Constants of the kernels: sizes, whether nothing is cut off, and whether the copy engine fetches tiles."""
    heads, width = queries.shape[2:]
    even = queries.shape[1] % window == 0 and divide(tiles, window, states)
    sizes = {"H": heads, "DH": width, "BM": tiles.rows, "BN": tiles.columns, "EVEN": even, "TMA": fetched}
    return {**sizes, "num_warps": tiles.warps, "num_stages": tiles.stages}


def read_forward(
    queries: Tensor, scale: Tensor, keys: Tensor, values: Tensor, window: int, out: Tensor, lses: Tensor
) -> None:
    """Write what `read_states` gives, and the base-2 log of the sum of exponentials.

    Args:
        queries: [B, T, H, Dh], dense heads; scale: [H].
        keys, values: [B, n, S, H, Dh], n = ceil(T/W), equal strides, dense heads.
        window: W.
        out: [B, T, H, Dh], dense heads; lses: fp32 [B, H, T], dense tokens.
    """
    rows, tokens, heads, width = queries.shape
    blocks, states = keys.shape[1:3]
    tiles = read_tiles(window, states, queries.element_size() == 4)
    fetched = _fetched(tokens, window, states, keys, values)
    read_states_kernel[(blocks * blocks_of(window, tiles.rows), heads, rows)](
        queries, scale, *(_pieces(x, fetched, 1, 1, tiles.columns, width) for x in (keys, values)), out, lses,
        tokens, window, states,
        *queries.stride()[:2], *keys.stride()[:3], *out.stride()[:2], *lses.stride()[:2],
        **_options(tiles, queries, window, states, fetched),
    )  # fmt: skip


def read_backward(
    queries: Tensor,
    scale: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int,
    out: Tensor,
    lses: Tensor,
    dout: Tensor,
    dqueries: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of `read_forward`.

    Args:
        queries .. lses: as there.
        dout: [B, T, H, Dh], dense heads.
        dqueries: written, strides of `out`.

    Returns:
        dkeys, dvalues [B, n, S, H, Dh], dense; fp32 [H], gradient of the scale.
    """
    rows, tokens, heads, width = queries.shape
    blocks, states = keys.shape[1:3]
    wide = queries.element_size() == 4
    assert dqueries.stride() == out.stride()
    fetched = _fetched(tokens, window, states, queries, dout, keys, values)
    tiles = query_tiles(window, states, wide)
    numbers = lses.new_empty(rows, heads, 3, tokens)
    count = blocks * blocks_of(window, tiles.rows)
    dscale = lses.new_empty(rows, heads, count)
    strides = (*queries.stride()[:2], *keys.stride()[:3])
    read_query_gradient_kernel[(count, heads, rows)](
        queries, scale, *(_pieces(x, fetched, 1, 1, tiles.columns, width) for x in (keys, values)), out, lses, dout,
        dqueries, numbers, dscale, tokens, window, states,
        *strides, *out.stride()[:2], *dout.stride()[:2], *lses.stride()[:2],
        **_options(tiles, queries, window, states, fetched),
    )  # fmt: skip
    dkeys = keys.new_empty(keys.shape)
    dvalues = torch.empty_like(dkeys)
    tiles = key_tiles(window, states, wide, fetched)
    queries_of, dout_of = (_pieces(x, fetched, 1, tiles.rows, width) for x in (queries, dout))
    read_key_gradient_kernel[(blocks * blocks_of(states, tiles.columns), heads, rows)](
        queries_of, keys, values, dout_of, numbers, dkeys, dvalues, tokens, window, states, blocks,
        *strides, *dout.stride()[:2], **_options(tiles, queries, window, states, fetched),
    )  # fmt: skip
    return dkeys, dvalues, dscale.sum((0, 2)) * scale.sign()


class _ReadStates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, scale: Tensor, keys: Tensor, values: Tensor, window: int) -> Tensor:
        queries = dense_heads(queries)
        if keys.stride() != values.stride() or keys.stride()[-2:] != (keys.shape[-1], 1):
            keys, values = keys.contiguous(), values.contiguous()
        rows, tokens, heads, _ = queries.shape
        out = queries.new_empty(queries.shape)
        lses = queries.new_empty(rows, heads, tokens, dtype=torch.float32)
        read_forward(queries, scale, keys, values, window, out, lses)
        ctx.save_for_backward(queries, scale, keys, values, out, lses)
        ctx.window = window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        queries, scale, keys, values, out, lses = ctx.saved_tensors
        dqueries = torch.empty_like(out)
        dkeys, dvalues, dscale = read_backward(
            queries, scale, keys, values, ctx.window, out, lses, dense_heads(dout), dqueries
        )
        return dqueries, dscale.to(scale.dtype), dkeys, dvalues, None


def read_states(queries: Tensor, scale: Tensor, keys: Tensor, values: Tensor, window: int) -> Tensor:
    """The tokens of each block read the state entering it: softmax(l2norm(q) |s| . k) v, no mask, no bias.

    Args:
        queries: [B, T, H, Dh] as projected.
        scale: [H].
        keys, values: [B, n, S, H, Dh], n = ceil(T/W).
        window: W.

    Returns:
        [B, T, H, Dh].
    """
    return _ReadStates.apply(queries, scale.contiguous(), keys, values, window)
