"""Fused window attention: launches of the Triton kernels, and their gradient."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from longspan.kernels.rotary import rotary_angles
from longspan.kernels.window_attention.reference import MAX_DISTANCE, t5_buckets
from longspan.kernels.window_attention.tiles import Tile, Tiles, choose_tiles
from longspan.kernels.window_attention.triton_backward import (
    delta_kernel,
    finish_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from longspan.kernels.window_attention.triton_forward import attend_kernel
from longspan.kernels.window_attention.triton_prepare import REACH_INT, TABLE_PARTS_INT, prepare_kernel, rotate_kernel

PREPARE_TOKENS = 32
ROUND = 128  # arrays by token are this much longer than a whole number of tiles, so that their reads need no mask
ROTATE_TOKENS = 32
FINE_POSITIONS = 1024
PIECE_TOKENS = 40 * 1024  # keys whose dS is stored at once: 420 MB with 8 heads of 128 and a window of 512 in bf16
DELTA_TOKENS = 32
FINISH_WARPS = 16  # a few programs read much, and wait for memory alone


def fused_window_attention(
    qkv: Tensor,
    cached_keys: Tensor,
    cached_values: Tensor,
    bias_table: Tensor | None,
    scale: Tensor,
    reset: Tensor,
    drop: Tensor | None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`api.window_attention` by Triton kernels; arguments as there, bias_table None for rotary positions.

    Two launches forward and four backward (four and six with rotary positions); none waits for the host. Nothing
    of the size of the scores is kept: saved are qkv, the output and three numbers a token and head; the backward pass
    stores the scores' gradients for 40,960 tokens at a time.

    Args:
        tiles: other tile sizes than those of `choose_tiles`.

    Returns:
        out [B, T, H, Dh]; keys, values [B, W, H, Dh]: the cache for the next call.
    """
    cached_keys, cached_values = cached_keys.to(qkv.dtype), cached_values.to(qkv.dtype)
    tiles = tiles or choose_tiles(qkv.dtype, qkv.shape[-1])
    with torch.cuda.device_of(qkv):
        return _WindowAttention.apply(qkv, cached_keys, cached_values, bias_table, scale, reset, drop, tiles)


@dataclass
class WindowCall:
    """Tensors of one call, as the kernels take them.

    Args:
        qkv: [B, T, 3, H, D], the last three dimensions contiguous; queries and keys rotated if there is no table.
        past: [B, W, any], the cache's values with the strides of qkv.
        table: [H, 32] or None; scale: [H]; drop: [H, W, 2W] or None.
        unit_k, inv_k, starts, nexts, bias, near_keys, near_queries, nulls, consts: of `prepare_kernel`.
        out: [B, T, H, D]; lse, inv_q: fp32 [B, H, T rounded up]; unit_q: like out; of `attend_kernel`.
    """

    qkv: Tensor
    past: Tensor
    table: Tensor | None
    scale: Tensor
    drop: Tensor | None
    unit_k: Tensor
    inv_k: Tensor
    starts: Tensor
    nexts: Tensor
    bias: Tensor
    near_keys: Tensor
    near_queries: Tensor
    nulls: Tensor
    consts: Tensor
    out: Tensor
    lse: Tensor
    unit_q: Tensor
    inv_q: Tensor

    def tensors(self) -> list[Tensor | None]:
        """All of them, in the order of the arguments."""
        return list(vars(self).values())

    @property
    def window(self) -> int:
        """W."""
        return self.past.shape[1]

    def multipliers(self) -> Tensor:
        """`drop`, or any tensor, which the kernels then do not read."""
        return self.scale if self.drop is None else self.drop

    def settings(self, tile: Tile) -> dict[str, Any]:
        """Constants of the kernels that compute scores."""
        tokens, window = self.qkv.shape[1], self.window
        return {
            "STEP": self.past.shape[2],
            "H": self.qkv.shape[3],
            "W": window,
            "D": self.qkv.shape[4],
            "BQ": tile.queries,
            "BK": tile.keys,
            "ROUND": ROUND,
            "EVEN": tokens % ROUND == 0 and window % ROUND == 0,
            "HAS_DROP": self.drop is not None,
            **tile.options(),
        }


