"""The forward half of the state scan in plain PyTorch: one block in the chain, or many at once when recomputing.

Letters: B rows, m blocks, S state vectors, D width, H heads, Dh width of a head, W window, G see `ScanWeights`.
Leading dimensions `...` are B in the chain and B, m when many blocks are computed at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.kernels.block_recurrent.scan_weights import ScanWeights
from longspan.kernels.block_recurrent.state_path import Gate
from longspan.kernels.norm.reference import rms_norm
from longspan.kernels.window_attention.reference import at_least_fp32

LOG2E = math.log2(math.e)


@dataclass
class Reads:
    """What the state offers and what it has read."""

    proj: Tensor  # [..., S, 4, H, Dh]: key (normalised), value, self query and token query (normalised and scaled)
    inv: Tensor  # fp32 [..., S, 3, H]: 1 / norm of key, self query, token query
    read: Tensor  # [..., S, 2, H, Dh]: from the state itself, from the tokens
    lse: Tensor  # fp32 [..., 2, H, S]: log2 of the sum of exponentials of both reads

    def block(self, index: int) -> Reads:
        """One block of many: without the dimension m."""
        return Reads(*(x[:, index] for x in self.tensors()))

    def blocks(self, first: int, last: int) -> Reads:
        """Blocks first..last-1 of many."""
        return Reads(*(x[:, first:last] for x in self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields in order."""
        return self.proj, self.inv, self.read, self.lse


@dataclass
class GateTape:
    """What the gradient of an LSTM gate needs; for the fixed gate at most the value."""

    forget: Tensor | None = None  # fp32 [..., S, D], after the sigmoid
    write: Tensor | None = None
    value: Tensor | None = None  # fp32 [..., S, D], what is written, after a tanh if the gate has one


@dataclass
class WriteTape:
    """What the gradient of the write needs beside the entering state and the reads."""

    gate: GateTape
    ffn_gate: GateTape
    middle: Tensor | None = None  # fp32 [..., S, D], state between the two gates (dual)
    ffn_input: Tensor | None = None  # [..., S, D] (dual)
    hidden: Tensor | None = None  # [..., S, F]
    written: Tensor | None = None  # fp32 [..., S, D], after the tanh (single)

    def block(self, index: int) -> WriteTape:
        """One block of many: without the dimension m."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, index]

        gate, ffn_gate = (GateTape(cut(g.forget), cut(g.write), cut(g.value)) for g in (self.gate, self.ffn_gate))
        return WriteTape(gate, ffn_gate, cut(self.middle), cut(self.ffn_input), cut(self.hidden), cut(self.written))


def normalised_state(state: Tensor, weights: ScanWeights) -> Tensor:
    """u = RMS(c) + ids in the weights' type, [..., S, D]."""
    return (rms_norm(state, weights.norm) + weights.ids.to(state.dtype)).to(weights.stacked.dtype)


def project(state: Tensor, weights: ScanWeights) -> tuple[Tensor, Tensor]:
    """(proj, inv) of a state [..., S, D]; see `Reads`."""
    raw = F.linear(normalised_state(state, weights), weights.stacked).unflatten(-1, (4, weights.heads, -1))
    key, value, own, tokens = at_least_fp32(raw).unbind(-3)
    inv = torch.stack([torch.rsqrt(x.square().sum(-1) + 1e-6) for x in (key, own, tokens)], dim=-2)
    factors = [inv[..., 0, :], inv[..., 1, :] * weights.self_scale.abs(), inv[..., 2, :] * weights.token_scale.abs()]
    parts = [key * factors[0][..., None], value, own * factors[1][..., None], tokens * factors[2][..., None]]
    return torch.stack(parts, dim=-3).to(raw.dtype), inv


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T) v and the base-2 log of the sum of exponentials.

    Args:
        q: [..., L, H, Dh], scaled.
        k, v: [..., K, H, Dh].

    Returns:
        [..., L, H, Dh]; fp32 [..., H, L].
    """
    logits = at_least_fp32(torch.matmul(q.transpose(-3, -2), k.transpose(-3, -2).transpose(-2, -1)))
    lse = torch.logsumexp(logits, dim=-1)
    probabilities = torch.exp(logits - lse[..., None]).to(v.dtype)
    return torch.matmul(probabilities, v.transpose(-3, -2)).transpose(-3, -2), lse * LOG2E


def read(proj: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(read, lse) of `Reads` from proj and the tokens' keys and values [..., 2W, H, Dh]."""
    state_key, state_value, own_query, token_query = proj.unbind(-3)
    own, own_lse = attend(own_query, state_key, state_value)
    tokens, token_lse = attend(token_query, keys, values)
    return torch.stack([own, tokens], dim=-3), torch.stack([own_lse, token_lse], dim=-3)


def token_windows(full: Tensor, reset: Tensor, first: int, last: int, window: int) -> Tensor:
    """Token keys (or values) that blocks first..last-1 see: the window before, zeroed at a document start, and theirs.

    Args:
        full: [B, W+T, H, Dh], cache in front.
        reset: bool [B, n].

    Returns:
        [B, last-first, 2W, H, Dh].
    """
    cut = full[:, first * window : (last + 1) * window].unflatten(1, (last - first + 1, window))
    before = cut[:, :-1].masked_fill(reset[:, first:last, None, None, None], 0.0)
    return torch.cat([before, cut[:, 1:]], dim=2)


