"""Attentions that torch has, as peers of the window kernel.

Each maker takes q, k, v [B, H, T, Dh] that want gradients, and W; it returns a call without arguments that gives
the result, further leaves, and a note.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from longspan.kernels.window_attention.reference import NUM_BUCKETS, t5_buckets
from longspan.trainer.bench.contender import Unavailable
from longspan.trainer.bench.peers.plain import window_mask

Peer = tuple[Callable[[], Tensor], list[Tensor], str]
# With a learned bias the backward of flex_attention asks for more shared memory than Hopper has unless its tiles are
# smaller. The first of these that builds is taken.
BACKWARD_TILES: tuple[Any, ...] = (
    {"BLOCK_M1": 64, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 64},
    {"BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32},
)


def flex(leaves: list[Tensor], window: int) -> Peer:
    """flex_attention with the strict window mask alone."""
    q, k, v = leaves
    _need_cuda(q)
    run = torch.compile(flex_attention, dynamic=False)
    mask = window_mask(q.shape[2], window, q.device)
    return lambda: run(q, k, v, block_mask=mask, scale=1.0), [], "no bias, no cache, no normalisation"


def flex_bias(leaves: list[Tensor], window: int) -> Peer:
    """flex_attention with the strict window mask, a learned T5 bias and a learned scale of each head."""
    q, k, v = leaves
    _need_cuda(q)
    heads = q.shape[1]
    table = torch.randn(heads, NUM_BUCKETS, device=q.device, dtype=q.dtype, requires_grad=True)
    scale = torch.randn(heads, device=q.device, dtype=q.dtype, requires_grad=True)
    buckets = t5_buckets(torch.arange(window + 1, device=q.device))

    def logit(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (score + table[h, buckets[(i - j).clamp(0, window)]]) * scale[h].abs()

    run = torch.compile(flex_attention, dynamic=False)
    mask = window_mask(q.shape[2], window, q.device)

    def attend(tiles: Any) -> Tensor:
        out: Tensor = run(q, k, v, score_mod=logit, block_mask=mask, scale=1.0, kernel_options=tiles)
        return out

    for tiles in BACKWARD_TILES[:-1]:
        with contextlib.suppress(Exception):  # the compiler's errors have no common class
            attend(tiles).sum().backward()
            break
    else:
        tiles = BACKWARD_TILES[-1]
    note = f"no cache, no normalisation; backward tiles {'/'.join(map(str, tiles.values()))}: default ones do not build"
    return lambda: attend(tiles), [table, scale], note


def varlen(leaves: list[Tensor], window: int) -> Peer:
    """FlashAttention-2 with a window of W tokens, the token itself and the W - 1 before it; Unavailable without it."""
    q, k, v = leaves
    _need_cuda(q)
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise Unavailable("not installed", f"torch {torch.__version__} has no varlen_attn") from None
    rows, heads, tokens, width = q.shape
    starts = torch.arange(0, (rows + 1) * tokens, tokens, device=q.device, dtype=torch.int32)

    def attend() -> Tensor:
        fq, fk, fv = (x.transpose(1, 2).reshape(rows * tokens, heads, width) for x in (q, k, v))
        out = varlen_attn(fq, fk, fv, starts, starts, tokens, tokens, scale=1.0, window_size=(window - 1, 0))
        return out if isinstance(out, Tensor) else out[0]

    return attend, [], "a token sees itself; no bias, no cache, no normalisation"


def cudnn(leaves: list[Tensor], window: int) -> Peer:
    """cuDNN attention to all earlier tokens."""
    return _causal(leaves, SDPBackend.CUDNN_ATTENTION)


def flash(leaves: list[Tensor], window: int) -> Peer:
    """FlashAttention-2 to all earlier tokens."""
    return _causal(leaves, SDPBackend.FLASH_ATTENTION)


def _causal(leaves: list[Tensor], backend: SDPBackend) -> Peer:
    q, k, v = leaves
    _need_cuda(q)

    def attend() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)

    return attend, [], "all earlier tokens, not a window: for scale"


def _need_cuda(x: Tensor) -> None:
    if x.device.type != "cuda":
        raise Unavailable("not supported", "needs a CUDA device")


PEERS: dict[str, Callable[[list[Tensor], int], Peer]] = {
    "flex": flex,
    "flex_bias": flex_bias,
    "varlen": varlen,
    "cudnn": cudnn,
    "flash": flash,
}
