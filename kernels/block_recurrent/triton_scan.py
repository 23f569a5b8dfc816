"""The steps of the state scan in Triton, under the names that `torch_scan` has too.

The chain forward has kernels for mode skip. The backward's attention, norms and read products have kernels for every
mode; the state FFN of modes dual and single stays in PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from longspan.kernels import backend
from longspan.kernels.block_recurrent import three_phase, triton_forward
from longspan.kernels.block_recurrent.adjoint import (
    Chunk,
    ChunkRows,
    Gradients,
    product,
    weight_gradients,
    write_adjoint,
    write_tape,
)
from longspan.kernels.block_recurrent.scan_weights import ScanWeights
from longspan.kernels.block_recurrent.three_phase import Chain, GateTape, Reads, WriteTape
from longspan.kernels.block_recurrent.tiles import (
    ATTENTION,
    ATTENTION_WIDE,
    LARGE_ROWS,
    PRODUCT,
    PRODUCT_LARGE,
    PRODUCT_WIDE,
    TOKENS,
    Tiles,
    divide,
    fitting,
)
from longspan.kernels.block_recurrent.triton_adjoint import (
    attention_gradient_kernel,
    offered_gradient_kernel,
    read_gradient_kernel,
    state_gradient_kernel,
    sums_kernel,
    token_gradient_kernel,
)
from longspan.kernels.launches import RepeatedLaunch, blocks_of
from longspan.kernels.window_attention.fused import copies_tiles

# Programs that share the rows and blocks of a chunk to form the sums of one state vector: with 8 x 4096 tokens on an
# H100 it takes 156 us, and 197 if every row has its own.
SUM_PARTS = 4


def attention_tiles(states: int, wide: bool) -> Tiles:
    """Tiles of the state's attention backward."""
    return fitting(ATTENTION_WIDE if wide else ATTENTION, states, states)


def token_tiles(states: int, window: int, wide: bool) -> Tiles:
    """Tiles of the gradient of the tokens' keys and values."""
    return fitting(ATTENTION_WIDE if wide else TOKENS, states, window)


def product_tiles(rows: int, states: int, wide: bool) -> Tiles:
    """Tiles of the product that gives the gradient of the reads, for B rows."""
    return PRODUCT_WIDE if wide else PRODUCT_LARGE if rows * states >= LARGE_ROWS else PRODUCT


def _chain_kernels(weights: ScanWeights, window: int) -> bool:
    """Whether the chain forward runs in Triton; sizes and types that it does not take give one warning."""
    if weights.mode != "skip":
        return False
    reason = triton_forward.unsupported(weights.path(), window)
    if reason is not None:
        backend.warn_once("block_recurrent, chain of states", reason)
    return reason is None


def chain_forward(
    state: Tensor, keys: Tensor, values: Tensor, reset: Tensor, weights: ScanWeights, window: int, keep_reads: bool
) -> Chain:
    """As `three_phase.chain_forward`; states are dense, whatever the strides of the given one."""
    state = state.contiguous()
    if not _chain_kernels(weights, window):
        return three_phase.chain_forward(state, keys, values, reset, weights, window, keep_reads)
    chain = triton_forward.chain_forward(
        triton_forward.prepare(weights.path(), weights.stacked),
        state,
        keys,
        values,
        reset,
        window,
        keep="all" if keep_reads else "kv",
    )
    assert chain.proj is not None and chain.final is not None
    reads = None
    if keep_reads and chain.read is not None and chain.read.shape[1]:
        assert chain.inv is not None and chain.lse is not None
        reads = Reads(chain.proj, chain.inv, chain.read, chain.lse)
    return Chain(chain.entering, reads, chain.proj[..., 0, :, :], chain.proj[..., 1, :, :], chain.final)


def recompute(
    entering: Tensor, keys: Tensor, values: Tensor, reset: Tensor, weights: ScanWeights, window: int
) -> Reads:
    """As `three_phase.recompute`."""
    if not _chain_kernels(weights, window):
        return three_phase.recompute(entering, keys, values, reset, weights, window)
    prepared = triton_forward.prepare(weights.path(), weights.stacked)
    found = triton_forward.recompute(prepared, entering, keys, values, reset, window)
    assert found.proj is not None and found.inv is not None and found.read is not None and found.lse is not None
    return Reads(found.proj, found.inv, found.read, found.lse)


