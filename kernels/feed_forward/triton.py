"""A matrix product whose epilogue zeroes what ReLU cut off, in Triton."""

# mypy: allow-untyped-defs
# arguments of kernels are pointers, numbers and constants of the compiler's own types

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from longspan.kernels import backend


@dataclass(frozen=True)
class Config:
    """Tile of one program (rows, columns, depth), warps, pipeline stages, rows of tiles that share columns in the L2
    cache, parts of the tile in which the epilogue works, and programs a multiprocessor (None: one a tile)."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    parts: int = 1
    resident: int | None = None


CONFIGS = (
    Config(128, 256, 64, 8, 3, parts=2),
    Config(128, 256, 64, 8, 3, parts=2, resident=1),
    Config(128, 128, 64, 4, 3, parts=2),
    Config(128, 128, 64, 4, 3, parts=2, resident=2),
    Config(128, 128, 64, 8, 4, parts=1),
    Config(256, 128, 64, 8, 3, parts=2),
)


@triton.jit(do_not_specialize=["rows"])
def masked_product_kernel(
    dy_desc,
    weight_desc,
    hidden_desc,
    out_desc,
    rows,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    """out [N, F] = (dy [N, D] weight [D, F]) where hidden [N, F] > 0, else 0."""
    num_n: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    num_m = tl.cdiv(rows, BLOCK_M)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        first = tile // (GROUP_M * num_n) * GROUP_M
        height = min(num_m - first, GROUP_M)
        m = (first + tile % (GROUP_M * num_n) % height) * BLOCK_M
        n = tile % (GROUP_M * num_n) // height * BLOCK_N
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(0, DEPTH, BLOCK_K):
            total = tl.dot(dy_desc.load([m, k]), weight_desc.load([k, n]), total)
        if PARTS == 1:
            hidden = hidden_desc.load([m, n])
            out_desc.store([m, n], tl.where(hidden <= 0, 0.0, total).to(hidden.dtype))
        else:
            # half a tile of hidden vectors at a time leaves room for one more stage of the pipeline
            halves = tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            hidden = hidden_desc.load([m, n])
            out_desc.store([m, n], tl.where(hidden <= 0, 0.0, left).to(hidden.dtype))
            hidden = hidden_desc.load([m, n + BLOCK_N // 2])
            out_desc.store([m, n + BLOCK_N // 2], tl.where(hidden <= 0, 0.0, right).to(hidden.dtype))


def masked_product_supported(dy: Tensor, weight: Tensor, hidden: Tensor) -> bool:
    """Whether the kernel takes these tensors: 16-bit, Hopper, rows of a multiple of 16 bytes, at least one row."""
    tensors = (dy, weight, hidden)
    aligned = all(x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 for x in tensors)
    dense = all(x.stride(1) == 1 for x in tensors) and dy.shape[0] > 0
    if not aligned or not dense:
        return False
    if backend.interpreting():
        return True
    # elsewhere, and in fp32, cuBLAS and a second kernel for the ReLU are faster
    return dy.dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability(dy.device)[0] == 9


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def masked_product(dy: Tensor, weight: Tensor, hidden: Tensor, config: Config = CONFIGS[0]) -> Tensor:
    """(dy W) where hidden > 0, else 0.

    Args:
        dy: [N, D].
        weight: W [D, F].
        hidden: [N, F], output of a ReLU.
        config: one of CONFIGS.

    Returns:
        [N, F], dy's type.
    """
    (rows, depth), width = dy.shape, weight.shape[1]
    out = torch.empty_like(hidden)
    m, n, k = config.block_m, config.block_n, config.block_k
    tiles = triton.cdiv(rows, m) * triton.cdiv(width, n)
    programs = tiles if config.resident is None else min(tiles, config.resident * _multiprocessors(dy.device))
    masked_product_kernel[(programs,)](
        TensorDescriptor.from_tensor(dy, [m, k]),
        TensorDescriptor.from_tensor(weight, [k, n]),
        TensorDescriptor.from_tensor(hidden, [m, n // config.parts]),
        TensorDescriptor.from_tensor(out, [m, n // config.parts]),
        rows,
        WIDTH=width,
        DEPTH=depth,
        BLOCK_M=m,
        BLOCK_N=n,
        BLOCK_K=k,
        GROUP_M=config.group_m,
        PARTS=config.parts,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
