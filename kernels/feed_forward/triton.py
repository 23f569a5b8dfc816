"""Both matrix products beside the ReLU in Triton: one leaves the ReLU's mask as bits, the other one applies them.

Letters: N tokens, D width, F hidden width. The bits of 256 neighbouring hidden values are 8 words of 32: value 8 b + w
of each half of 128 is bit b (second half: 16 + b) of word w. Like this a thread packs and unpacks the numbers it holds
anyway, those of a product's accumulator; hidden vectors in place of the bits would be 16 times the bytes, read when the
matrix units have nothing else to do.
"""

# mypy: allow-untyped-defs
# arguments of kernels are pointers, numbers and constants of the compiler's own types

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from longspan.kernels import backend
from longspan.kernels.direct_launches import launched_directly
from longspan.kernels.launches import blocks_of, multiprocessors

# One program a multiprocessor works through the tiles and begins to load the next one during the epilogue of the one
# before. 32,768 x 1024 x 4096 on an H100: 0.427 and 0.432 ms; with 3 stages 0.437 and 0.436, without that overlap
# 0.469 and 0.480.
BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
GROUP_M = 8  # rows of tiles that share columns in the L2 cache
NUM_WARPS, NUM_STAGES = 8, 4
WORDS = tl.constexpr(8)  # of the bits of BLOCK_N values


