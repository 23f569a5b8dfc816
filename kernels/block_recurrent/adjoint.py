"""The backward half of the state scan in plain PyTorch: the serial step's parts, and the weight gradients.

Letters as in `three_phase`. A gradient called d... has the shape of what it belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.kernels.block_recurrent.scan_weights import ScanWeights
from longspan.kernels.block_recurrent.state_path import Gate
from longspan.kernels.block_recurrent.three_phase import (
    LOG2E,
    GateTape,
    Reads,
    WriteTape,
    normalised_state,
    token_windows,
    write,
)
from longspan.kernels.window_attention.reference import at_least_fp32


class Gradients:
    """Sums of gradients by name of the weight, fp32 or wider; a product that is all of one comes as it leaves."""

    def __init__(self, *, several: bool) -> None:
        """No gradient yet; several: products of more than one chunk are added up, so that none may be rounded."""
        self.sums: dict[str, Tensor] = {}
        self.several = several

    def add(self, name: str, value: Tensor) -> None:
        """Add to the sum of `name`."""
        self.sums[name] = at_least_fp32(self.sums[name]) + at_least_fp32(value) if name in self.sums else value

    def of(self, name: str, like: Tensor | None) -> Tensor | None:
        """The sum in the type of the weight; zeros if nothing was added, None if there is no such weight."""
        if like is None:
            return None
        return self.sums[name].to(like.dtype) if name in self.sums else torch.zeros_like(like)


def rms_adjoint(du: Tensor, state: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient through RMS(state) * scale.

    Args:
        du: [..., D].
        state: fp32 [..., D].
        scale: [D].

    Returns:
        dstate fp32 [..., D]; the normalised state, fp32.
    """
    du = du.to(state.dtype)
    factor = torch.rsqrt(state.square().mean(-1, keepdim=True) + 1e-6)
    unit = state * factor
    scaled = du * scale.to(state.dtype)
    return factor * (scaled - unit * (unit * scaled).mean(-1, keepdim=True)), unit


