"""Products that are added to a residual stream in its own memory.

cuBLAS reads and writes the sum in its epilogue; torch.addmm out of place copies the residual first, which costs what an
addition does. Nothing here saves the residual: its gradient is the sum's own, and the norm behind keeps its output
(`norm.api.add_rms_norm`, `from_output`). `detach` shares the residual's version counter with the result, so that
autograd refuses the backward pass of whoever saved the old value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.kernels.feed_forward.autograd import chunk_tokens, kept_gradients, relu_product


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _add(residual: Tensor, x: Tensor, weight: Tensor) -> None:
    """residual += x W^T: [..., D'], contiguous; [..., D]; [D', D]."""
    residual.view(-1, residual.shape[-1]).addmm_(_rows(x), weight.t())


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, weight: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *parts)
        total = residual.detach()
        for part, columns in zip(parts, weight.split([part.shape[-1] for part in parts], dim=1), strict=True):
            _add(total, part, columns)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        weight, *parts = ctx.saved_tensors
        flat = _rows(dy)
        widths = [part.shape[-1] for part in parts]
        dparts = [
            (flat @ columns).view(part.shape) for part, columns in zip(parts, weight.split(widths, 1), strict=True)
        ]
        if len(parts) == 1:
            return dy, flat.t() @ _rows(parts[0]), *dparts
        dweight = torch.empty_like(weight)
        for columns, part in zip(dweight.split(widths, dim=1), parts, strict=True):
            torch.mm(flat.t(), _rows(part), out=columns)
        return dy, dweight, *dparts


class _AddFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, hidden_weight: Tensor, output_weight: Tensor) -> Tensor:
        hidden, bits = relu_product(_rows(x), hidden_weight)
        ctx.save_for_backward(x, hidden, bits, hidden_weight, output_weight)
        total = residual.detach()
        _add(total, hidden, output_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, *kept = ctx.saved_tensors
        dx, d_hidden_weight, d_output_weight = kept_gradients(_rows(dy), _rows(x), *kept)
        return dy, dx.view(x.shape), d_hidden_weight, d_output_weight


def add_product_(residual: Tensor, weight: Tensor, *parts: Tensor) -> Tensor:
    """residual + x W^T over the residual.

    Args:
        residual: [..., D'], contiguous.
        weight: W [D', D].
        parts: of x [..., D], side by side.

    Returns:
        [..., D'], in the residual's memory.
    """
    return _AddProduct.apply(residual, weight, *parts)


def add_feed_forward_(residual: Tensor, x: Tensor, hidden_weight: Tensor, output_weight: Tensor) -> Tensor:
    """residual + relu(x W1^T) W2^T over the residual.

    Args:
        residual: [..., D'], contiguous.
        x: [..., D].
        hidden_weight: W1 [F, D].
        output_weight: W2 [D', F].

    Returns:
        [..., D'], in the residual's memory.
    """
    if torch.is_grad_enabled():
        return _AddFeedForward.apply(residual, x, hidden_weight, output_weight)
    rows, total, chunk = _rows(x), residual.view(-1, residual.shape[-1]), chunk_tokens(hidden_weight)
    for start in range(0, rows.shape[0], chunk):  # hidden vectors exist for a chunk of tokens only
        part = slice(start, start + chunk)
        _add(total[part], relu_product(rows[part], hidden_weight)[0], output_weight)
    return residual
