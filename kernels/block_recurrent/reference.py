"""The Block-Recurrent layer's attention block by block, as the paper describes it: the form to compare with."""

from __future__ import annotations

import torch

from longspan.kernels.block_recurrent.inputs import BlockRecurrentInputs, BlockRecurrentOutputs
from longspan.kernels.block_recurrent.state_path import cross_attend, project_state, write_state
from longspan.kernels.window_attention.reference import attend, scaled_bias


def sequential(inputs: BlockRecurrentInputs) -> BlockRecurrentOutputs:
    """Every block in turn: read the state, attend, write the state. Arguments and result: `inputs`."""
    path, window, length = inputs.path, inputs.window, inputs.tokens
    tokens, stacked = inputs.normalised(), path.stacked()
    state, owns, reads, states = inputs.state, [], [], []
    for block, begin in enumerate(range(0, length, window)):
        end = min(begin + window, length)
        starts = inputs.reset[:, block, None, None]
        state = torch.where(starts, path.initial.to(state.dtype), state)
        seen = [
            torch.cat(
                [x[:, begin : begin + window].masked_fill(starts[..., None], 0.0), x[:, begin + window : end + window]],
                dim=1,
            ).transpose(1, 2)
            for x in (tokens.keys, tokens.values)
        ]
        keys, values = seen  # [B, H, 2W, Dh]
        projected = project_state(state, path, stacked)
        bias = scaled_bias(inputs.bias_table, inputs.scale, window, end - begin)
        drop = None if inputs.drop is None else inputs.drop[:, : end - begin, : window + end - begin]
        q = tokens.q[:, begin:end].transpose(1, 2)
        owns.append(attend(q.unsqueeze(1), keys.unsqueeze(1), values.unsqueeze(1), bias, None, drop)[:, 0])
        reads.append(cross_attend(tokens.state_query[:, begin:end].transpose(1, 2), projected.keys, projected.values))
        if end - begin == window:
            state = write_state(state, projected, keys, values, path)
        states.append(state)
    own, read = (torch.cat(parts, dim=2).transpose(1, 2) for parts in (owns, reads))
    return BlockRecurrentOutputs(own, read, *tokens.cache(inputs.reset, window), state, torch.stack(states, dim=1))
