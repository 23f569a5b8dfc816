"""The state scan of a Block-Recurrent layer as one differentiable function with a backward of three phases.

Plain autograd of the chain is serial from end to end. Here the backward recomputes (or has kept) every block's reads
in parallel from the states at the blocks' borders, walks back over activation gradients alone, and forms weight
gradients and the tokens' gradients as large products over many blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.kernels.block_recurrent import torch_scan
from longspan.kernels.block_recurrent.adjoint import Chunk, Gradients
from longspan.kernels.block_recurrent.scan_weights import ScanWeights
from longspan.kernels.block_recurrent.state_path import StatePath, project_state
from longspan.kernels.block_recurrent.three_phase import Chain, Reads

Keep = Literal["all", "border"]
KEEP_LIMIT_BYTES = 4 << 30  # reads above this are recomputed from the border states
# Numbers that go through at once where not everything is kept, in the states of all rows or, where a window is longer,
# in its tokens: 64 blocks of the paper's size. Chunks of fewer numbers leave a GPU waiting for the host.
CHUNK_VALUES = 64 * 512 * 1024


@dataclass(frozen=True)
class Plan:
    """What the scan does beside its tensors."""

    window: int
    keep: Keep
    fast: bool
    tanh: bool  # of what the gate writes
    ffn_tanh: bool


@dataclass(frozen=True)
class ScannedStates:
    """Result of the scan; n blocks."""

    keys: Tensor  # [B, n, S, H, Dh] of the state entering each block, normalised
    values: Tensor  # [B, n, S, H, Dh]
    last: Tensor  # fp32 [B, S, D], after the segment; a last block shorter than W leaves its state unchanged


def scan_states(
    state: Tensor,
    keys: Tensor,
    values: Tensor,
    reset: Tensor,
    path: StatePath,
    window: int,
    *,
    keep: Keep | None = None,
    fast: bool = False,
) -> ScannedStates:
    """Scan the state over all blocks of a segment (arXiv:2203.07852).

    Args:
        state: fp32 (or fp64) [B, S, D] before the segment.
        keys, values: [B, W+T, H, Dh] of the tokens, cache in front, keys normalised; T >= 1.
        reset: bool [B, n], n = ceil(T/W), a document starts with the block.
        path: weights, of any gate and mode, or frozen.
        window: W.
        keep: "all" keeps the reads of every block for the backward, "border" only the entering states. None: all if
            they take at most 4 GiB.
        fast: run in Triton what has a kernel.

    Returns:
        See `ScannedStates`; all differentiable once.
    """
    if path.write is None:
        return _frozen(state, reset, path)
    weights = ScanWeights.of(path)
    plan = Plan(window, keep or keep_of(path, weights, reset, keys), fast, weights.tanh, weights.ffn_tanh)
    state_keys, state_values, last = _StateScan.apply(plan, state, keys, values, reset.contiguous(), *weights.tensors())
    return ScannedStates(state_keys, state_values, last)


def keep_of(path: StatePath, weights: ScanWeights, reset: Tensor, tokens: Tensor) -> Keep:
    """What to keep for the backward: by its size, nothing that can be had again without a gradient.

    Args:
        path, weights: the same.
        reset: [B, n]; tokens: any tensor of the reads' type.
    """
    row = path.ids.shape[0] * weights.stacked.shape[0] * 3 * tokens.element_size() // 2
    return "all" if row * reset.numel() <= KEEP_LIMIT_BYTES and torch.is_grad_enabled() else "border"


def chunk_blocks(rows: int, blocks: int, states: int, window: int, width: int) -> int:
    """Blocks that go through at once where not everything is kept: as few chunks as may be, of about the same length.

    Args:
        rows, blocks, states, window: B, n, S, W.
        width: D.
    """
    most = max(1, CHUNK_VALUES // (rows * max(states, window) * width))
    chunks = -(-blocks // most)
    return -(-blocks // chunks)


def written_blocks(tokens: int, window: int, blocks: int, dlast: Tensor | None) -> int:
    """How many blocks write with effect: whole ones, and the last only if somebody used the last state."""
    return min(tokens // window, blocks if dlast is not None else blocks - 1)


def _frozen(state: Tensor, reset: Tensor, path: StatePath) -> ScannedStates:
    """A state that is never written: what came in, and the initial one after the first document start."""
    stacked = path.stacked()
    started = reset.cumsum(1) > 0
    initial = path.initial.to(state.dtype)
    given, fresh = project_state(state, path, stacked), project_state(initial[None], path, stacked)
    choose = started[:, :, None, None, None]
    keys, values = (
        torch.where(choose, b.transpose(1, 2)[:, None], a.transpose(1, 2)[:, None])
        for a, b in ((given.keys, fresh.keys), (given.values, fresh.values))
    )
    return ScannedStates(keys, values, torch.where(started[:, -1, None, None], initial, state))


def _steps(fast: bool) -> Any:
    """The module with the scan's steps: chain_forward, recompute, token_gradients, serial, products."""
    if fast:
        from longspan.kernels.block_recurrent import triton_scan

        return triton_scan
    return torch_scan


