"""The state path of a Block-Recurrent layer: projections of the state, its two reads, and the gated write.

Letters: B rows, S state vectors, D width, H heads, Dh width of a head, W window, F width of the state FFN.
Weights are [out, in]. The state stays fp32 (or fp64); matrix products take operands of the weights' type.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.kernels.norm.reference import rms_norm
from longspan.kernels.window_attention.reference import l2_normalise


@dataclass(frozen=True)
class Gate:
    """Weights of one gate: `bias` alone is the paper's fixed gate, the other four are its LSTM gate."""

    bias: Tensor | None = None  # [D]
    forget_weight: Tensor | None = None  # [D, width of hidden]
    forget_bias: Tensor | None = None  # [D]
    input_weight: Tensor | None = None
    input_bias: Tensor | None = None
    tanh: bool = False  # of what is written, as in the paper; the authors' code has none

    def __call__(self, state: Tensor, out: Tensor, hidden: Tensor) -> Tensor:
        """G(state, out, hidden): the state after a gated write.

        Args:
            state: [B, S, D] fp32.
            out: [B, S, D], what is written.
            hidden: [B, S, any], what the LSTM gate looks at.

        Returns:
            [B, S, D] fp32.
        """
        out = out.to(state.dtype)
        if self.tanh:
            out = torch.tanh(out)
        if self.bias is not None:
            keep = torch.sigmoid(self.bias.to(state.dtype))
            return state * keep + out * (1 - keep)
        assert self.forget_weight is not None and self.forget_bias is not None
        assert self.input_weight is not None and self.input_bias is not None
        forget = F.linear(hidden, self.forget_weight).to(state.dtype) + self.forget_bias.to(state.dtype)
        write = F.linear(hidden, self.input_weight).to(state.dtype) + self.input_bias.to(state.dtype)
        return state * torch.sigmoid(forget + 1) + out * torch.sigmoid(write - 1)


@dataclass(frozen=True)
class StateFeedForward:
    """Weights of the FFN on the state (modes dual and single)."""

    hidden: Tensor  # [F, D] (dual) or [F, 2*H*Dh] (single)
    output: Tensor  # [D, F]
    gate: Gate
    norm: Tensor | None = None  # [D], dual only


@dataclass(frozen=True)
class StateWrite:
    """Weights that write the state. `output` and `gate` are absent in mode single, `ffn` in mode skip."""

    query: Tensor  # [H*Dh, D], reads the state
    token_query: Tensor  # [H*Dh, D], reads the tokens
    self_scale: Tensor  # [H]
    token_scale: Tensor  # [H]
    output: Tensor | None = None  # [D, 2*H*Dh]
    gate: Gate | None = None
    ffn: StateFeedForward | None = None


@dataclass(frozen=True)
class StatePath:
    """All weights of the state path; without `write` the state never changes."""

    heads: int
    initial: Tensor  # [S, D], state at a document start
    norm: Tensor  # [D]
    ids: Tensor  # [S, D]
    key: Tensor  # [H*Dh, D]
    value: Tensor  # [H*Dh, D]
    write: StateWrite | None

    def stacked(self) -> Tensor:
        """All projections of the state as one matrix [2 or 4 times H*Dh, D], so that a block needs one product."""
        queries = [] if self.write is None else [self.write.query, self.write.token_query]
        return torch.cat([self.key, self.value, *queries])


@dataclass(frozen=True)
class ProjectedState:
    """What one state offers: keys and values for every reader, and the queries of the write."""

    keys: Tensor  # [B, H, S, Dh]
    values: Tensor  # [B, H, S, Dh]
    self_query: Tensor | None = None  # [B, H, S, Dh], scaled
    token_query: Tensor | None = None  # [B, H, S, Dh], scaled


def project_state(state: Tensor, path: StatePath, stacked: Tensor) -> ProjectedState:
    """Keys, values and queries of a state [B, S, D]: u = RMS(c) + ids, then the projections of `path.stacked()`."""
    u = (rms_norm(state, path.norm) + path.ids.to(state.dtype)).to(stacked.dtype)
    parts = F.linear(u, stacked).unflatten(-1, (-1, path.key.shape[0])).unflatten(-1, (path.heads, -1)).unbind(2)
    keys, values = l2_normalise(parts[0]).transpose(1, 2), parts[1].transpose(1, 2)
    if path.write is None:
        return ProjectedState(keys, values)
    return ProjectedState(
        keys,
        values,
        self_query=l2_normalise(parts[2], path.write.self_scale).transpose(1, 2),
        token_query=l2_normalise(parts[3], path.write.token_scale).transpose(1, 2),
    )


def cross_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v without mask or bias; q is scaled already, logits are bounded by the learned scale.

    Args:
        q: [B, H, L, Dh].
        k, v: [B, H, K, Dh].

    Returns:
        [B, H, L, Dh].
    """
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)


def write_state(state: Tensor, projected: ProjectedState, keys: Tensor, values: Tensor, path: StatePath) -> Tensor:
    """The state after one block: skip, dual or single, by the weights that exist.

    Args:
        state: [B, S, D] before the block.
        projected: of the same state.
        keys, values: [B, H, 2W, Dh], tokens of the previous and this block, keys normalised.
        path: weights.

    Returns:
        [B, S, D].
    """
    write = path.write
    if write is None:
        return state
    assert projected.self_query is not None and projected.token_query is not None
    own = cross_attend(projected.self_query, projected.keys, projected.values)
    tokens = cross_attend(projected.token_query, keys, values)
    read = torch.cat([own, tokens], dim=1).transpose(1, 2).flatten(2)  # [B, S, 2*H*Dh]
    if write.gate is not None:
        assert write.output is not None
        state = write.gate(state, F.linear(read, write.output), read)
    if write.ffn is None:
        return state
    if write.ffn.norm is None:
        hidden = torch.relu(F.linear(read, write.ffn.hidden))
        return write.ffn.gate(state, torch.tanh(F.linear(hidden, write.ffn.output)), hidden)
    hidden = torch.relu(F.linear(rms_norm(state, write.ffn.norm).to(read.dtype), write.ffn.hidden))
    return write.ffn.gate(state, F.linear(hidden, write.ffn.output), hidden)