def window_forward(
    qkv: Tensor,
    cached_keys: Tensor,
    cached_values: Tensor,
    table: Tensor | None,
    scale: Tensor,
    reset: Tensor,
    drop: Tensor | None,
    tiles: Tiles,
) -> tuple[WindowCall, Tensor, Tensor]:
    """The forward pass without autograd, arguments as `fused_window_attention`: (call with its output `out`, the next
    cache's keys and values [B, W, H, Dh])."""
    call, new_keys, new_values = _prepare(
        _packed(qkv, qkv[0, 0].numel()), cached_keys, cached_values, table, scale, reset, drop
    )
    _attend(call, tiles)
    return call, new_keys, new_values


def window_backward(
    call: WindowCall, grads: tuple[Tensor | None, ...], needs_cache: bool, tiles: Tiles
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """The backward pass.

    Args:
        call: of the forward pass.
        grads: of its output and of the next cache's keys and values; None is zero.
        needs_cache: whether the gradients of the cache are wanted.
        tiles: those of the forward pass.

    Returns:
        Gradients of qkv, of the cache's keys and values or None, of the table or None, of scale.
    """
    go = torch.zeros_like(call.out) if grads[0] is None else grads[0]
    go = _described(go) if copies_tiles(go.device) else go.contiguous()
    dqkv = torch.empty(call.qkv.shape, dtype=call.qkv.dtype, device=call.qkv.device)
    dnew_k, dnew_v = grads[1:]
    if call.table is None and dnew_k is not None:  # the cache is not rotated, the keys of the kernels are
        dnew_k = dnew_k.contiguous().unsqueeze(2)
        dnew_k = _rotate(dnew_k, torch.empty_like(dnew_k), 1, call.qkv.shape[1], 1).squeeze(2)
    backward = _Backward(call, go, dqkv, (dnew_k, dnew_v), needs_cache, tiles)
    dtable, dscale = backward.run()
    dcached_k, dcached_v = backward.dcache
    if call.table is None:
        _rotate(dqkv, dqkv, 2, call.window, -1)
        if dcached_k is not None:
            _rotate(dcached_k.unsqueeze(2), dcached_k.unsqueeze(2), 1, 0, -1)
    return dqkv, dcached_k, dcached_v, dtable, dscale


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        call, new_keys, new_values = window_forward(*args)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*call.tensors())
        ctx.tiles = args[-1]
        return call.out, new_keys, new_values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call = WindowCall(*ctx.saved_tensors)
        return *window_backward(call, grads, any(ctx.needs_input_grad[1:3]), ctx.tiles), None, None, None


def _packed(x: Tensor, token: int) -> Tensor:
    """`x` [B, T, ...] itself if its tokens are contiguous pieces of `token` numbers and do not overlap, else a copy."""
    tidy = x[0, 0].is_contiguous() and (x.shape[1] == 1 or x.stride(1) >= token)
    return x if tidy else x.contiguous()


def _described(x: Tensor) -> Tensor:
    """x [B, T, H, D] itself if the copy engine can read it, else a contiguous copy.

    It wants an address and strides of whole 16 bytes, heads packed, and rows one after another, whole tokens apart.
    """
    row, token = x.stride()[:2]
    fine = x[0, 0].is_contiguous() and x.data_ptr() % 16 == 0 and token * x.element_size() % 16 == 0
    fine = fine and token >= x[0, 0].numel() and row >= x.shape[1] * token and row % token == 0
    return x if fine else x.clone(memory_format=torch.contiguous_format)


def _step(x: Tensor, token: int) -> int:
    """Distance of two tokens of x [B, T, ...] in memory; of a single one any will do."""
    return x.stride(1) if x.shape[1] > 1 else token


