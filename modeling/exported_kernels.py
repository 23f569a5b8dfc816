"""What exported models run on our kernels where this package is installed: norms, and mixers over whole blocks.

The Python files of an export look this module up by its name and take it if `FORM` is the one that they know; without
it they do the same in plain PyTorch. It takes their modules, whose parameters have the names of `modeling/mixers`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.kernels.block_recurrent.api import block_recurrent
from longspan.kernels.block_recurrent.inputs import BlockRecurrentInputs
from longspan.kernels.block_recurrent.state_path import Gate, StateFeedForward, StatePath, StateWrite
from longspan.kernels.norm.api import rms_norm
from longspan.kernels.window_attention.api import window_attention

__all__ = ["FORM", "recurrent_blocks", "rms_norm", "window_blocks"]

FORM = 1


def window_blocks(mixer: Any, h: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Attention of whole blocks to the last W tokens.

    Args:
        mixer: `WindowMixer` of an export.
        h: [B, n*W, D], normalised; the first token begins a block.
        tensors: keys, values [B, 2W, H, K], of which the first W count.

    Returns:
        What the window gives in front of the output projection, [B, n*W, H*K]; keys and values after the blocks.
    """
    out, keys, values = window_attention(
        _projected(mixer, h),
        tensors["keys"][:, : mixer.window].contiguous(),
        tensors["values"][:, : mixer.window].contiguous(),
        None if mixer.rotary else mixer.position_table,
        mixer.scale,
        reset=torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device),
        reset_grid=mixer.window,
        positions="rope" if mixer.rotary else "t5",
    )
    return out.flatten(2), _with_open_block(keys, values)


def recurrent_blocks(mixer: Any, h: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Window attention, reads of the state and its writes over whole blocks.

    Args:
        mixer: `RecurrentMixer` of an export.
        h: [B, n*W, D], normalised; the first token begins a block.
        tensors: as in `window_blocks`, and state float32 [B, S, D].

    Returns:
        Window and read [B, n*W, 2*H*K]; the state after the last block, float32 [B, S, D]; keys and values after it.
    """
    rows, tokens, window = h.shape[0], h.shape[1], mixer.window
    inputs = BlockRecurrentInputs(
        qkv=_projected(mixer, h),
        state_query=mixer.split(mixer.state_query(h)),
        cached_keys=tensors["keys"][:, :window].contiguous(),
        cached_values=tensors["values"][:, :window].contiguous(),
        bias_table=mixer.position_table,
        scale=mixer.scale,
        state_scale=mixer.state_scale,
        state=tensors["state"].contiguous(),
        reset=torch.zeros(rows, tokens // window, dtype=torch.bool, device=h.device),
        path=_state_path(mixer),
        drop=None,
    )
    out = block_recurrent(inputs)
    mixed = torch.cat([out.own.flatten(2), out.read.flatten(2)], -1)
    return mixed, out.state, _with_open_block(out.keys, out.values)


def _projected(mixer: Any, h: Tensor) -> Tensor:
    """Queries, keys and values [B, T, 3, H, K]."""
    weight = torch.cat([mixer.query.weight, mixer.key.weight, mixer.value.weight])
    return F.linear(h, weight).unflatten(-1, (3, mixer.heads, mixer.head_dim))


def _with_open_block(keys: Tensor, values: Tensor) -> dict[str, Tensor]:
    """The cache [B, 2W, H, K]: the last block, and room for the next."""
    return {name: torch.cat([x, torch.zeros_like(x)], 1) for name, x in (("keys", keys), ("values", values))}


def _state_path(mixer: Any) -> StatePath:
    state = mixer.recurrent
    return StatePath(
        heads=mixer.heads,
        initial=state.initial,
        norm=state.norm.scale,
        ids=state.ids,
        key=state.key.weight,
        value=state.value.weight,
        write=None if state.write is None else _state_write(state.write),
    )


def _state_write(write: Any) -> StateWrite:
    ffn = None
    if write.mode != "skip":
        norm = write.ffn_norm.scale if write.mode == "dual" else None
        ffn = StateFeedForward(write.ffn_hidden.weight, write.ffn_output.weight, _gate(write.ffn_gate), norm)
    return StateWrite(
        query=write.query.weight,
        token_query=write.token_query.weight,
        self_scale=write.self_scale,
        token_scale=write.token_scale,
        output=None if write.mode == "single" else write.output.weight,
        gate=None if write.mode == "single" else _gate(write.gate),
        ffn=ffn,
    )


def _gate(gate: Any) -> Gate:
    return Gate(**dict(gate.named_parameters()), tanh=gate.tanh)
