"""Everything that a Block-Recurrent layer does behind its projections, as one differentiable function in Triton.

The state chain is long and narrow, the window attention wide, and neither needs the other: both run side by side.

Normalisation of the tokens' keys, scan of the state and read of the states belong together for memory's sake: a long
segment goes through in chunks, forward and back, and of all that the states offer, read and send back as gradients
only one chunk exists at a time. Kept are the states at the blocks' borders, unless everything is small enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.kernels.block_recurrent import triton_scan
from longspan.kernels.block_recurrent.adjoint import Chunk, Gradients
from longspan.kernels.block_recurrent.scan import (
    Plan,
    chunk_blocks,
    fresh_carry,
    gradients_of_weights,
    keep_of,
    written_blocks,
)
from longspan.kernels.block_recurrent.scan_weights import ScanWeights
from longspan.kernels.block_recurrent.state_path import StatePath
from longspan.kernels.block_recurrent.three_phase import Reads
from longspan.kernels.block_recurrent.triton_tokens import dense_heads, read_backward, read_forward, token_keys
from longspan.kernels.streams import Fork
from longspan.kernels.window_attention.fused import WindowCall, window_backward, window_forward
from longspan.kernels.window_attention.tiles import Tiles, choose_tiles


@dataclass(frozen=True)
class Beside:
    """The window attention of the same tokens; arguments as `window_attention`."""

    table: Tensor
    scale: Tensor
    reset: Tensor  # bool [B, T]
    drop: Tensor | None


def scan_tokens(
    qkv: Tensor,
    state_query: Tensor,
    state_scale: Tensor,
    cache: tuple[Tensor, Tensor],
    state: Tensor,
    reset: Tensor,
    path: StatePath,
    window: int,
    beside: Beside | None = None,
) -> tuple[Tensor, ...]:
    """Scan the state over a segment's tokens, which read the states that enter their blocks (arXiv:2203.07852).

    Args:
        qkv: [B, T, 3, H, Dh] as projected.
        state_query: [B, T, H, Dh] as projected; state_scale: [H].
        cache: keys, normalised, and values [B, W, H, Dh] of the tokens before.
        state: fp32 [B, S, D] before the segment.
        reset: bool [B, ceil(T/W)], a document starts with the block.
        path: weights, of any gate and mode, not frozen.
        window: W.
        beside: window attention that runs at the same time, on another stream; None: the caller's business.

    Returns:
        The read [B, T, H, Dh]; the last state fp32 [B, S, D]; then, with `beside`, what `window_attention` returns, or
        else qkv again, for one more reader, whose packed gradient this function adds to in place.
    """
    weights = ScanWeights.of(path)
    plan = Plan(window, keep_of(path, weights, reset, qkv), True, weights.tanh, weights.ffn_tanh)
    cached = (x.to(qkv.dtype).contiguous() for x in cache)
    near = None if beside is None else _Near(beside.reset, beside.drop, choose_tiles(qkv.dtype, qkv.shape[-1]))
    return _ScanTokens.apply(
        plan,
        torch.is_grad_enabled(),
        near,
        None if beside is None else beside.table,
        None if beside is None else beside.scale,
        qkv if qkv[0, 0].is_contiguous() else qkv.contiguous(),
        dense_heads(state_query),
        state_scale.contiguous(),
        *cached,
        state,
        reset.contiguous(),
        *weights.tensors(),
    )


@dataclass(frozen=True)
class _Near:
    """What window attention takes that gets no gradient."""

    reset: Tensor
    drop: Tensor | None
    tiles: Tiles


@dataclass(frozen=True)
class _Segment:
    """The inputs of a call, and how it is cut into chunks."""

    plan: Plan
    qkv: Tensor
    queries: Tensor
    scale: Tensor
    cached_keys: Tensor
    cached_values: Tensor
    reset: Tensor

    @property
    def blocks(self) -> int:
        """n."""
        return self.reset.shape[1]

    def spans(self, state: Tensor | None) -> list[tuple[int, int, slice]]:
        """(first block, end, their tokens) of every chunk that states [..., S, D] are cut into; None: of one chunk."""
        window, tokens, (rows, blocks) = self.plan.window, self.qkv.shape[1], self.reset.shape
        step = blocks
        if state is not None:
            step = chunk_blocks(rows, blocks, state.shape[-2], window, state.shape[-1])
        ends = ((first, min(first + step, blocks)) for first in range(0, blocks, step))
        return [(first, end, slice(first * window, min(end * window, tokens))) for first, end in ends]

    def tokens(self, span: slice) -> tuple[Tensor, Tensor, Tensor]:
        """`token_keys` of a chunk, the window before in front."""
        count = span.stop - span.start + self.plan.window
        return token_keys(self.qkv, self.cached_keys, self.cached_values, span.start, count)


class _ScanTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        train: bool,
        near: _Near | None,
        table: Tensor | None,
        window_scale: Tensor,
        qkv: Tensor,
        queries: Tensor,
        scale: Tensor,
        cached_keys: Tensor,
        cached_values: Tensor,
        state: Tensor,
        reset: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        segment = _Segment(plan, qkv, queries, scale, cached_keys, cached_values, reset)
        weights = ScanWeights.from_tensors(tensors, plan.tanh, plan.ffn_tanh)
        window: tuple[WindowCall, Tensor, Tensor] | None = None
        if near is None:
            read, last, kept = _forward(segment, state, weights, train)
        else:
            fork = Fork(qkv)
            window = window_forward(
                qkv, cached_keys, cached_values, table, window_scale, near.reset, near.drop, near.tiles
            )
            with fork.side():
                read, last, kept = _forward(segment, state, weights, train)
            fork.join()
        ctx.plan, ctx.count, ctx.near, ctx.kept = plan, len(tensors), near, len(kept)
        ctx.set_materialize_grads(False)
        if train:
            call = [] if window is None else window[0].tensors()
            ctx.save_for_backward(
                qkv, queries, scale, cached_keys, cached_values, reset, *tensors, last, read, *kept, *call
            )
        return (read, last, qkv.view_as(qkv)) if window is None else (read, last, window[0].out, *window[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dread: Tensor | None, dlast: Tensor | None, *dnear: Tensor | None) -> tuple[Any, ...]:
        plan, saved = ctx.plan, ctx.saved_tensors
        segment = _Segment(plan, *saved[:6])
        weights = ScanWeights.from_tensors(saved[6 : 6 + ctx.count], plan.tanh, plan.ffn_tanh)
        last, read, *rest = saved[6 + ctx.count :]
        kept, call = rest[: ctx.kept], rest[ctx.kept :]
        wanted = any(ctx.needs_input_grad[8:10])
        shares: tuple[Tensor | None, ...] = (None, None, None, None)
        # before the fork: memory that the main stream gets after it may still be in use by the main stream's earlier
        # kernels, which the side stream does not wait for
        gradient = _Backward(segment, weights, last, read, kept, dread, dlast, wanted)
        fork = Fork(segment.qkv)
        if ctx.near is None:
            # the gradient of the view given out is this node's alone: what its only reader returned
            dqkv = torch.zeros_like(segment.qkv) if dnear[0] is None else dnear[0].contiguous()
        else:
            dqkv, *shares = window_backward(WindowCall(*call), dnear, wanted, ctx.near.tiles)  # type: ignore[assignment]
        if ctx.near is None:
            carry, dcache = gradient.run(dqkv, None)
        else:
            with fork.side():
                carry, dcache = gradient.run(dqkv, fork)
            fork.join()
            if wanted:
                dcache = tuple(x + y for x, y in zip(dcache, shares[:2], strict=True))  # type: ignore[operator]
        grads = gradient.grads
        given = (None, None, None, *shares[2:], dqkv, gradient.dqueries, grads.of("state_scale", segment.scale))
        return (*given, *dcache, carry, None, *gradients_of_weights(grads, weights))


def _forward(
    segment: _Segment, state: Tensor, weights: ScanWeights, train: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(read, last state, what the backward pass needs of them: border states, log-sum-exp, and all else if kept)."""
    plan, reset, queries = segment.plan, segment.reset, segment.queries
    keep_all = plan.keep == "all"
    spans = segment.spans(None if keep_all else state)
    read = queries.new_empty(queries.shape)
    lses = read.new_empty(read.shape[0], read.shape[2], read.shape[1], dtype=torch.float32)
    entering = state.new_empty(*reset.shape, *state.shape[1:]) if train and len(spans) > 1 else None
    kept: tuple[Tensor, ...] = ()
    last = state
    for first, end, span in spans:
        keys, values, inv = segment.tokens(span)
        chain = triton_scan.chain_forward(last, keys, values, reset[:, first:end], weights, plan.window, keep_all)
        read_forward(
            queries[:, span], segment.scale, chain.state_keys, chain.state_values, plan.window,
            read[:, span], lses[:, :, span],
        )  # fmt: skip
        last = chain.last
        if entering is not None:
            entering[:, first:end] = chain.entering
        elif train:
            entering = chain.entering
            kept = () if chain.reads is None else (keys, values, inv, *chain.reads.tensors())
    return read, last, [] if entering is None else [entering, lses, *kept]


