"""Everything that a Block-Recurrent layer does beside its window attention, as one differentiable function in Triton.

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
from longspan.kernels.block_recurrent.scan import Plan, chunk_blocks, gradients_of_weights, keep_of, written_blocks
from longspan.kernels.block_recurrent.scan_weights import ScanWeights
from longspan.kernels.block_recurrent.state_path import StatePath
from longspan.kernels.block_recurrent.three_phase import Reads
from longspan.kernels.block_recurrent.triton_tokens import dense_heads, read_backward, read_forward, token_keys


def scan_tokens(
    qkv: Tensor,
    state_query: Tensor,
    state_scale: Tensor,
    cache: tuple[Tensor, Tensor],
    state: Tensor,
    reset: Tensor,
    path: StatePath,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan the state over a segment's tokens, which read the states that enter their blocks (arXiv:2203.07852).

    Args:
        qkv: [B, T, 3, H, Dh] as projected.
        state_query: [B, T, H, Dh] as projected; state_scale: [H].
        cache: keys, normalised, and values [B, W, H, Dh] of the tokens before.
        state: fp32 [B, S, D] before the segment.
        reset: bool [B, ceil(T/W)], a document starts with the block.
        path: weights, of any gate and mode, not frozen.
        window: W.

    Returns:
        qkv again, for one more reader, whose packed gradient this function then adds to in place; the read
        [B, T, H, Dh]; the last state fp32 [B, S, D].
    """
    weights = ScanWeights.of(path)
    plan = Plan(window, keep_of(path, weights, reset, qkv), True, weights.tanh, weights.ffn_tanh)
    cached = (x.to(qkv.dtype).contiguous() for x in cache)
    return _ScanTokens.apply(
        plan,
        torch.is_grad_enabled(),
        qkv if qkv[0, 0].is_contiguous() else qkv.contiguous(),
        dense_heads(state_query),
        state_scale,
        *cached,
        state,
        reset.contiguous(),
        *weights.tensors(),
    )


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

    def spans(self, step: int) -> list[tuple[int, int, slice]]:
        """(first block, end, their tokens) of every chunk of `step` blocks."""
        window, tokens = self.plan.window, self.qkv.shape[1]
        ends = ((first, min(first + step, self.blocks)) for first in range(0, self.blocks, step))
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
        qkv: Tensor,
        queries: Tensor,
        scale: Tensor,
        cached_keys: Tensor,
        cached_values: Tensor,
        state: Tensor,
        reset: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        segment = _Segment(plan, qkv, queries, scale, cached_keys, cached_values, reset)
        weights = ScanWeights.from_tensors(tensors, plan.tanh, plan.ffn_tanh)
        keep_all = plan.keep == "all"
        spans = segment.spans(segment.blocks if keep_all else chunk_blocks(reset.shape[0]))
        read = queries.new_empty(queries.shape)
        lses = read.new_empty(read.shape[0], read.shape[2], read.shape[1], dtype=torch.float32)
        entering = state.new_empty(*reset.shape, *state.shape[1:]) if train and len(spans) > 1 else None
        kept: tuple[Tensor, ...] = ()
        last = state
        for first, end, span in spans:
            keys, values, inv = segment.tokens(span)
            chain = triton_scan.chain_forward(last, keys, values, reset[:, first:end], weights, plan.window, keep_all)
            read_forward(
                queries[:, span], scale, chain.state_keys, chain.state_values, plan.window,
                read[:, span], lses[:, :, span],
            )  # fmt: skip
            last = chain.last
            if entering is not None:
                entering[:, first:end] = chain.entering
            elif train:
                entering = chain.entering
                kept = () if chain.reads is None else (keys, values, inv, *chain.reads.tensors())
        ctx.plan, ctx.count = plan, len(tensors)
        ctx.set_materialize_grads(False)
        if train:
            ctx.save_for_backward(
                qkv, queries, scale, cached_keys, cached_values, reset, *tensors, entering, last, read, lses, *kept
            )
        return qkv.view_as(qkv), read, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dqkv: Tensor | None, dread: Tensor | None, dlast: Tensor | None) -> tuple[Any, ...]:
        plan, saved = ctx.plan, ctx.saved_tensors
        segment = _Segment(plan, *saved[:6])
        weights = ScanWeights.from_tensors(saved[6 : 6 + ctx.count], plan.tanh, plan.ffn_tanh)
        entering, last, read, lses, *kept = saved[6 + ctx.count :]
        # the gradient of the view given out is this node's alone: what its only reader returned
        dqkv = torch.zeros_like(segment.qkv) if dqkv is None else dqkv.contiguous()
        dread = torch.zeros_like(read) if dread is None else dense_heads(dread)
        dqueries = torch.empty_like(read)
        wanted = any(ctx.needs_input_grad[5:7])
        dcache = (torch.zeros_like(segment.cached_keys), torch.zeros_like(segment.cached_values)) if wanted else None
        carry = torch.zeros_like(last) if dlast is None else dlast
        dinitial, grads = torch.zeros_like(carry), Gradients()
        written = written_blocks(read.shape[1], plan.window, segment.blocks, dlast)
        for first, end, span in reversed(segment.spans(chunk_blocks(read.shape[0]))):
            if kept:
                rows = slice(span.start, span.stop + plan.window)
                keys, values, inv = (x[:, rows] for x in kept[:3])
                reads = Reads(*kept[3:]).blocks(first, end)
            else:
                keys, values, inv = segment.tokens(span)
                reads = triton_scan.recompute(
                    entering[:, first:end], keys, values, segment.reset[:, first:end], weights, plan.window
                )
            state_keys, state_values = reads.proj[..., 0, :, :], reads.proj[..., 1, :, :]
            dkeys, dvalues, dscale = read_backward(
                segment.queries[:, span], segment.scale, state_keys, state_values, plan.window,
                read[:, span], lses[:, :, span], dread[:, span], dqueries[:, span],
            )  # fmt: skip
            grads.add("state_scale", dscale)
            chunk = Chunk(
                first, end, written, plan.window, weights, entering, last, keys, values, segment.reset, reads,
                dkeys, dvalues, origin=first,
            )  # fmt: skip
            carry, result = triton_scan.serial(chunk, carry, dinitial, grads)
            triton_scan.products(chunk, result, triton_scan.RawTokens(dqkv, inv, dcache), grads)
            del reads, result, chunk, keys, values, inv, state_keys, state_values, dkeys, dvalues
        grads.add("initial", dinitial.sum(0))
        given = (None, None, dqkv, dqueries, grads.of("state_scale", segment.scale), *(dcache or (None, None)))
        return (*given, carry, None, *gradients_of_weights(grads, weights))