def token_gradients(keys: Tensor, values: Tensor, window: int, written: int) -> tuple[Tensor, Tensor]:
    """As `adjoint.token_gradients`, in the tokens' type and undefined where `products` will write."""
    both = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (keys, values))
    for x in both:
        x[:, (written + 1) * window if written else 0 :].zero_()
    return both  # type: ignore[return-value]


def _block_strides(x: Tensor) -> Tensor:
    """`x` [B, m, ...] with dense blocks: any stride between rows alone."""
    return x if x[0].is_contiguous() or x.shape[0] == 0 else x.contiguous()


def _seen(chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Keys and values from the window before the chunk on."""
    begin = (chunk.first - chunk.origin) * chunk.window
    return chunk.keys[:, begin:], chunk.values[:, begin:]


class _Launches:
    """The launches of one block; everything that does not change from block to block is worked out once."""

    def __init__(self, chunk: Chunk, carry: Tensor, dinitial: Tensor) -> None:
        """Args: as `serial`; `carry` and `dinitial` are written in place."""
        self.chunk, self.carry, self.dinitial = chunk, carry, dinitial
        weights, reads = chunk.weights, chunk.reads
        self.proj, self.inv, self.read, self.lse = (_block_strides(x) for x in reads.tensors())
        self.keys, self.values = _seen(chunk)
        self.dkeys, self.dvalues = (x[:, chunk.first - chunk.origin :] for x in (chunk.dkeys, chunk.dvalues))
        self.rows, self.slots, self.states, _, self.heads, self.width = self.proj.shape
        self.dim, self.blocks = chunk.entering.shape[-1], chunk.entering.shape[1]
        ct, device = self.proj.dtype, self.proj.device
        count = chunk.count
        self.matrix = weights.read_matrix().contiguous()
        self.kernel_gate = 0 if weights.mode != "skip" else 1 if weights.gate_bias is not None else 2
        self.gate = weights.gate_bias
        self.written = None
        if self.kernel_gate == 2 and count:
            assert weights.forget_bias is not None and weights.input_bias is not None
            self.gate = torch.stack([weights.forget_bias, weights.input_bias])
            self.written = F.linear(self.read.flatten(-3), self.matrix)
        # with the blocks that are not written, as zeros, `read` need not be cut for the product with it
        slots = self.read.shape[1] if count else 0
        self.before_read = torch.empty(self.rows, slots, self.states, self.matrix.shape[0], dtype=ct, device=device)
        if count < slots:
            self.before_read[:, count:].zero_()
        self.dread = torch.empty(self.rows, count, self.states, 2, self.heads, self.width, dtype=ct, device=device)
        self.delta = torch.empty(self.rows, count, 2, self.heads, self.states, dtype=torch.float32, device=device)
        shape = (self.slots, self.rows, self.states)
        self.dproj = torch.empty(*shape, 4, self.heads, self.width, dtype=ct, device=device)
        self.du = torch.empty(*shape, self.dim, dtype=ct, device=device)
        flat = (self.slots, self.rows * self.states, -1)
        self.dproj_of, self.du_of = self.dproj.view(flat).unbind(0), self.du.view(flat).unbind(0)
        wide = ct == torch.float32
        self.tiles = attention_tiles(self.states, wide)
        self.product = product_tiles(self.rows, self.states, wide)
        self.even = divide(self.tiles, self.states, chunk.window)
        inner = self.matrix.shape[0] % self.product.columns
        self.whole_product = self.rows * self.states % self.product.rows == 0 == inner
        # with 8 rows of 512 states 38 us a block, not 42, on an H100; with one row, in small tiles, 11, not 9
        large = self.product == PRODUCT_LARGE and self.states % self.product.rows == 0
        self.fetched = large and self.whole_product and count > 0 and copies_tiles(device)
        self.fetched = self.fetched and all(x.data_ptr() % 16 == 0 for x in (self.before_read, self.matrix))
        self.attention_tiles = blocks_of(self.states, self.tiles.rows)
        self.scale_parts = torch.empty(
            count, self.rows, 2, self.heads, self.attention_tiles, dtype=torch.float32, device=device
        )
        self.grad_strides = chunk.dkeys.stride()[:4]
        self.columns = triton.next_power_of_2(self.dim)
        self.state_gradients: dict[tuple[bool, int], RepeatedLaunch] = {}

    @cached_property
    def read_gradient(self) -> RepeatedLaunch:
        """before_read -> dread, delta, of the block in a slot, the argument of a call."""
        tiles = self.product
        grid = (blocks_of(self.rows * self.states, tiles.rows), 2 * self.heads)
        rows, matrix = self.before_read, self.matrix
        if self.fetched:
            rows = TensorDescriptor.from_tensor(rows.flatten(0, 2), [tiles.rows, tiles.columns])
            matrix = TensorDescriptor.from_tensor(matrix, [tiles.columns, self.width])
        args = (
            rows, matrix, self.read, self.dread, self.delta, 0, self.before_read.shape[1],
            self.before_read.stride(0), self.read.stride(0), self.dread.stride(0), self.delta.stride(0),
            self.rows, self.states, self.matrix.shape[0],
            self.heads, self.width, tiles.rows, tiles.columns, self.whole_product, self.fetched,
        )  # fmt: skip
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
        return RepeatedLaunch(read_gradient_kernel, grid, args, (5,), **options)

    @cached_property
    def attention_gradient(self) -> RepeatedLaunch:
        """dread -> dproj, of the block in a slot and in the segment, the arguments of a call."""
        chunk, tiles = self.chunk, self.tiles
        grid = (3 * self.attention_tiles * self.heads * self.rows,)
        args = (
            self.proj, self.inv, self.lse, self.delta, self.dread, self.keys, self.values, chunk.reset,
            self.dkeys, self.dvalues, chunk.weights.self_scale, chunk.weights.token_scale, self.dproj,
            self.scale_parts, 0, 0,
            self.proj.stride(0), self.inv.stride(0), self.lse.stride(0), self.delta.stride(0), self.dread.stride(0),
            *self.keys.stride()[:3], *self.values.stride()[:3], *self.grad_strides,
            self.rows, self.states, chunk.window, self.blocks,
            self.heads, self.width, tiles.rows, tiles.columns, self.even,
        )  # fmt: skip
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
        return RepeatedLaunch(attention_gradient_kernel, grid, args, (14, 15), **options)

    def offered_gradient(self, slot: int) -> None:
        """dproj of a block that nobody writes."""
        offered_gradient_kernel[(blocks_of(self.states, 64), self.heads, self.rows)](
            self.proj, self.inv, self.dkeys, self.dvalues, self.dproj, slot,
            self.proj.stride(0), self.inv.stride(0), *self.grad_strides, self.rows, self.states,
            self.heads, self.width, 64, self.states % 64 == 0,
        )  # fmt: skip

    def state_gradient(self, slot: int, norm: bool) -> None:
        """du -> carry, through the gate of the block before `slot` if this chunk writes that one."""
        chunk = self.chunk
        gate = self.kernel_gate if 0 < slot <= chunk.count else 0
        if not norm and not gate:
            return
        if (norm, gate) not in self.state_gradients:
            args = (
                self.carry, self.du, chunk.entering, chunk.weights.norm, chunk.reset, self.dinitial,
                self.gate, self.written, self.before_read, 0, 0, 0,
                self.before_read.stride(0), 0 if self.written is None else self.written.stride(0),
                self.rows, self.states, self.dim, self.blocks, norm, gate, chunk.weights.tanh,
                self.columns,
            )  # fmt: skip
            grid = (self.rows * self.states,)
            self.state_gradients[norm, gate] = RepeatedLaunch(state_gradient_kernel, grid, args, (9, 10, 11))
        self.state_gradients[norm, gate](slot, chunk.first + slot, slot - 1)


def serial(chunk: Chunk, carry: Tensor, dinitial: Tensor, grads: Gradients) -> tuple[Tensor, ChunkRows]:
    """As `adjoint.serial`, but `carry`, contiguous, is changed in place; dproj has its blocks first, [m, B, ...]."""
    assert carry.is_contiguous()
    launches = _Launches(chunk, carry, dinitial)
    weights, count = chunk.weights, chunk.count
    skip = weights.mode == "skip"
    tape = WriteTape(GateTape(), GateTape()) if skip else write_tape(chunk)
    hidden_matrix = None if skip else weights.hidden_matrix()
    rows: dict[str, list[Tensor]] = {}
    launches.state_gradient(launches.slots, norm=False)
    for slot in reversed(range(launches.slots)):
        block = chunk.first + slot
        if slot < count:
            if not skip:
                state, after = chunk.entering[:, block], chunk.after(block)
                through, found = write_adjoint(carry, state, after, tape.block(slot), weights, hidden_matrix, grads)
                carry.copy_(through)
                launches.before_read[:, slot] = found.pop("read")
                for name, value in found.items():
                    rows.setdefault(name, []).append(value)
            launches.read_gradient(slot)
            launches.attention_gradient(slot, block)
            torch.mm(launches.dproj_of[slot], weights.stacked, out=launches.du_of[slot])
        else:
            launches.offered_gradient(slot)
            half = weights.stacked.shape[0] // 2  # the queries' half of a block that nobody writes is zero
            torch.mm(launches.dproj_of[slot][:, :half], weights.stacked[:half], out=launches.du_of[slot])
        launches.state_gradient(slot, norm=True)
    stacked = {name: torch.stack(values[::-1], dim=1) for name, values in rows.items()}
    stacked["read"] = launches.before_read
    if count:
        grads.add("scales", launches.scale_parts.sum((0, 1, 4)))
    _add_sums(launches, grads)
    return carry, ChunkRows(launches.dproj, launches.dread if count else None, stacked, tape, launches.delta)


def _add_sums(launches: _Launches, grads: Gradients) -> None:
    """Gradients of ids, norm, fixed gate and the stacked projections."""
    chunk, weights = launches.chunk, launches.chunk.weights
    u = torch.empty_like(launches.du)
    group = blocks_of(launches.rows, SUM_PARTS)
    row_parts = blocks_of(launches.rows, group)
    length = blocks_of(launches.slots, max(1, SUM_PARTS // row_parts))
    parts = blocks_of(launches.slots, length)
    has_gate = launches.kernel_gate == 1 and chunk.count > 0
    sums = torch.empty(2 + has_gate, row_parts * parts, *launches.carry.shape[1:], device=u.device)
    sums_kernel[(row_parts * launches.states, parts)](
        chunk.entering, chunk.final, weights.norm, weights.ids, launches.du, launches.gate, launches.before_read,
        u, sums[0], sums[1], sums[-1], chunk.first, chunk.count, launches.slots, length, group,
        launches.before_read.stride(0), launches.rows, launches.states, launches.dim, launches.blocks, has_gate,
        launches.columns,
    )  # fmt: skip
    grads.add("ids", sums[0].sum(0))
    small = sums[1:].sum((1, 2))
    grads.add("norm", small[0])
    if has_gate:
        grads.add("gate_bias", small[1])
    grads.add("stacked", product(launches.dproj.flatten(-3), u, grads.several))


@dataclass(frozen=True)
class RawTokens:
    """Where the gradient of the tokens' keys and values goes if it goes on to what was projected."""

    dqkv: Tensor  # [B, T, 3, H, Dh], added to
    inv: Tensor  # fp32 [B, rows of the chunk's keys, H], what normalised them
    dcache: tuple[Tensor, Tensor] | None  # [B, W, H, Dh], written by the chunk of block 0; None: nobody wants it


def products(chunk: Chunk, result: ChunkRows, dtokens: tuple[Tensor, Tensor] | RawTokens, grads: Gradients) -> None:
    """As `adjoint.products`; dtokens may be what the keys and values were projected to."""
    if result.dread is None:
        return
    proj, _, read, lse = (_block_strides(x) for x in chunk.reads.tensors())
    weight_gradients(result.rows, read.flatten(-3), result.tape, chunk.weights, grads)
    keys, values = _seen(chunk)
    if isinstance(dtokens, RawTokens):
        dqkv = dtokens.dqkv[:, chunk.first * chunk.window :]
        out, dcache, inv = (dqkv[:, :, 1], dqkv[:, :, 2]), dtokens.dcache, dtokens.inv
        inv = inv[:, (chunk.first - chunk.origin) * chunk.window :]
    else:
        out, dcache, inv = dtokens, None, lse
    rows, _, states, _, heads, width = proj.shape
    tiles = token_tiles(states, chunk.window, proj.dtype == torch.float32)
    assert result.delta is not None
    token_gradient_kernel[((chunk.count + 1) * blocks_of(chunk.window, tiles.columns), heads, rows)](
        proj, lse, result.delta, result.dread, keys, values, inv, chunk.reset, *out, *(dcache or out),
        chunk.first, chunk.count, int(chunk.written > chunk.first + chunk.count), chunk.entering.shape[1],
        proj.stride(0), lse.stride(0), result.delta.stride(0), result.dread.stride(0),
        *keys.stride()[:3], *values.stride()[:3], inv.stride(0), *out[0].stride()[:2], states, chunk.window,
        heads, width, tiles.rows, tiles.columns, divide(tiles, states, chunk.window),
        isinstance(dtokens, RawTokens), dcache is not None,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
