"""The feed-forward network with a backward pass of its own: the ReLU and its mask inside the products' epilogues.

Letters: N tokens, D width, F hidden width; W1 [F, D], W2 [D, F].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.kernels.feed_forward import triton as kernels
from longspan.kernels.products import product_into

MAX_CHUNK_HIDDEN = 2**27  # hidden values that exist at a time where they are not kept: 256 MiB in bf16


def relu_product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """relu(x W^T), ReLU in the product's epilogue where there is one.

    Args:
        x: [N, D].
        weight: [F, D].

    Returns:
        [N, F]; where it is above 0, as `masked_gradient` takes it, or None.
    """
    if kernels.supported(x, weight) and weight.shape[0] * x.element_size() % 16 == 0:  # the result's rows too
        return kernels.relu_product(x, weight)
    # torch's only public way to the epilogue of cuBLAS is the private function behind its fused inference path
    fused = getattr(torch, "_addmm_activation", None)
    if fused is None or not x.is_cuda:
        return torch.mm(x, weight.t()).relu_(), None
    return fused(x.new_zeros(weight.shape[0]), x, weight.t()), None


def masked_gradient(dy: Tensor, output_weight: Tensor, hidden: Tensor, bits: Tensor | None) -> Tensor:
    """(dy W2) where hidden > 0, else 0: the gradient in front of the ReLU.

    Args:
        dy: [N, D].
        output_weight: [D, F].
        hidden, bits: of `relu_product`.

    Returns:
        [N, F].
    """
    if bits is not None and kernels.supported(dy, output_weight):
        return kernels.masked_product(dy, output_weight, bits)
    gradient = torch.mm(dy, output_weight)
    return torch.ops.aten.threshold_backward.grad_input(gradient, hidden, 0, grad_input=gradient)


def kept_gradients(
    dy: Tensor, x: Tensor, hidden: Tensor, bits: Tensor | None, hidden_weight: Tensor, output_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass where the hidden vectors are kept.

    Args:
        dy: [N, D'], gradient of the output.
        x: [N, D].
        hidden, bits: of `relu_product`.
        hidden_weight, output_weight: [F, D], [D', F].

    Returns:
        Gradients of x, of the hidden weight and of the output weight.
    """
    dy = dy.contiguous()
    d_output = torch.mm(dy.t(), hidden)
    d_hidden = masked_gradient(dy, output_weight, hidden, bits)
    return torch.mm(d_hidden, hidden_weight), torch.mm(d_hidden.t(), x), d_output


class _Kept(torch.autograd.Function):
    """Keeps the hidden vectors, and the bits of their ReLU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hidden_weight: Tensor, output_weight: Tensor) -> Tensor:
        hidden, bits = relu_product(x, hidden_weight)
        ctx.save_for_backward(x, hidden, bits, hidden_weight, output_weight)
        return torch.mm(hidden, output_weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return kept_gradients(dy, *ctx.saved_tensors)


class _Recomputed(torch.autograd.Function):
    """Keeps its inputs alone. Its output is unwritten memory, which the caller fills: under activation
    checkpointing the recomputation ends as soon as all inputs are kept again, before any product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hidden_weight: Tensor, output_weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, hidden_weight, output_weight)
        return x.new_empty(x.shape[0], output_weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, hidden_weight, output_weight = ctx.saved_tensors
        dy = dy.contiguous()
        dx = torch.empty_like(x)
        chunk = chunk_tokens(hidden_weight)
        # several chunks are summed in fp32; one alone is rounded by its product
        wide = torch.promote_types(x.dtype, torch.float32) if x.shape[0] > chunk else x.dtype
        d_hidden_weight = torch.zeros_like(hidden_weight, dtype=wide)
        d_output_weight = torch.zeros_like(output_weight, dtype=wide)
        for start in range(0, x.shape[0], chunk):
            part = slice(start, start + chunk)
            hidden, bits = relu_product(x[part], hidden_weight)
            product_into(d_output_weight, dy[part].t(), hidden, add=start > 0)
            d_hidden = masked_gradient(dy[part], output_weight, hidden, bits)
            product_into(d_hidden_weight, d_hidden.t(), x[part], add=start > 0)
            torch.mm(d_hidden, hidden_weight, out=dx[part])
            del hidden, bits, d_hidden  # before the next chunk makes its own
        return dx, d_hidden_weight.to(hidden_weight.dtype), d_output_weight.to(output_weight.dtype)


def chunk_tokens(hidden_weight: Tensor) -> int:
    """Tokens whose hidden vectors exist at a time where they are not kept."""
    return max(1, MAX_CHUNK_HIDDEN // hidden_weight.shape[0])


def _fill(y: Tensor, x: Tensor, hidden_weight: Tensor, output_weight: Tensor) -> None:
    chunk = chunk_tokens(hidden_weight)
    for start in range(0, x.shape[0], chunk):
        part = slice(start, start + chunk)
        torch.mm(relu_product(x[part], hidden_weight)[0], output_weight.t(), out=y[part])


def lean_feed_forward(x: Tensor, hidden_weight: Tensor, output_weight: Tensor, keep_hidden: bool) -> Tensor:
    """relu(x W1^T) W2^T with gradients.

    Args:
        x: [..., D].
        hidden_weight: [F, D].
        output_weight: [D', F].
        keep_hidden: for the backward pass; otherwise hidden vectors exist for a chunk of tokens only.

    Returns:
        [..., D'].
    """
    rows = x.reshape(-1, x.shape[-1])
    weights = (hidden_weight, output_weight)
    if keep_hidden and torch.is_grad_enabled():
        y = _Kept.apply(rows, *weights)
    else:
        y = _Recomputed.apply(rows, *weights)
        with torch.no_grad():
            _fill(y, rows, *weights)
    return y.view(*x.shape[:-1], y.shape[-1])