def _through_gate(gate: Gate, state: Tensor, out: Tensor, hidden: Tensor) -> tuple[Tensor, GateTape]:
    value = torch.tanh(out.to(state.dtype)) if gate.tanh else out.to(state.dtype)
    if gate.bias is not None:
        keep = torch.sigmoid(gate.bias.to(state.dtype))
        return state * keep + value * (1 - keep), GateTape(value=value if gate.tanh else None)
    assert gate.forget_weight is not None and gate.forget_bias is not None
    assert gate.input_weight is not None and gate.input_bias is not None
    forget = torch.sigmoid(F.linear(hidden, gate.forget_weight).to(state.dtype) + gate.forget_bias + 1)
    write = torch.sigmoid(F.linear(hidden, gate.input_weight).to(state.dtype) + gate.input_bias - 1)
    return state * forget + value * write, GateTape(forget, write, value)


def write(state: Tensor, reads: Tensor, weights: ScanWeights) -> tuple[Tensor, WriteTape]:
    """The state after a block, and what its gradient needs.

    Args:
        state: [..., S, D] entering the block.
        reads: [..., S, 2, H, Dh].
    """
    flat = reads.flatten(-3)
    tape = WriteTape(GateTape(), GateTape())
    if weights.output is not None:
        state, tape.gate = _through_gate(weights.gate, state, F.linear(flat, weights.output), flat)
    if weights.ffn_hidden is None or weights.ffn_output is None:
        return state, tape
    if weights.ffn_norm is None:
        tape.hidden = torch.relu(F.linear(flat, weights.ffn_hidden))
        tape.written = torch.tanh(F.linear(tape.hidden, weights.ffn_output)).to(state.dtype)
        state, tape.ffn_gate = _through_gate(weights.ffn_gate, state, tape.written, tape.hidden)
        return state, tape
    tape.middle = state
    tape.ffn_input = rms_norm(state, weights.ffn_norm).to(flat.dtype)
    tape.hidden = torch.relu(F.linear(tape.ffn_input, weights.ffn_hidden))
    out = F.linear(tape.hidden, weights.ffn_output)
    state, tape.ffn_gate = _through_gate(weights.ffn_gate, state, out, tape.hidden)
    return state, tape


@dataclass(frozen=True)
class Chain:
    """What the forward chain of a segment leaves behind; n blocks, of which the first `whole` have W tokens."""

    entering: Tensor  # fp32 [B, n, S, D], after the reset rule
    reads: Reads | None  # proj and inv of n blocks, read and lse of the whole ones; None: only keys and values kept
    state_keys: Tensor  # [B, n, S, H, Dh]
    state_values: Tensor  # [B, n, S, H, Dh]
    last: Tensor  # fp32 [B, S, D], after the segment; a last block shorter than W leaves its state unchanged


def chain_forward(
    state: Tensor, keys: Tensor, values: Tensor, reset: Tensor, weights: ScanWeights, window: int, keep_reads: bool
) -> Chain:
    """The chain, block by block.

    Args:
        state: fp32 [B, S, D] before the segment.
        keys, values: [B, W+T, H, Dh], cache in front, keys normalised.
        reset: bool [B, n].
        weights: of the scan.
        window: W.
        keep_reads: keep what recomputing would give.
    """
    whole = keys.shape[1] // window - 1
    initial = weights.initial.to(state.dtype)
    entering: list[Tensor] = []
    offered: list[Tensor] = []
    norms: list[Tensor] = []
    kept: list[tuple[Tensor, Tensor]] = []
    for block in range(reset.shape[1]):
        state = torch.where(reset[:, block, None, None], initial, state)
        entering.append(state)
        proj, inv = project(state, weights)
        offered.append(proj if keep_reads else proj[..., :2, :, :].clone())
        norms.append(inv)
        if block < whole:
            seen_keys, seen_values = (token_windows(x, reset, block, block + 1, window)[:, 0] for x in (keys, values))
            found = read(proj, seen_keys, seen_values)
            state, _ = write(state, found[0], weights)
            if keep_reads:
                kept.append(found)
    projected = torch.stack(offered, dim=1)
    reads = None
    if kept:
        found_reads, lse = (torch.stack(parts, dim=1) for parts in zip(*kept, strict=True))
        reads = Reads(projected, torch.stack(norms, dim=1), found_reads, lse)
    states = torch.stack(entering, dim=1)
    return Chain(states, reads, projected[..., 0, :, :], projected[..., 1, :, :], state)


def recompute(
    entering: Tensor, keys: Tensor, values: Tensor, reset: Tensor, weights: ScanWeights, window: int
) -> Reads:
    """`Reads` of m blocks at once; read and lse of the whole ones alone.

    Args:
        entering: fp32 [B, m, S, D].
        keys, values: [B, W + L, H, Dh], (m-1)*W < L <= m*W: the tokens of these blocks and the window before.
        reset: bool [B, m].
        weights: of the scan.
        window: W.
    """
    whole = keys.shape[1] // window - 1
    proj, inv = project(entering, weights)
    seen = (token_windows(x, reset, 0, whole, window) for x in (keys, values))
    return Reads(proj, inv, *read(proj[:, :whole], *seen))