@triton.jit
def _place(tile, num_m, NUM_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of a tile, counted in tiles."""
    first = tile // (GROUP_M * NUM_N) * GROUP_M
    height = min(num_m - first, GROUP_M)
    return first + tile % (GROUP_M * NUM_N) % height, tile % (GROUP_M * NUM_N) // height


@triton.jit
def _halves(x, M: tl.constexpr, N: tl.constexpr):
    """The left and the right half of [M, N]: half a tile at a time leaves room for one more stage of the pipeline."""
    return tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _words(bits, m, column, rows, NUM_N: tl.constexpr, M: tl.constexpr):
    """Addresses [M, 8] of a tile's words, and whether their tokens exist."""
    row = m + tl.arange(0, M)
    at = bits + row.to(tl.int64)[:, None] * (NUM_N * WORDS) + column * WORDS + tl.arange(0, WORDS)[None, :]
    return at, (row < rows)[:, None]


@triton.jit
def _pack(x, FIRST: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Words [M, 8] with a bit from FIRST on for each number of x [M, N] that is above 0: the sign of 0 - x."""
    cube = tl.reshape(0.0 - x, (M, N // WORDS, WORDS)).to(tl.uint32, bitcast=True) >> 31
    return tl.sum(cube << (FIRST + tl.arange(0, N // WORDS))[None, :, None].to(tl.uint32), 1)


@triton.jit
def _masked(x, words, FIRST: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """x [M, N] where its bit is set, else 0."""
    cube = tl.reshape(x, (M, N // WORDS, WORDS))
    on = words[:, None, :] & (1 << (FIRST + tl.arange(0, N // WORDS)))[None, :, None]
    return tl.reshape(tl.where(on != 0, cube, 0.0), (M, N))


@launched_directly
@triton.jit(do_not_specialize=["rows"])
def relu_product_kernel(
    x_desc, weight_desc, out_desc, bits, rows,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """out [N, F] = relu(x [N, D] weight [F, D]^T); bits [N, tiles of F, 8] of the values above 0."""
    num_n: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    num_m = tl.cdiv(rows, BLOCK_M)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=True):
        row, column = _place(tile, num_m, num_n, GROUP_M)
        m = row * BLOCK_M
        n = column * BLOCK_N
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(0, DEPTH, BLOCK_K):
            total = tl.dot(x_desc.load([m, k]), weight_desc.load([n, k]).T, total)
        left, right = _halves(total, BLOCK_M, BLOCK_N)
        out_desc.store([m, n], _relu(left).to(out_desc.dtype))
        out_desc.store([m, n + BLOCK_N // 2], _relu(right).to(out_desc.dtype))
        words = _pack(left, 0, BLOCK_M, BLOCK_N // 2) + _pack(right, 16, BLOCK_M, BLOCK_N // 2)
        at, exists = _words(bits, m, column, rows, num_n, BLOCK_M)
        tl.store(at, words.to(tl.int32, bitcast=True), mask=exists)


@launched_directly
@triton.jit(do_not_specialize=["rows"])
def masked_product_kernel(
    dy_desc, weight_desc, out_desc, bits, rows,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """out [N, F] = dy [N, D] weight [D, F] where the bits of `relu_product_kernel` are set, else 0."""
    num_n: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    num_m = tl.cdiv(rows, BLOCK_M)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=True):
        row, column = _place(tile, num_m, num_n, GROUP_M)
        m = row * BLOCK_M
        n = column * BLOCK_N
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(0, DEPTH, BLOCK_K):
            total = tl.dot(dy_desc.load([m, k]), weight_desc.load([k, n]), total)
        # the sum copies the accumulator: read where it lies, it makes ptxas wait after every matrix instruction
        left, right = _halves(total + 0.0, BLOCK_M, BLOCK_N)
        at, exists = _words(bits, m, column, rows, num_n, BLOCK_M)
        words = tl.load(at, mask=exists, other=0)
        out_desc.store([m, n], _masked(left, words, 0, BLOCK_M, BLOCK_N // 2).to(out_desc.dtype))
        right = _masked(right, words, 16, BLOCK_M, BLOCK_N // 2)
        out_desc.store([m, n + BLOCK_N // 2], right.to(out_desc.dtype))


def supported(*tensors: Tensor) -> bool:
    """Whether the kernels take these matrices: 16-bit, Hopper, rows of a multiple of 16 bytes, at least one row."""
    aligned = all(x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 for x in tensors)
    dense = all(x.stride(1) == 1 and x.shape[0] > 0 for x in tensors)
    if not aligned or not dense:
        return False
    if backend.interpreting():
        return True
    # elsewhere, and in fp32, cuBLAS and a second kernel for the ReLU are faster
    half = all(x.dtype in (torch.bfloat16, torch.float16) for x in tensors)
    return half and _hopper(tensors[0].device)


def relu_product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """relu(x W^T) and where it is above 0.

    Args:
        x: [N, D].
        weight: W [F, D].

    Returns:
        [N, F], x's type; bits int32 [N, tiles of F, 8] for `masked_product`.
    """
    width = weight.shape[0]
    out = x.new_empty(x.shape[0], width)
    bits = torch.empty(x.shape[0], blocks_of(width, BLOCK_N), WORDS.value, dtype=torch.int32, device=x.device)
    _launch(relu_product_kernel, x, weight, [BLOCK_N, BLOCK_K], out, bits)
    return out, bits


def masked_product(dy: Tensor, weight: Tensor, bits: Tensor) -> Tensor:
    """(dy W) where the bits are set, else 0.

    Args:
        dy: [N, D].
        weight: W [D, F].
        bits: of `relu_product`.

    Returns:
        [N, F], dy's type.
    """
    out = dy.new_empty(dy.shape[0], weight.shape[1])
    _launch(masked_product_kernel, dy, weight, [BLOCK_K, BLOCK_N], out, bits)
    return out


def _launch(kernel: Any, a: Tensor, weight: Tensor, block: list[int], out: Tensor, bits: Tensor) -> None:
    (rows, depth), width = a.shape, out.shape[1]
    tiles = blocks_of(rows, BLOCK_M) * blocks_of(width, BLOCK_N)
    kernel[(min(tiles, multiprocessors(a.device)),)](
        TensorDescriptor.from_tensor(a, [BLOCK_M, BLOCK_K]),
        TensorDescriptor.from_tensor(weight, block),
        TensorDescriptor.from_tensor(out, [BLOCK_M, BLOCK_N // 2]),
        bits,
        rows,
        WIDTH=width,
        DEPTH=depth,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        GROUP_M=GROUP_M,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )


@cache  # asked in every layer; the driver takes microseconds
def _hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9
