"""The Block-Recurrent layer's attention with everything outside the state path done for all blocks at once.

The state path reads the layer's input keys and values and the state, never the token outputs. So the serial part
is the scan over the state alone; the tokens' attention follows for all blocks in parallel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.kernels.block_recurrent.inputs import BlockRecurrentInputs, BlockRecurrentOutputs
from longspan.kernels.block_recurrent.state_path import (
    ProjectedState,
    StatePath,
    cross_attend,
    project_state,
    write_state,
)
from longspan.kernels.window_attention.reference import attend_blocks, attend_rest, block_windows


def two_phase(inputs: BlockRecurrentInputs) -> BlockRecurrentOutputs:
    """Scan of the state, then all tokens at once. Arguments and result: `inputs`."""
    window, tokens = inputs.window, inputs.normalised()
    blocks, rest = divmod(inputs.tokens, window)
    keys, values = (block_windows(x, inputs.reset[:, :blocks], window) for x in (tokens.keys, tokens.values))
    projected, states = scan_state(inputs, keys, values)
    bias_of = (inputs.bias_table, inputs.scale)
    own, read = [], []
    if blocks:
        own.append(attend_blocks(tokens.q[:, : blocks * window], keys, values, bias_of, inputs.drop))
        read.append(_read_states(tokens.state_query[:, : blocks * window], projected[:blocks]))
    if rest:
        own.append(attend_rest(tokens.q, tokens.keys, tokens.values, bias_of, inputs.reset, inputs.drop))
        read.append(_read_states(tokens.state_query[:, -rest:], projected[-1:]))
    cache = tokens.cache(inputs.reset, window)
    return BlockRecurrentOutputs(torch.cat(own, dim=1), torch.cat(read, dim=1), *cache, states[:, -1], states)


def scan_state(inputs: BlockRecurrentInputs, keys: Tensor, values: Tensor) -> tuple[list[ProjectedState], Tensor]:
    """The serial part: for each block the projections of the state that its tokens read, and the state after it.

    Args:
        inputs: of the layer.
        keys, values: [B, n, H, 2W, Dh] of the n whole blocks.

    Returns:
        ceil(T/W) projected states; states [B, ceil(T/W), S, D].
    """
    path: StatePath = inputs.path
    stacked = path.stacked()
    state, projected, states = inputs.state, [], []
    initial = path.initial.to(state.dtype)
    # unbind, not indexing: the gradient of an index is as large as the whole tensor
    keys_of, values_of = keys.unbind(1), values.unbind(1)
    for block in range(inputs.reset.shape[1]):
        state = torch.where(inputs.reset[:, block, None, None], initial, state)
        projected.append(project_state(state, path, stacked))
        if block < len(keys_of):
            state = write_state(state, projected[-1], keys_of[block], values_of[block], path)
        states.append(state)
    return projected, torch.stack(states, dim=1)


def _read_states(queries: Tensor, projected: list[ProjectedState]) -> Tensor:
    """Tokens [B, n*L, H, Dh] of n blocks read the n states: [B, n*L, H, Dh]."""
    blocks = len(projected)
    q = queries.unflatten(1, (blocks, -1)).transpose(2, 3).flatten(0, 1)
    k = torch.stack([p.keys for p in projected], dim=1).flatten(0, 1)
    v = torch.stack([p.values for p in projected], dim=1).flatten(0, 1)
    return cross_attend(q, k, v).unflatten(0, (-1, blocks)).transpose(2, 3).flatten(1, 2)
