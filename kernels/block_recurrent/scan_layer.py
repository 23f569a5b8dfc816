"""The Block-Recurrent layer's attention around the state scan with the three-phase backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.kernels import backend
from longspan.kernels.block_recurrent.inputs import (
    BlockRecurrentInputs,
    BlockRecurrentOutputs,
    token_resets,
)
from longspan.kernels.block_recurrent.scan import scan_states
from longspan.kernels.window_attention.api import window_attention
from longspan.kernels.window_attention.support import unsupported as window_unsupported

BESIDE = True  # window attention and state chain on two streams
HEAD_WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unsupported(inputs: BlockRecurrentInputs) -> str | None:
    """Why the Triton kernels cannot take these inputs; None if they can."""
    if inputs.qkv.dtype not in DTYPES:
        return f"{inputs.qkv.dtype} has no kernel (bfloat16, float16 and float32 have)."
    write = inputs.path.write
    if backend.autocasting(inputs.qkv):
        return backend.NO_AUTOCAST
    if write is not None and write.gate is not None and write.gate.tanh and write.gate.bias is not None:
        return "a fixed gate that writes a tanh has no kernel."
    if inputs.qkv.shape[-1] not in HEAD_WIDTHS:
        return f"heads of width {inputs.qkv.shape[-1]} have no kernel ({', '.join(map(str, HEAD_WIDTHS))} have)."
    return None


def scanned(inputs: BlockRecurrentInputs, *, fast: bool) -> BlockRecurrentOutputs:
    """The layer by `scan_states`; arguments and result as `inputs`.

    Args:
        inputs: checked.
        fast: in Triton where there is a kernel.
    """
    with torch.cuda.device_of(inputs.qkv):
        return _scanned(inputs, fast)


def _scanned(inputs: BlockRecurrentInputs, fast: bool) -> BlockRecurrentOutputs:
    qkv, window, path = inputs.qkv, inputs.window, inputs.path
    starts = token_resets(inputs.reset, inputs.tokens, window)
    if fast:
        from longspan.kernels.block_recurrent.triton_layer import Beside, scan_tokens
        from longspan.kernels.block_recurrent.triton_tokens import read_states

    if fast and path.write is not None and not inputs.divided:
        cache = (inputs.cached_keys, inputs.cached_values)
        beside = None
        if BESIDE and window_unsupported(qkv) is None:
            beside = Beside(inputs.bias_table, inputs.scale, starts, inputs.drop)
        read, last, *found = scan_tokens(
            qkv, inputs.state_query, inputs.state_scale, cache, inputs.state, inputs.reset, path, window, beside
        )
        if beside is not None:
            return BlockRecurrentOutputs(found[0], read, found[1], found[2], last)
        qkv = found[0]
    else:
        tokens = inputs.normalised()
        keys, values = (tokens.keys, tokens.values) if inputs.all_tokens is None else inputs.all_tokens.unbind(0)
        states = scan_states(inputs.state, keys, values, inputs.reset, path, window, fast=fast)
        last, own_heads = states.last, inputs.own_heads or slice(None)
        offered = states.keys[..., own_heads, :], states.values[..., own_heads, :]
        if fast:
            read = read_states(inputs.state_query, inputs.state_scale, *offered, window)
        else:
            read = _read_states(tokens.state_query, *offered, window)
    own, new_keys, new_values = window_attention(
        qkv,
        inputs.cached_keys,
        inputs.cached_values,
        inputs.bias_table,
        inputs.scale,
        reset=starts,
        reset_grid=window,
        drop=inputs.drop,
    )
    return BlockRecurrentOutputs(own, read, new_keys, new_values, last)


def _read_states(queries: Tensor, keys: Tensor, values: Tensor, window: int) -> Tensor:
    """Tokens [B, T, H, Dh], normalised and scaled, read the states [B, n, S, H, Dh] entering their blocks."""
    blocks, tokens = keys.shape[1], queries.shape[1]
    padded = F.pad(queries, (0, 0, 0, 0, 0, blocks * window - tokens)).unflatten(1, (blocks, window))
    q, k, v = (x.transpose(2, 3) for x in (padded, keys, values))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(2, 3).flatten(1, 2)[:, :tokens]
