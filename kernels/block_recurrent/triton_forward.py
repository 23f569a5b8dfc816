"""Forward of the state chain in Triton: a whole segment of serial writes, or all blocks at once from known states.

The state path of a Block-Recurrent layer in mode skip (arXiv:2203.07852, section 3; equations in `state_path`):
project the state that enters a block, attend over itself and over the tokens of two windows, write through the gate.
The ids that are added after the normalisation go through the projection once for the whole segment, so that
p = rstd * ((c * gamma) Wp^T) + ids Wp^T, and the normalised state is never stored.

Letters: B rows, T tokens, W window, n blocks (the last may be partial: it is projected for its tokens, not written),
S state vectors, D width, H heads, Dh width of a head. The state is fp32; operands of matrix products are bf16 or fp32
(then TF32 products on a GPU, in three parts where their error counts). No autograd here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from longspan.kernels.block_recurrent.state_path import StatePath
from longspan.kernels.block_recurrent.triton_forward_tiles import (
    attend_kernel,
    begin_kernel,
    project_kernel,
    write_kernel,
)
from longspan.kernels.launches import RepeatedLaunch

Keep = Literal["all", "kv", "states"]


@dataclass(frozen=True)
class Tiles:
    """Sizes of the three tiles: state vectors x columns (x depth of a step), pipeline stages, warps.

    `tma`: operands come through the copy engine.
    """

    project: tuple[int, int, int, int]  # rows, columns (whole heads of one kind), depth, stages
    attend: tuple[int, int, int]  # rows, keys, stages
    write: tuple[int, int, int, int]  # rows, columns, depth, stages
    warps: tuple[int, int, int]
    tma: bool = False


@dataclass(frozen=True)
class ChainWeights:
    """The state path's weights as the kernels take them; `ct` is the type of the operands of matrix products."""

    projection: Tensor  # ct [4*H*Dh, D]: key, value, query, token query
    ids: Tensor  # ct [S, 4*H*Dh], projected
    gamma: Tensor  # fp32 [D]
    initial: Tensor  # fp32 [S, D]
    scales: Tensor  # fp32 [2, H]: |self scale|, |token scale|
    output: Tensor  # ct [D, 2*H*Dh]; LSTM gate [3*D, 2*H*Dh]: output, forget, input
    gate: Tensor  # fp32 [1, D] bias; LSTM gate [2, D]: forget bias, input bias
    tanh: bool = False  # of what is written


@dataclass(frozen=True)
class ChainResult:
    """States and what was computed from them; what `keep` leaves out is None."""

    entering: Tensor  # fp32 [B, n, S, D], after the reset rule
    proj: Tensor | None  # ct [B, n, S, 4, H, Dh]: key, value, self query, token query; keep "kv": the first two
    inv: Tensor | None  # fp32 [B, n, S, 3, H]: 1 / norm of key, self query, token query
    read: Tensor | None  # ct [B, T // W, S, 2, H, Dh]: of the own state, of the tokens
    lse: Tensor | None  # fp32 [B, T // W, 2, H, S]: log2 of the sum of exp
    rstd: Tensor | None  # fp32 [B, n, S]: 1 / root mean square of the entering state
    final: Tensor | None  # fp32 [B, S, D], after the segment (a partial last block leaves the state it entered with)


def unsupported(path: StatePath, window: int) -> str | None:
    """Why the kernels cannot run this state path, or None.

    Args:
        path: weights.
        window: W.
    """
    states, dim = path.initial.shape
    head_dim = path.key.shape[0] // path.heads
    if path.write is None or path.write.gate is None or path.write.ffn is not None:
        return "only a trained state in mode skip has a kernel."
    if path.key.dtype not in (torch.bfloat16, torch.float32):
        return f"the kernels take bf16 or fp32 weights, not {path.key.dtype}."
    if head_dim not in (32, 64, 128):
        return f"the kernels take heads 32, 64 or 128 wide, not {head_dim}."
    if dim % 64 or states % 16 or window % 16:
        return f"the kernels want width % 64 == 0, states % 16 == 0, window % 16 == 0; got {dim}, {states}, {window}."
    return None


def prepare(path: StatePath, stacked: Tensor | None = None) -> ChainWeights:
    """Lay out the weights for the kernels: a few copies, and the product of the ids.

    Args:
        path: weights, in mode skip.
        stacked: `path.stacked()` if the caller has it already.
    """
    write = path.write
    assert write is not None and write.gate is not None and write.output is not None
    stacked = path.stacked() if stacked is None else stacked
    gate = write.gate
    if gate.bias is not None:
        output, biases = write.output, [gate.bias]
    else:
        assert gate.forget_weight is not None and gate.forget_bias is not None
        assert gate.input_weight is not None and gate.input_bias is not None
        output = torch.cat([write.output, gate.forget_weight, gate.input_weight])
        biases = [gate.forget_bias, gate.input_bias]
    return ChainWeights(
        projection=stacked.contiguous(),
        ids=F.linear(path.ids.to(stacked.dtype), stacked),
        gamma=path.norm.float().contiguous(),
        initial=path.initial.float().contiguous(),
        scales=torch.stack([write.self_scale, write.token_scale]).float().abs(),
        output=output.contiguous(),
        gate=torch.stack(biases).float(),
        tanh=gate.tanh,
    )