def norm_adjoint(dy: Tensor, y: Tensor, inv: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradient through y = x * inv * |scale|, with inv = 1 / sqrt(sum x^2 + 1e-6) per head.

    Args:
        dy, y: [..., H, Dh].
        inv: [..., H].
        scale: [H], or None for 1.

    Returns:
        dx fp32 [..., H, Dh]; d|scale| [..., H] (meaningless without a scale).
    """
    dy, y = at_least_fp32(dy), at_least_fp32(y)
    along = (dy * y).sum(-1)
    if scale is None:
        return inv[..., None] * (dy - y * along[..., None]), along
    size = at_least_fp32(scale).abs()
    # at a scale of zero y is zero and so is the gradient
    inverse = torch.where(size > 0, 1 / size, 0.0)
    dx = (inv * size)[..., None] * (dy - y * (along * inverse.square())[..., None])
    return dx, along * inverse


def attend_adjoint(
    dout: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of `three_phase.attend`: dq [..., L, H, Dh], dk, dv [..., K, H, Dh], fp32.

    Args:
        dout, out, q: [..., L, H, Dh].
        k, v: [..., K, H, Dh].
        lse: [..., H, L].
    """
    dout, out, q, k, v = (x.transpose(-3, -2) for x in (dout, out, q, k, v))
    delta = (at_least_fp32(dout) * at_least_fp32(out)).sum(-1, keepdim=True)
    probabilities = torch.exp2(at_least_fp32(q @ k.transpose(-2, -1)) * LOG2E - lse[..., None])
    dlogits = probabilities * (at_least_fp32(dout @ v.transpose(-2, -1)) - delta)
    dv = probabilities.to(v.dtype).transpose(-2, -1) @ dout
    dlogits = dlogits.to(q.dtype)
    return tuple(at_least_fp32(x.transpose(-3, -2)) for x in (dlogits @ k, dlogits.transpose(-2, -1) @ q, dv))  # type: ignore[return-value]


def read_adjoint(
    dread: Tensor,
    reads: Reads,
    keys: Tensor,
    values: Tensor,
    dkeys: Tensor,
    dvalues: Tensor,
    weights: ScanWeights,
) -> tuple[Tensor, Tensor]:
    """Gradient of both reads of one block down to the projections.

    Args:
        dread: [B, S, 2, H, Dh].
        reads: of the block.
        keys, values: [B, 2W, H, Dh], the tokens that the block sees.
        dkeys, dvalues: [B, S, H, Dh], gradient from the tokens that read this state.
        weights: of the scan.

    Returns:
        dproj [B, S, 4, H, Dh], in front of the normalisation; d|scale| [2, H] of self and token query.
    """
    state_key, state_value, own_query, token_query = reads.proj.unbind(-3)
    own, tokens = dread.unbind(-3)
    dq, dk, dv = attend_adjoint(own, reads.read[..., 0, :, :], own_query, state_key, state_value, reads.lse[:, 0])
    dq2, _, _ = attend_adjoint(tokens, reads.read[..., 1, :, :], token_query, keys, values, reads.lse[:, 1])
    key_inv, own_inv, token_inv = reads.inv.unbind(-2)
    dkey, _ = norm_adjoint(dk + dkeys, state_key, key_inv, None)
    down, self_scale = norm_adjoint(dq, own_query, own_inv, weights.self_scale)
    dtokens, token_scale = norm_adjoint(dq2, token_query, token_inv, weights.token_scale)
    dproj = torch.stack([dkey, dv + dvalues, down, dtokens], dim=-3).to(reads.proj.dtype)
    return dproj, torch.stack([self_scale.sum((0, 1)), token_scale.sum((0, 1))])


def offered_adjoint(proj: Tensor, inv: Tensor, dkeys: Tensor, dvalues: Tensor) -> Tensor:
    """As `read_adjoint` for a block that is read by tokens and never written: dproj [B, S, 4, H, Dh]."""
    dkey, _ = norm_adjoint(dkeys, proj[..., 0, :, :], inv[..., 0, :], None)
    none = torch.zeros_like(dkey)
    return torch.stack([dkey, at_least_fp32(dvalues), none, none], dim=-3).to(proj.dtype)


def _gate_adjoint(dstate: Tensor, state: Tensor, tape: GateTape, gate: Gate) -> tuple[Tensor, Tensor]:
    """(gradient of the state [B, S, D], of what the gate's matrix gives [B, S, G*D]), both fp32."""
    if gate.bias is not None:
        keep = torch.sigmoid(gate.bias.to(state.dtype))
        slope = 1.0 if tape.value is None else 1 - tape.value.square()
        return dstate * keep, dstate * (1 - keep) * slope
    assert tape.forget is not None and tape.write is not None and tape.value is not None
    dforget = dstate * state * tape.forget * (1 - tape.forget)
    dinput = dstate * tape.value * tape.write * (1 - tape.write)
    dvalue = dstate * tape.write
    if gate.tanh:
        dvalue = dvalue * (1 - tape.value.square())
    return dstate * tape.forget, torch.cat([dvalue, dforget, dinput], dim=-1)


def _add_fixed_gate(grads: Gradients, name: str, bias: Tensor | None, dstate: Tensor, fall: Tensor) -> None:
    """The fixed gate's gradient: c' = c g + z (1-g), so dg = c - z = fall / (1-g) and the 1-g cancels."""
    if bias is not None:
        grads.add(name, (dstate * fall).sum((0, 1)) * torch.sigmoid(bias.to(dstate.dtype)))


def write_adjoint(
    dstate: Tensor,
    state: Tensor,
    after: Tensor,
    tape: WriteTape,
    weights: ScanWeights,
    hidden_matrix: Tensor | None,
    grads: Gradients,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient of the gated write of one block, down to what multiplies `read_matrix`.

    Args:
        dstate: fp32 [B, S, D] of the state after the block.
        state, after: fp32 [B, S, D] entering the block and after it.
        tape: of the block.
        weights: of the scan.
        hidden_matrix: of the weights.
        grads: gradients of the gates' biases are added here.

    Returns:
        fp32 [B, S, D], gradient of the entering state past the reads; rows for `weight_gradients`, [B, S, ...] each.
    """
    rows: dict[str, Tensor] = {}
    ct = weights.stacked.dtype
    if hidden_matrix is not None:
        assert tape.hidden is not None and weights.ffn_hidden is not None
        before = state if tape.middle is None else tape.middle
        _add_fixed_gate(grads, "ffn_gate_bias", weights.ffn_gate_bias, dstate, before - after)
        dstate, dhidden = _gate_adjoint(dstate, before, tape.ffn_gate, weights.ffn_gate)
        if tape.written is not None:
            width = state.shape[-1]
            dvalue = dhidden[..., :width] * (1 - tape.written.square())
            dhidden = torch.cat([dvalue, dhidden[..., width:]], dim=-1)
        rows["hidden"] = dhidden.to(ct)
        dinner = (rows["hidden"] @ hidden_matrix) * (tape.hidden > 0)
        if tape.middle is None:
            rows["read"] = dinner
            return dstate, rows
        assert weights.ffn_norm is not None
        rows["ffn"] = dinner
        dinput = dinner @ weights.ffn_hidden
        through, unit = rms_adjoint(dinput, tape.middle, weights.ffn_norm)
        grads.add("ffn_norm", (dinput.to(unit.dtype) * unit).sum((0, 1)))
        dstate, after = dstate + through, tape.middle
    _add_fixed_gate(grads, "gate_bias", weights.gate_bias, dstate, state - after)
    dstate, dread = _gate_adjoint(dstate, state, tape.gate, weights.gate)
    rows["read"] = dread.to(ct)
    return dstate, rows


def product(a: Tensor, b: Tensor, wide: bool) -> Tensor:
    """a^T b over all leading dimensions: [..., M], [..., N] -> [M, N]; wide: on CUDA the sum leaves in fp32."""
    a, b = a.flatten(0, -2), b.flatten(0, -2)
    if wide and a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return torch.mm(a.t(), b)


def weight_gradients(
    rows: dict[str, Tensor], read: Tensor, tape: WriteTape, weights: ScanWeights, grads: Gradients
) -> None:
    """Gradients of the matrices that write the state, over many blocks at once.

    Args:
        rows: gradients in front of each matrix, [B, m, S, ...], as `write_adjoint` names them.
        read: [B, m, S, 2*H*Dh].
        tape: of the same blocks.
        weights: of the scan.
        grads: where to add.
    """
    if weights.output is None:
        grads.add("ffn_hidden", product(rows["read"], read, grads.several))
    else:
        _add_gated(grads, "output", ("forget", "input"), rows["read"], read, weights.output.shape[0])
    if "ffn" in rows:
        assert tape.ffn_input is not None
        grads.add("ffn_hidden", product(rows["ffn"], tape.ffn_input, grads.several))
    if "hidden" in rows:
        assert tape.hidden is not None and weights.ffn_output is not None
        names = ("ffn_forget", "ffn_input")
        _add_gated(grads, "ffn_output", names, rows["hidden"], tape.hidden, weights.ffn_output.shape[0])


def _add_gated(grads: Gradients, output: str, gates: tuple[str, str], rows: Tensor, seen: Tensor, width: int) -> None:
    parts = product(rows, seen, grads.several).split(width)
    grads.add(output, parts[0])
    for name, part, one in zip(gates, parts[1:], rows.split(width, dim=-1)[1:], strict=False):
        grads.add(f"{name}_weight", part)
        grads.add(f"{name}_bias", one.sum((0, 1, 2), dtype=at_least_fp32(one[:0]).dtype))


def token_adjoint(dread: Tensor, reads: Reads, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the tokens' keys and values from the states that read them.

    Args:
        dread: [B, m, S, H, Dh], of the read of the tokens.
        reads: of the same blocks.
        keys, values: [B, m, 2W, H, Dh].

    Returns:
        dkeys, dvalues fp32 [B, m, 2W, H, Dh].
    """
    _, dkeys, dvalues = attend_adjoint(
        dread, reads.read[..., 1, :, :], reads.proj[..., 3, :, :], keys, values, reads.lse[:, :, 1]
    )
    return dkeys, dvalues


def add_windows(total: Tensor, parts: Tensor, reset: Tensor, first: int, window: int) -> None:
    """Add gradients of what blocks saw to the gradient of all tokens, in place.

    Args:
        total: fp32 [B, W+T, H, Dh].
        parts: [B, m, 2W, H, Dh] of blocks first, first+1, ...
        reset: bool [B, m]: nothing reaches the window before.
        first: block.
        window: W.
    """
    count = parts.shape[1]
    begin, end = first * window, (first + count) * window
    before, own = parts.split(window, dim=2)
    total[:, begin:end] += before.masked_fill(reset[:, :, None, None, None], 0.0).flatten(1, 2)
    total[:, begin + window : end + window] += own.flatten(1, 2)


@dataclass(frozen=True)
class Chunk:
    """Some blocks of a segment on the way back; tensors of the whole segment have n blocks, `reads` those alone."""

    first: int
    last: int  # blocks first..last-1
    written: int  # blocks from here on are read by their tokens and never written, or written without effect
    window: int
    weights: ScanWeights
    entering: Tensor  # fp32 [B, n, S, D]
    final: Tensor  # fp32 [B, S, D]
    keys: Tensor  # [B, W+T, H, Dh]
    values: Tensor
    reset: Tensor  # bool [B, n]
    reads: Reads  # read and lse may lack blocks from `written` on
    dkeys: Tensor  # [B, n, S, H, Dh], gradient from the tokens that read the states
    dvalues: Tensor
    origin: int = 0  # the first block of dkeys and dvalues; keys and values begin with the window before it

    @property
    def count(self) -> int:
        """How many of the blocks are written."""
        return max(0, min(self.last, self.written) - self.first)

    def after(self, block: int) -> Tensor:
        """The state after a block, up to the reset rule of the next one."""
        return self.entering[:, block + 1] if block + 1 < self.entering.shape[1] else self.final


@dataclass(frozen=True)
class ChunkRows:
    """What the serial part leaves for the products: gradients in front of every matrix."""

    dproj: Tensor  # [B, m, S, 4, H, Dh]
    dread: Tensor | None  # [B, count, S, 2, H, Dh]
    rows: dict[str, Tensor]  # [B, count, S, ...], see `weight_gradients`
    tape: WriteTape  # of the written blocks
    delta: Tensor | None = None  # fp32 [B, count, 2, H, S], row sums of dread times read, where the steps keep it


def write_tape(chunk: Chunk) -> WriteTape:
    """What the gradient of the write needs, of all written blocks of a chunk at once."""
    if not chunk.count:
        return WriteTape(GateTape(), GateTape())
    entering = chunk.entering[:, chunk.first : chunk.first + chunk.count]
    return write(entering, chunk.reads.read[:, : chunk.count], chunk.weights)[1]


def serial(chunk: Chunk, carry: Tensor, dinitial: Tensor, grads: Gradients) -> tuple[Tensor, ChunkRows]:
    """The serial part: from the last block to the first, gradients of activations alone.

    Args:
        chunk: blocks.
        carry: fp32 [B, S, D], gradient of the state after the last block.
        dinitial: fp32 [B, S, D], where gradients go at a document start; changed in place.
        grads: small gradients (norm, ids, gate bias, scales) are added here.

    Returns:
        gradient of the state before the first block; rows for the products.
    """
    weights, tape = chunk.weights, write_tape(chunk)
    read_matrix = weights.read_matrix()
    hidden_matrix = None if weights.ffn_output is None else weights.hidden_matrix()
    dprojs, dreads, all_rows = [], [], []
    for block in reversed(range(chunk.first, chunk.last)):
        at = block - chunk.first
        state, dkeys, dvalues = chunk.entering[:, block], chunk.dkeys[:, block], chunk.dvalues[:, block]
        if at < chunk.count:
            after = chunk.after(block)
            carry, rows = write_adjoint(carry, state, after, tape.block(at), weights, hidden_matrix, grads)
            dread = (rows["read"] @ read_matrix).unflatten(-1, chunk.reads.read.shape[-3:])
            keys, values = (
                token_windows(x, chunk.reset, block, block + 1, chunk.window)[:, 0] for x in (chunk.keys, chunk.values)
            )
            dproj, dscales = read_adjoint(dread, chunk.reads.block(at), keys, values, dkeys, dvalues, weights)
            grads.add("scales", dscales)
            dreads.append(dread)
            all_rows.append(rows)
        else:
            dproj = offered_adjoint(chunk.reads.proj[:, at], chunk.reads.inv[:, at], dkeys, dvalues)
        dprojs.append(dproj)
        du = (dproj.flatten(-3) @ weights.stacked).to(state.dtype)
        through, unit = rms_adjoint(du, state, weights.norm)
        grads.add("ids", du.sum(0))
        grads.add("norm", (du * unit).sum((0, 1)))
        carry = carry + through
        starts = chunk.reset[:, block, None, None]
        dinitial += carry.masked_fill(~starts, 0.0)
        carry = carry.masked_fill(starts, 0.0)
    stack = {name: torch.stack([rows[name] for rows in reversed(all_rows)], dim=1) for name in (all_rows or [{}])[0]}
    dread = torch.stack(dreads[::-1], dim=1) if dreads else None
    return carry, ChunkRows(torch.stack(dprojs[::-1], dim=1), dread, stack, tape)


def token_gradients(keys: Tensor, values: Tensor, window: int, written: int) -> tuple[Tensor, Tensor]:
    """Where `products` of all chunks leave the gradients of keys and values [B, W+T, H, Dh]: fp32 zeros here.

    Args:
        keys, values: [B, W+T, H, Dh].
        window, written: as in `Chunk`.
    """
    return torch.zeros_like(keys, dtype=at_least_fp32(keys).dtype), torch.zeros_like(
        values, dtype=at_least_fp32(values).dtype
    )


def products(chunk: Chunk, result: ChunkRows, dtokens: tuple[Tensor, Tensor], grads: Gradients) -> None:
    """The parallel part: weight gradients and gradients of the tokens' keys and values, over all blocks of the chunk.

    Args:
        chunk, result: as `serial` took and gave them.
        dtokens: of `token_gradients`; changed in place.
        grads: added to.
    """
    u = normalised_state(chunk.entering[:, chunk.first : chunk.last], chunk.weights)
    grads.add("stacked", product(result.dproj.flatten(-3), u, grads.several))
    if result.dread is None:
        return
    end = chunk.first + chunk.count
    reads = Reads(*(x[:, : chunk.count] for x in chunk.reads.tensors()))
    weight_gradients(result.rows, reads.read.flatten(-3), result.tape, chunk.weights, grads)
    seen = (token_windows(x, chunk.reset, chunk.first, end, chunk.window) for x in (chunk.keys, chunk.values))
    parts = token_adjoint(result.dread[..., 1, :, :], reads, *seen)
    for total, part in zip(dtokens, parts, strict=True):
        add_windows(total, part, chunk.reset[:, chunk.first : end], chunk.first, chunk.window)
