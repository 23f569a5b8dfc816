"""The Block-Recurrent layer's attention where ranks share each sequence: the state is handed from rank to rank."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from longspan.kernels import backend
from longspan.kernels.block_recurrent.api import block_recurrent
from longspan.kernels.block_recurrent.inputs import BlockRecurrentInputs, BlockRecurrentOutputs, token_resets
from longspan.kernels.block_recurrent.scan_layer import unsupported
from longspan.kernels.context_parallel.carry import StateGrad, carry_state, row_slices
from longspan.kernels.context_parallel.shard import SequenceShard
from longspan.kernels.streams import Fork
from longspan.kernels.window_attention.api import window_attention


def block_recurrent_over_ranks(
    inputs: BlockRecurrentInputs, shard: SequenceShard, *, slices: int = 1, state_grad: StateGrad = "full"
) -> BlockRecurrentOutputs:
    """`block_recurrent` over this rank's share of the tokens.

    Args:
        inputs: of this rank's tokens, the cache that of the tokens just before them; the state is the one before the
            whole sequence, the same on all ranks. Not frozen.
        shard: of this rank, one of several.
        slices: parts of the batch in which the state is handed on.
        state_grad: "full" or "truncate", whether the state's gradient crosses from rank to rank.

    Returns:
        See `BlockRecurrentOutputs`; the state, after this rank's share, is without gradient.

    Raises:
        ShapeError: as `block_recurrent`.
    """
    inputs.check()
    pieces = row_slices(inputs.qkv.shape[0], slices)
    parts = inputs.split([piece.stop - piece.start for piece in pieces])
    of_rows = {piece.start: part for piece, part in zip(pieces, parts, strict=True)}
    reason = unsupported(inputs)
    if inputs.divided or backend.choose("block_recurrent", inputs.qkv, unsupported=reason) != "triton":
        return _one_after_the_other(inputs, of_rows, shard, slices, state_grad)
    return _side_by_side(inputs, of_rows, shard, slices, state_grad)


def _one_after_the_other(
    inputs: BlockRecurrentInputs,
    of_rows: dict[int, BlockRecurrentInputs],
    shard: SequenceShard,
    slices: int,
    state_grad: StateGrad,
) -> BlockRecurrentOutputs:
    """The whole layer for one slice after the other."""
    found: list[BlockRecurrentOutputs] = []

    def run(vectors: list[Tensor], rows: slice) -> tuple[Tensor, list[Tensor]]:
        found.append(block_recurrent(replace(of_rows[rows.start], state=vectors[0])))
        return found[-1].read, [found[-1].state.contiguous()]

    read, last = carry_state([inputs.state], run, shard, slices=slices, state_grad=state_grad)
    own, keys, values = (torch.cat([getattr(part, name) for part in found]) for name in ("own", "keys", "values"))
    return BlockRecurrentOutputs(own, read, keys, values, last[0])


def _side_by_side(
    inputs: BlockRecurrentInputs,
    of_rows: dict[int, BlockRecurrentInputs],
    shard: SequenceShard,
    slices: int,
    state_grad: StateGrad,
) -> BlockRecurrentOutputs:
    """State chain and hand-over on a stream of their own: window attention fills the time in which ranks wait.

    So does its backward pass, which autograd runs on the streams of the forward pass.
    """
    from longspan.kernels.block_recurrent.triton_layer import scan_tokens

    def run(vectors: list[Tensor], rows: slice) -> tuple[Tensor, list[Tensor]]:
        part = of_rows[rows.start]
        cache = (part.cached_keys, part.cached_values)
        read, last, _ = scan_tokens(
            part.qkv, part.state_query, part.state_scale, cache, vectors[0], part.reset, part.path, part.window
        )
        return read, [last]

    with torch.cuda.device_of(inputs.qkv):
        fork = Fork(inputs.qkv)
        fork.lend(inputs.qkv, inputs.state_query, inputs.cached_keys, inputs.cached_values, inputs.state, inputs.reset)
        with fork.side():
            read, last = carry_state([inputs.state], run, shard, slices=slices, state_grad=state_grad)
        own, keys, values = window_attention(
            inputs.qkv,
            inputs.cached_keys,
            inputs.cached_values,
            inputs.bias_table,
            inputs.scale,
            reset=token_resets(inputs.reset, inputs.tokens, inputs.window),
            reset_grid=inputs.window,
            drop=inputs.drop,
        )
        fork.join()
        fork.take(read, *last)
    return BlockRecurrentOutputs(own, read, keys, values, last[0])
