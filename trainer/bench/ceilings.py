"""What the device reaches at best here and now: a large matrix product and a large copy, on random data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longspan.trainer.bench.clock import first_call, time_calls

_GPU_SIDE, _CPU_SIDE = 8192, 512
_GPU_COPY_BYTES, _CPU_COPY_BYTES = 2**31, 2**25


@dataclass(frozen=True)
class Ceilings:
    """Measured rates.

    Attributes:
        matrix_side: of the square matrices.
        matrix_flops: multiply-adds counted as two, per second.
        copy_bytes: read and written, per second.
    """

    matrix_side: int
    matrix_flops: float
    copy_bytes: float

    def floor_ms(self, flops: float, num_bytes: float) -> float:
        """No version is much faster: the longer of the arithmetic and of moving the bytes."""
        return 1e3 * max(flops / self.matrix_flops, num_bytes / self.copy_bytes)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Time side^3 matrix products in `dtype` and copies within the device's memory."""
    on_gpu = device.type == "cuda"
    side = _GPU_SIDE if on_gpu else _CPU_SIDE
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = _median_ms(lambda: torch.mm(a, b, out=out), device)
    size = _GPU_COPY_BYTES if on_gpu else _CPU_COPY_BYTES
    source = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copy = _median_ms(lambda: target.copy_(source), device)
    return Ceilings(side, 2e3 * side**3 / product, 2e3 * size / copy)


def _median_ms(call: object, device: torch.device) -> float:
    assert callable(call)
    first_call(call, device)
    return time_calls(call, device, repeat=30 if device.type == "cuda" else 5).median_ms