def chain_forward(
    weights: ChainWeights,
    state: Tensor,
    keys: Tensor,
    values: Tensor,
    reset: Tensor,
    window: int,
    *,
    keep: Keep = "all",
    tiles: Tiles | None = None,
) -> ChainResult:
    """The serial chain over a segment: every block's entering state and what was computed from it.

    Args:
        weights: of `prepare`.
        state: fp32 [B, S, D], before the segment.
        keys, values: ct [B, W+T, H, Dh], cache in front, keys normalised; any strides with a dense last dimension.
        reset: bool [B, ceil(T/W)], a document starts with the block.
        window: W.
        keep: "all"; "kv": states, keys and values, what the tokens' reads need; "states": states only.
        tiles: sizes of the tiles; None: by shape and type.

    Returns:
        See `ChainResult`.
    """
    rows, (blocks, whole) = state.shape[0], (reset.shape[1], keys.shape[1] // window - 1)
    if rows * blocks == 0:
        return _empty(weights, state, keys, blocks, keep)
    tiles = tiles or pick(rows * state.shape[1], keys.dtype)
    entering = state.new_empty(rows, blocks, *state.shape[1:])
    run = _Run(weights, entering, keys, values, reset, window, whole, tiles, keep)
    with torch.cuda.device_of(state):
        run.begin(state.contiguous(), first=True)
        project, attend, write = run.project(1), run.attend(1), run.write()
        for block in range(blocks):
            project(block)
            if block < whole:
                attend(block)
                write(block)
    return run.result(run.final if whole == blocks else entering[:, -1].clone())


def recompute(
    weights: ChainWeights,
    entering: Tensor,
    keys: Tensor,
    values: Tensor,
    reset: Tensor,
    window: int,
    *,
    tiles: Tiles | None = None,
) -> ChainResult:
    """All that `chain_forward` computes from the entering states, for all blocks at once.

    Args:
        weights: of `prepare`.
        entering: fp32 [B, n, S, D], a slice of the blocks is fine.
        keys, values: ct [B, W+T, H, Dh] of these blocks: rows [a*W, b*W + W) of the segment's for blocks [a, b).
        reset: bool [B, n] of these blocks.
        window: W.
        tiles: as in `chain_forward`.

    Returns:
        See `ChainResult`, with everything but `final`; equal to the chain's up to the order of a sum in rstd.
    """
    rows, (blocks, whole) = entering.shape[0], (reset.shape[1], keys.shape[1] // window - 1)
    if rows * blocks == 0:
        return _empty(weights, entering, keys, blocks, "all")
    tiles = tiles or pick(rows * blocks * entering.shape[2], keys.dtype)
    run = _Run(weights, entering, keys, values, reset, window, whole, tiles, "all", parallel=True)
    with torch.cuda.device_of(entering):
        run.begin(entering, first=False)
        run.project(blocks)(0)
        if whole:
            run.attend(whole)(0)
    return run.result(None)


def pick(vectors: int, dtype: torch.dtype) -> Tiles:
    """The tiles for a number of state vectors that are computed at once, from a small fixed table.

    Args:
        vectors: rows * S in the chain, rows * blocks * S in `recompute`.
        dtype: of the operands.
    """
    if dtype == torch.float32:
        return TF32
    return SMALL if vectors < LARGE else BIG


LARGE = 2048  # state vectors from which on large tiles fill the machine
SMALL = Tiles((64, 256, 64, 4), (64, 128, 3), (64, 64, 128, 5), (4, 4, 4), tma=True)
BIG = Tiles((128, 256, 64, 3), (64, 64, 3), (128, 128, 64, 3), (8, 4, 8), tma=True)
TF32 = Tiles((64, 128, 32, 3), (64, 16, 2), (64, 32, 32, 3), (4, 4, 4))


def _divisor(wanted: int, *lengths: int) -> int:
    """The largest power of two up to `wanted` (one itself) that divides every length."""
    while any(length % wanted for length in lengths):
        wanted //= 2
    return wanted


def _empty(weights: ChainWeights, state: Tensor, keys: Tensor, blocks: int, keep: Keep) -> ChainResult:
    """The result for no rows or no blocks."""
    (rows, states, dim), (heads, width) = (state.shape[0], *state.shape[-2:]), keys.shape[2:]
    parts = {"all": 4, "kv": 2, "states": 0}[keep]
    rest = keep == "all"
    return ChainResult(
        entering=state.new_empty(rows, blocks, states, dim),
        proj=keys.new_empty(rows, blocks, states, parts, heads, width) if parts else None,
        inv=state.new_empty(rows, blocks, states, 3, heads) if rest else None,
        read=keys.new_empty(rows, blocks, states, 2, heads, width) if rest else None,
        lse=state.new_empty(rows, blocks, 2, heads, states) if rest else None,
        rstd=state.new_empty(rows, blocks, states) if rest else None,
        final=state.clone() if state.dim() == 3 else None,
    )


class _Run:
    """Buffers and launches of one call."""

    def __init__(
        self,
        weights: ChainWeights,
        entering: Tensor,
        keys: Tensor,
        values: Tensor,
        reset: Tensor,
        window: int,
        whole: int,
        tiles: Tiles,
        keep: Keep,
        parallel: bool = False,
    ) -> None:
        """Args: as in `chain_forward`; whole: blocks that are attended to; parallel: all blocks at once."""
        self.weights, self.entering, self.keys, self.values = weights, entering, keys, values
        self.reset = reset.contiguous().view(torch.uint8)
        self.rows, self.blocks, self.states, self.dim = entering.shape
        self.whole, self.window, self.tiles, self.keep = whole, window, tiles, keep
        self.heads, self.width = keys.shape[2:]
        self.lstm = weights.gate.shape[0] == 2
        self._fit(tiles)
        ct, wide, full = keys.dtype, torch.float32, 2 * self.heads * self.width
        self.c_slots = self.blocks if parallel else 1
        self.kv_slots = self.blocks if keep != "states" else 1
        self.q_slots, self.read_slots = (self.blocks, max(whole, 1)) if keep == "all" else (1, 1)

        def new(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(self.rows, *shape, dtype=dtype, device=entering.device)

        self.cg = new(self.c_slots, self.states, self.dim, dtype=ct)
        self.sumsq = new(self.c_slots, self.states, self.parts, dtype=wide)
        if keep == "all":
            self.proj = new(self.blocks, self.states, 2 * full, dtype=ct)
            self.kv, self.q = self.proj[..., :full], self.proj[..., full:]
        else:
            self.proj = self.kv = new(self.kv_slots, self.states, full, dtype=ct)
            self.q = new(self.q_slots, self.states, full, dtype=ct)
        self.inv = new(self.q_slots, self.states, 3 * self.heads, dtype=wide)
        self.rstd = new(self.q_slots, self.states, dtype=wide)
        self.read = new(self.read_slots, self.states, full, dtype=ct)
        self.lse = new(self.read_slots, 2, self.heads, self.states, dtype=wide)
        self.final = new(self.states, self.dim, dtype=wide)

    def _fit(self, tiles: Tiles) -> None:
        """Shrink the tiles until they divide the shape: no kernel has a mask."""
        rows, columns, depth, stages = tiles.project
        fit, heads = self.states, _divisor(max(1, columns // self.width), self.heads)
        self.project_sizes = (_divisor(rows, fit), heads * self.width, _divisor(depth, self.dim), stages)
        rows, keys, stages = tiles.attend
        self.attend_sizes = (_divisor(rows, fit), _divisor(keys, fit, self.window), stages)
        rows, columns, depth, stages = tiles.write
        if self.lstm:  # three products share the registers and the shared memory of one
            columns, depth = min(columns, 64), min(depth, 64)
        inner = 2 * self.heads * self.width
        self.write_sizes = (_divisor(rows, fit), _divisor(columns, self.dim), _divisor(depth, inner), stages)
        # wide tiles of the fixed gate are stored by halves: two programs share a multiprocessor, with so few registers,
        # and a block of 8 rows of 512 states takes 38 us instead of 45 on an H100
        self.halves = 2 if self.write_sizes[1] >= 128 and not self.lstm else 1
        self.parts = self.dim // self.write_sizes[1] * self.halves
        tokens = (self.keys, self.values)
        aligned = all(x.data_ptr() % 16 == 0 and x.stride(-1) == 1 for x in tokens)
        aligned = aligned and all(s * x.element_size() % 16 == 0 for x in tokens for s in x.stride()[:3])
        self.tma = tiles.tma and aligned

    def _matrix(self, x: Tensor, rows: int, columns: int) -> Tensor | TensorDescriptor:
        """A matrix as the kernels load it: [all but the last dimension, last], in tiles of rows x columns."""
        if not self.tma:
            return x
        shape = [x.numel() // x.shape[-1], x.shape[-1]]
        return TensorDescriptor(x, shape, [x.stride(-2), 1], [rows, columns])

    def _tokens(self, x: Tensor) -> Tensor | TensorDescriptor:
        """Keys or values of the tokens as the kernels load them: [B, H, W+T, Dh]."""
        if not self.tma:
            return x
        return TensorDescriptor(
            x, [x.shape[0], x.shape[2], x.shape[1], x.shape[3]], [*_token_strides(x), 1],
            [1, 1, self.attend_sizes[1], self.width],
        )  # fmt: skip

    def begin(self, state: Tensor, *, first: bool) -> None:
        """Prepare the first block's projection from [B, S, D], or all blocks' from [B, n, S, D]."""
        w, block_rows = self.weights, _divisor(16, self.states)
        states = self.rows * (1 if first else self.blocks)
        begin_kernel[(states * self.states // block_rows, self.parts)](
            state, state.stride(0), state.stride(1), w.initial, w.gamma, self.reset, self.entering, self.cg,
            self.sumsq, self.blocks, self.c_slots,
            FIRST=first, S=self.states, D=self.dim, PARTS=self.parts, BM=block_rows, BN=self.dim // self.parts,
            num_warps=4,
        )  # fmt: skip

    def project(self, blocks: int) -> RepeatedLaunch:
        """Projections of so many blocks from a first one on, the argument of a call."""
        w, (rows, columns, depth, stages) = self.weights, self.project_sizes
        grid = self.states // rows * (4 * self.heads * self.width // columns) * blocks * self.rows
        args = (
            self._matrix(self.cg, rows, depth), self.sumsq, self._matrix(w.projection, columns, depth), w.ids,
            w.scales, self.kv, self.q, self.inv, self.rstd, 0, blocks, self.c_slots, self.kv_slots, self.q_slots,
            self.kv.stride(-2), self.q.stride(-2),
            self.states, self.dim, self.heads, self.width, self.parts, triton.next_power_of_2(self.parts),
            rows, columns, depth, stages, self.tma,
        )  # fmt: skip
        return RepeatedLaunch(project_kernel, (grid,), args, (9,), num_warps=self.tiles.warps[0])

    def attend(self, blocks: int) -> RepeatedLaunch:
        """Reads of the states of so many blocks from a first one on, the argument of a call."""
        rows, keys, stages = self.attend_sizes
        grid = 2 * self.heads * (self.states // rows) * blocks * self.rows
        args = (
            self._matrix(self.q, rows, self.width), self._matrix(self.kv, keys, self.width),
            self._tokens(self.keys), self._tokens(self.values),
            _token_strides(self.keys), _token_strides(self.values), self.weights.scales, self.reset,
            self.read, self.lse, 0, blocks, self.blocks, self.kv_slots, self.q_slots, self.read_slots,
            self.kv.stride(-2), self.q.stride(-2),
            self.states, self.window, self.heads, self.width, rows, keys, stages, self.tma,
        )  # fmt: skip
        return RepeatedLaunch(attend_kernel, (grid,), args, (10,), num_warps=self.tiles.warps[1])

    def write(self) -> RepeatedLaunch:
        """The state after a block, the argument of a call."""
        w, (rows, columns, depth, stages) = self.weights, self.write_sizes
        grid = self.states // rows * (self.dim // columns) * self.rows
        args = (
            self._matrix(self.read, rows, depth), self._matrix(w.output, columns, depth), w.gate, w.initial, w.gamma,
            self.reset, self.entering, self.final, self.cg, self.sumsq, 0, self.blocks, self.c_slots, self.read_slots,
            self.lstm, w.tanh, self.states, self.dim, self.heads, self.width, self.parts,
            rows, columns, depth, stages, self.tma,
        )  # fmt: skip
        limit = {"maxnreg": 128} if self.halves == 2 else {}
        return RepeatedLaunch(write_kernel, (grid,), args, (10,), num_warps=self.tiles.warps[2], **limit)

    def result(self, final: Tensor | None) -> ChainResult:
        """What the caller asked to keep."""
        heads, everything = (self.heads, self.width), self.keep == "all"
        return ChainResult(
            entering=self.entering,
            proj=None if self.keep == "states" else self.proj.unflatten(-1, (-1, *heads)),
            inv=self.inv.unflatten(-1, (3, self.heads)) if everything else None,
            read=self.read.unflatten(-1, (2, *heads))[:, : self.whole] if everything else None,
            lse=self.lse[:, : self.whole] if everything else None,
            rstd=self.rstd if everything else None,
            final=final,
        )


def _token_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of [B, H, tokens] of a tensor [B, tokens, H, Dh]."""
    return x.stride(0), x.stride(2), x.stride(1)