class _Backward:
    """The backward pass of all but the window attention."""

    def __init__(
        self,
        segment: _Segment,
        weights: ScanWeights,
        last: Tensor,
        read: Tensor,
        kept: list[Tensor],
        dread: Tensor | None,
        dlast: Tensor | None,
        wanted: bool,
    ) -> None:
        """Args: of the forward pass; gradients of read and last state; whether those of the cache are wanted."""
        self.segment, self.weights, self.last, self.read = segment, weights, last, read
        self.entering, self.lses, *self.kept = kept
        self.dread = torch.zeros_like(read) if dread is None else dense_heads(dread)
        self.dlast, self.wanted = dlast, wanted
        self.dqueries = torch.empty_like(read)
        self.spans = segment.spans(last)
        self.grads = Gradients(several=len(self.spans) > 1)

    def run(self, dqkv: Tensor, fork: Fork | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Write dqueries and grads, add to dqkv; gradients of the state before the segment and of the cache.

        Args:
            dqkv: [B, T, 3, H, Dh]; with `fork` the main stream is writing it.
        """
        segment, weights, window, read = self.segment, self.weights, self.segment.plan.window, self.read
        carry = fresh_carry(self.dlast, self.last)
        dcache = None
        if self.wanted:
            dcache = (torch.zeros_like(segment.cached_keys), torch.zeros_like(segment.cached_values))
        dinitial = torch.zeros_like(carry)
        written = written_blocks(read.shape[1], window, segment.blocks, self.dlast)
        for first, end, span in reversed(self.spans):
            if self.kept:
                rows = slice(span.start, span.stop + window)
                keys, values, inv = (x[:, rows] for x in self.kept[:3])
                reads = Reads(*self.kept[3:]).blocks(first, end)
            else:
                keys, values, inv = segment.tokens(span)
                reads = triton_scan.recompute(
                    self.entering[:, first:end], keys, values, segment.reset[:, first:end], weights, window
                )
            state_keys, state_values = reads.proj[..., 0, :, :], reads.proj[..., 1, :, :]
            dkeys, dvalues, dscale = read_backward(
                segment.queries[:, span], segment.scale, state_keys, state_values, window,
                read[:, span], self.lses[:, :, span], self.dread[:, span], self.dqueries[:, span],
            )  # fmt: skip
            self.grads.add("state_scale", dscale)
            chunk = Chunk(
                first, end, written, window, weights, self.entering, self.last, keys, values, segment.reset, reads,
                dkeys, dvalues, origin=first,
            )  # fmt: skip
            carry, result = triton_scan.serial(chunk, carry, dinitial, self.grads)
            if fork is not None:
                fork.catch_up()  # dqkv is there
            triton_scan.products(chunk, result, triton_scan.RawTokens(dqkv, inv, dcache), self.grads)
            del reads, result, chunk, keys, values, inv, state_keys, state_values, dkeys, dvalues
        self.grads.add("initial", dinitial.sum(0))
        return carry, dcache or (None, None)