@lru_cache(maxsize=8)
def copies_tiles(device: torch.device) -> bool:
    """Whether GPUs like this have a copy engine for tiles; where kernels are interpreted, that form runs too."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache(maxsize=8)
def _buckets(device: torch.device) -> Tensor:
    """int32 [128]: T5 bucket of each distance that has one of its own."""
    with torch.inference_mode(False):
        return t5_buckets(torch.arange(MAX_DISTANCE)).to(device, torch.int32)


def _prepare(
    qkv: Tensor,
    cached_keys: Tensor,
    cached_values: Tensor,
    table: Tensor | None,
    scale: Tensor,
    reset: Tensor,
    drop: Tensor | None,
) -> tuple[WindowCall, Tensor, Tensor]:
    """(call with everything but the output, next cache [B, W, H, D] twice)."""
    rows, tokens, _, heads, width = qkv.shape
    window, token = cached_keys.shape[1], heads * width
    cached_keys = cached_keys.contiguous() if table is None else _packed(cached_keys, token)
    cached_values = _packed(cached_values, token)
    turned, turned_keys = (qkv, cached_keys) if table is not None else _turned(qkv, cached_keys)
    padded, behind = (-(-n // ROUND) * ROUND for n in (tokens, window))
    wide: dict[str, Any] = {"dtype": torch.float32, "device": qkv.device}
    whole: dict[str, Any] = {"dtype": torch.int32, "device": qkv.device}
    # fp16 is finer than bf16 in the range of logits
    near: dict[str, Any] = {
        "dtype": torch.float32 if qkv.dtype == torch.float32 else torch.float16,
        "device": qkv.device,
    }
    call = WindowCall(
        qkv=turned,
        past=qkv.new_empty(rows, window, _step(turned, 3 * token)),
        table=None if table is None else table.contiguous(),
        scale=scale.contiguous(),
        drop=None if drop is None else drop.contiguous(),
        unit_k=qkv.new_empty(rows, window + tokens, heads, width),
        inv_k=torch.empty(rows, heads, behind + padded, **wide),
        starts=torch.empty(rows, tokens, **whole),
        nexts=torch.empty(rows, tokens + 1, **whole),
        bias=torch.empty(heads, MAX_DISTANCE, **wide),
        near_keys=torch.empty(heads, MAX_DISTANCE, REACH_INT, **near),
        near_queries=torch.empty(heads, MAX_DISTANCE, REACH_INT, **near),
        nulls=torch.empty(heads, window + 2, **wide),
        consts=torch.empty(heads, 4, **wide),
        out=qkv.new_empty(rows, tokens, heads, width),
        lse=torch.empty(rows, heads, padded, **wide),
        unit_q=qkv.new_empty(rows, tokens, heads, width),
        inv_q=torch.empty(rows, heads, padded, **wide),
    )
    new_keys, new_values = (qkv.new_empty(cached_keys.shape) for _ in range(2))
    prepare_kernel[(heads * (TABLE_PARTS_INT + rows * (behind + padded) // PREPARE_TOKENS),)](
        *(qkv[:, :, part] for part in (1, 2)),
        turned[:, :, 1],
        cached_keys,
        cached_values,
        turned_keys,
        reset.contiguous().view(torch.uint8),
        call.scale if call.table is None else call.table,
        call.scale,
        _buckets(qkv.device),
        call.bias,
        call.near_keys,
        call.near_queries,
        call.nulls,
        call.consts,
        call.unit_k,
        call.inv_k,
        call.starts,
        call.nexts,
        new_keys,
        new_values,
        call.past,
        *(x.stride(0) for x in (qkv, turned)),
        *cached_keys.stride()[:2],
        *cached_values.stride()[:2],
        tokens,
        KV_STEP=_step(qkv, 3 * token),
        STEP=call.past.shape[2],
        H=heads,
        W=window,
        D=width,
        BT=PREPARE_TOKENS,
        ROUND=ROUND,
        HAS_TABLE=table is not None,
    )
    return call, new_keys, new_values


def _attend(call: WindowCall, tiles: Tiles) -> None:
    """Write out, lse and inv_q."""
    rows, tokens, _, heads, _ = call.qkv.shape
    tile = tiles.attend
    attend_kernel[(rows * heads * triton.cdiv(tokens, tile.queries),)](
        call.qkv,
        call.unit_k,
        call.past,
        call.starts,
        call.near_keys,
        call.nulls,
        call.consts,
        call.multipliers(),
        call.out,
        call.lse,
        call.unit_q,
        call.inv_q,
        call.qkv.stride(0),
        tokens,
        **call.settings(tile),
    )


class _Backward:
    """The launches of the backward pass, a piece of the keys after another.

    Tiles of keys are counted over all rows, those of a row's cache in front of it. Tile n stores its dS in place
    n mod ring: queries read what the tiles of a piece and the last ones of the piece before have stored.
    """

    def __init__(
        self,
        call: WindowCall,
        go: Tensor,
        dqkv: Tensor,
        new: tuple[Tensor | None, ...],
        needs_cache: bool,
        tiles: Tiles,
    ) -> None:
        """Launches `delta_kernel`.

        Args:
            call: of the forward pass; go: gradient of its output, contiguous or `_described`.
            dqkv: [B, T, 3, H, D], written by `run`.
            new: gradients of the new cache [B, W, H, D], or None.
            needs_cache: whether `run` writes the gradients of the old cache, `dcache`.
        """
        self.call, self.go, self.dqkv = call, go, dqkv
        self.tma = copies_tiles(go.device)
        self.key_tile, self.query_tile = tiles.key_gradient, tiles.query_gradient
        self.rows, self.tokens, _, self.heads, self.width = call.qkv.shape
        self.keys = self.key_tile.keys
        self.tiles = triton.cdiv(self.tokens, self.keys) + triton.cdiv(call.window, self.keys)
        self.span = triton.cdiv(call.window + self.keys, self.key_tile.queries) * self.key_tile.queries
        self.piece = min(self.rows * self.tiles, max(1, PIECE_TOKENS // self.keys))
        behind = triton.cdiv(call.window + self.query_tile.queries, self.keys) + 1
        self.ring = min(self.rows * self.tiles, self.piece + behind)
        cache = (self.rows, call.window, self.heads, self.width)
        has_new = any(x is not None for x in new)
        self.dnew = [go.new_zeros(cache) if has_new and x is None else x for x in new]
        self.dcache = [go.new_empty(cache) if needs_cache else None for _ in range(2)]
        self.pairs = go.new_empty(self.ring, self.heads, self.span * self.keys)
        self.for_scale = torch.empty(
            self.rows * triton.cdiv(self.tokens, self.query_tile.queries), self.heads,
            dtype=torch.float32, device=go.device,
        )  # fmt: skip
        self.sums: Tensor | None = None
        if call.table is not None:
            self.sums = self.for_scale.new_empty(self.rows * self.tiles, self.heads, MAX_DISTANCE)
        self.delta = torch.empty_like(call.lse)
        delta_kernel[(self.rows * self.heads * call.lse.shape[-1] // DELTA_TOKENS,)](
            call.out,
            go,
            self.delta,
            go.stride(0),
            self.tokens,
            GO_STEP=_step(go, self.heads * self.width),
            H=self.heads,
            D=self.width,
            BT=DELTA_TOKENS,
            ROUND=ROUND,
        )

    def run(self) -> tuple[Tensor | None, Tensor]:
        """Write dqkv and dcache; (gradient of the table or None, gradient of scale)."""
        total, done = self.rows * self.tiles, 0
        for begin in range(0, total, self.piece):
            end = min(begin + self.piece, total)
            self._key_gradient(begin, end - begin)
            ready = self._queries_before(end)
            if ready > done:
                self._query_gradient(done, ready - done)
            done = ready
        return _finish(self.call, self.for_scale, self.sums)

    def _queries_before(self, end: int) -> int:
        """How many tiles of queries see no tile of keys from `end` on."""
        row, rest = divmod(end, self.tiles)
        inside = max(0, rest - triton.cdiv(self.call.window, self.keys)) * self.keys // self.query_tile.queries
        return row * triton.cdiv(self.tokens, self.query_tile.queries) + inside

    def _key_gradient(self, begin: int, count: int) -> None:
        """Write parts 1 and 2 of dqkv, dcache, pairs and sums."""
        call, tile = self.call, self.key_tile
        key_gradient_kernel[(count * self.heads,)](
            call.qkv,
            call.unit_k,
            call.past,
            call.inv_k,
            call.starts,
            call.nexts,
            call.bias,
            call.multipliers(),
            call.lse,
            self.delta,
            *(self._pieces(x.flatten(2), 1, tile.queries, self.width) for x in (call.unit_q, self.go)),
            *(self._pieces(x.flatten(0, 1), 1, tile.queries) for x in (call.lse, self.delta)),
            self._pieces(call.near_queries.flatten(0, 1), tile.keys, tile.queries),
            *(self.go if x is None else x.contiguous() for x in self.dnew),
            self.dqkv,
            *(self.dqkv if x is None else x for x in self.dcache),
            self.pairs,
            self.delta if self.sums is None else self.sums,
            call.qkv.stride(0),
            self.tokens,
            begin,
            self.tiles,
            self.ring,
            SPAN=self.span,
            HAS_NEW=self.dnew[0] is not None,
            HAS_CACHE=self.dcache[0] is not None,
            HAS_TABLE=self.sums is not None,
            TMA=self.tma,
            **call.settings(tile),
        )

    def _query_gradient(self, begin: int, count: int) -> None:
        """Write part 0 of dqkv and for_scale."""
        call, tile = self.call, self.query_tile
        query_gradient_kernel[(count * self.heads,)](
            call.qkv,
            self._pieces(call.unit_k.flatten(2), 1, self.keys, self.width),
            call.starts,
            call.consts,
            call.inv_q,
            self._pieces(self.pairs.view(-1, self.span), self.keys, tile.queries),
            self.dqkv,
            self.for_scale,
            call.qkv.stride(0),
            self.tokens,
            begin,
            count,
            self.tiles,
            self.ring,
            STEP=call.past.shape[2],
            H=self.heads,
            W=call.window,
            D=self.width,
            BQ=tile.queries,
            BK=self.keys,
            SPAN=self.span,
            ROUND=ROUND,
            EVEN=self.tokens % ROUND == 0 and call.window % ROUND == 0,
            TMA=self.tma,
            **tile.options(),
        )

    def _pieces(self, x: Tensor, *piece: int) -> Tensor | TensorDescriptor:
        """x as the kernels load it: in pieces of this shape."""
        return TensorDescriptor.from_tensor(x, list(piece)) if self.tma else x


def _finish(call: WindowCall, for_scale: Tensor, sums: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """(gradient of the table or None, gradient of scale)."""
    table = call.scale if call.table is None else call.table
    dscale, dtable = torch.empty_like(call.scale), torch.empty_like(table)
    finish_kernel[(call.scale.shape[0],)](
        for_scale if sums is None else sums,
        for_scale,
        table,
        call.scale,
        _buckets(for_scale.device),
        dtable,
        dscale,
        0 if sums is None else sums.shape[0],
        for_scale.shape[0],
        H=call.scale.shape[0],
        W=call.window,
        HAS_TABLE=sums is not None,
        num_warps=FINISH_WARPS,
    )
    return None if call.table is None else dtable, dscale


@lru_cache(maxsize=8)
def _angles(step: int, count: int, half: int, device: torch.device) -> Tensor:
    """fp32 [count, 2, half]: cosine and sine of the angles of positions 0, step, 2 * step, ..."""
    with torch.inference_mode(False):
        angle = rotary_angles(torch.arange(count, device=device) * step, half)
        return torch.stack([angle.cos(), angle.sin()], dim=1).float()


def _turned(qkv: Tensor, cached_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Copies with queries and keys rotated by their places, counted from the first of the cache."""
    turned = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _rotate(qkv, turned, 2, cached_keys.shape[1], 1)
    turned[:, :, 2].copy_(qkv[:, :, 2])
    cache = cached_keys.unsqueeze(2)
    return turned, _rotate(cache, torch.empty_like(cache), 1, 0, 1).squeeze(2)


def _rotate(source: Tensor, target: Tensor, parts: int, first: int, sign: int) -> Tensor:
    """Rotate the first parts of source [B, T, any, H, D] into target by sign * (first, first + 1, ...)."""
    rows, tokens, _, heads, width = source.shape
    half = width // 2
    # a power of two: a new length seldom makes new tables
    coarse = triton.next_power_of_2(triton.cdiv(first + tokens + ROTATE_TOKENS, FINE_POSITIONS))
    rotate_kernel[(rows * heads * parts * triton.cdiv(tokens, ROTATE_TOKENS),)](
        source,
        target,
        _angles(FINE_POSITIONS, coarse, half, source.device),
        _angles(1, FINE_POSITIONS, half, source.device),
        *source.stride()[:2],
        *target.stride()[:2],
        tokens,
        first,
        SIGN=sign,
        H=heads,
        PARTS=parts,
        HALF=half,
        FINE=FINE_POSITIONS,
        BT=ROTATE_TOKENS,
    )
    return target
