"""Launches past Triton's Python on a GPU: what they compute, on which stream, and who is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from longspan.kernels.direct_launches import launched_directly  # noqa: E402

pytestmark = pytest.mark.gpu


@triton.jit(do_not_specialize=["free"])
def mixture_kernel(out, x, tile, number, size, free, ROWS: tl.constexpr, FACTOR: tl.constexpr):
    """out fp32 [16]: a sum to which every argument adds its own."""
    column = tl.arange(0, 16)
    total = tl.load(x + column).to(tl.float32) * FACTOR
    total += tl.sum(tile.load([free % 2, 0]).to(tl.float32), axis=0) * ROWS
    tl.store(out + column, total + number * 0.5 + size * 3 + free * 7 + tl.program_id(0))


direct_kernel = launched_directly(mixture_kernel)


def arguments(offset: int, dtype: torch.dtype, rows: int, *sizes: Any) -> tuple[Any, ...]:
    base = torch.arange(4 * 16, device="cuda", dtype=torch.float32).view(4, 16).to(dtype) + offset
    x = torch.arange(64, device="cuda").to(dtype)[offset:]
    return torch.zeros(16, device="cuda"), x, TensorDescriptor.from_tensor(base, [rows, 16]), *sizes


CASES = [
    (offset, dtype, rows, number, size, free)
    for offset in (0, 1, 8)
    for dtype in (torch.bfloat16, torch.float32)
    for rows in (1, 2)
    for number, size, free in ((1, 16, 1), (2, 17, 16), (0, -16, 3), (5, 2**31 - 1, 2), (1, 1, 0), (3, 2**33, 1))
]


def test_results_are_those_of_ordinary_launches() -> None:
    for turn in range(2):
        for offset, dtype, rows, *sizes in CASES:
            constants = {"ROWS": rows, "FACTOR": 2 + turn, "num_warps": 2 * rows}
            got, want = (arguments(offset, dtype, rows, *sizes) for _ in range(2))
            for _ in range(2):  # the second one past Triton
                got[0].zero_()
                direct_kernel[(1,)](*got, **constants)
            mixture_kernel[(1,)](*want, **constants)
            assert torch.equal(got[0], want[0]), (offset, dtype, rows, sizes)
    assert any(variant is not None for variant in direct_kernel.variants.values())


def test_follows_the_current_stream() -> None:
    args = arguments(0, torch.float32, 2, 1, 16, 1)
    constants = {"ROWS": 2, "FACTOR": 2}
    direct_kernel[(1,)](*args, **constants)
    want = args[0].clone()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        args[0].zero_()  # on another stream this would come after the launch
        direct_kernel[(1,)](*args, **constants)
    side.synchronize()
    assert torch.equal(args[0], want)


def test_a_launch_hook_hears_of_every_launch() -> None:
    args, heard = arguments(0, torch.float32, 2, 1, 16, 1), []
    constants = {"ROWS": 2, "FACTOR": 2}
    direct_kernel[(1,)](*args, **constants)
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(heard.append)
    try:
        for _ in range(2):
            direct_kernel[(1,)](*args, **constants)
    finally:
        hook.remove(heard.append)
    direct_kernel[(1,)](*args, **constants)
    assert len(heard) == 2