class _StateScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        state: Tensor,
        keys: Tensor,
        values: Tensor,
        reset: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = ScanWeights.from_tensors(tensors, plan.tanh, plan.ffn_tanh)
        steps = _steps(plan.fast)
        chain = steps.chain_forward(state, keys, values, reset, weights, plan.window, plan.keep == "all")
        kept = () if chain.reads is None else chain.reads.tensors()
        ctx.plan, ctx.count = plan, len(tensors)
        ctx.save_for_backward(keys, values, reset, *tensors, chain.entering, chain.last, *kept)
        ctx.set_materialize_grads(False)
        return chain.state_keys, chain.state_values, chain.last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dkeys: Tensor | None, dvalues: Tensor | None, dlast: Tensor | None) -> tuple[Any, ...]:
        keys, values, reset, *rest = ctx.saved_tensors
        plan = ctx.plan
        weights = ScanWeights.from_tensors(rest[: ctx.count], plan.tanh, plan.ffn_tanh)
        entering, last, *kept = rest[ctx.count :]
        chain = Chain(entering, Reads(*kept) if kept else None, keys, values, last)
        shape = (*entering.shape[:3], weights.heads, weights.stacked.shape[0] // (4 * weights.heads))
        dkeys, dvalues = (keys.new_zeros(shape) if g is None else g.contiguous() for g in (dkeys, dvalues))
        dstate, dtokens, grads = _backward(chain, reset, weights, plan.window, dkeys, dvalues, dlast, plan.fast)
        return (None, dstate, *(g.to(keys.dtype) for g in dtokens), None, *gradients_of_weights(grads, weights))


def _backward(
    chain: Chain,
    reset: Tensor,
    weights: ScanWeights,
    window: int,
    dkeys: Tensor,
    dvalues: Tensor,
    dlast: Tensor | None,
    fast: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor], Gradients]:
    """Gradients of the state before the segment, of the tokens' keys and values, and of the weights."""
    keys, values, entering = chain.state_keys, chain.state_values, chain.entering
    rows, blocks = reset.shape
    steps = _steps(fast)
    written = written_blocks(keys.shape[1] - window, window, blocks, dlast)
    carry = fresh_carry(dlast, chain.last)
    dinitial = torch.zeros_like(carry)
    dtokens = steps.token_gradients(keys, values, window, written)
    step = chunk_blocks(rows, blocks, entering.shape[2], window, entering.shape[3])
    grads = Gradients(several=step < blocks)
    for first in reversed(range(0, blocks, step)):
        last = min(first + step, blocks)
        if chain.reads is None:
            seen = (x[:, first * window : (last + 1) * window] for x in (keys, values))
            reads = steps.recompute(entering[:, first:last], *seen, reset[:, first:last], weights, window)
        else:
            reads = chain.reads.blocks(first, last)
        chunk = Chunk(
            first, last, written, window, weights, entering, chain.last, keys, values, reset, reads, dkeys, dvalues
        )
        carry, result = steps.serial(chunk, carry, dinitial, grads)
        steps.products(chunk, result, dtokens, grads)
    grads.add("initial", dinitial.sum(0))
    return carry, dtokens, grads


def fresh_carry(dlast: Tensor | None, like: Tensor) -> Tensor:
    """What the way back begins with, in memory of its own: the gradient of the last state [B, S, D]; None is zero."""
    if dlast is None:
        return torch.zeros_like(like, memory_format=torch.contiguous_format)
    return dlast.clone(memory_format=torch.contiguous_format)


def gradients_of_weights(grads: Gradients, weights: ScanWeights) -> list[Tensor | None]:
    """Gradients in the order of `ScanWeights`, of its types."""
    scales = grads.sums.pop("scales", None)
    for index, name in enumerate(("self_scale", "token_scale")):
        if scales is not None:
            grads.add(name, scales[index] * getattr(weights, name).sign())
    return [grads.of(name, getattr(weights, name)) for name in ScanWeights.names()]
