"""Token losses whose logits exist for one chunk of tokens at a time, with gradients already in the forward pass.

A training loss is a sum over tokens, so the gradient that comes back is one number for all of them. With that in mind
the forward pass turns each chunk's logits into their gradient at once and multiplies it into those of hidden vectors
and embedding; the backward pass only scales these. It sees from the strides of what comes back (an expanded number)
whether that holds, without waiting for the device, and computes everything again where it does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.kernels.cross_entropy.triton import nll_of_logits, scaled
from longspan.kernels.products import product_into

MAX_CHUNK_LOGITS = 2**28  # logits that exist at a time: 512 MiB in bf16


def chunk_tokens(vocab: int) -> int:
    """Tokens of one chunk; a multiple of 128 where that fits."""
    tokens = max(1, MAX_CHUNK_LOGITS // vocab)
    return tokens // 128 * 128 or tokens


class _Chunks:
    """The chunks of one input: logits in one buffer, gradients into whole tensors."""

    def __init__(self, hidden: Tensor, embedding: Tensor, labels: Tensor) -> None:
        self.hidden, self.embedding, self.labels = hidden, embedding, labels
        self.size = min(chunk_tokens(embedding.shape[0]), max(1, hidden.shape[0]))
        self.scale = embedding.shape[1] ** -0.5
        # 16-bit sums over many chunks would lose what single chunks add
        several = hidden.shape[0] > self.size
        self.wide = torch.promote_types(embedding.dtype, torch.float32) if several else embedding.dtype

    def run(self, nll: Tensor | None, weight: Tensor | None, wanted: tuple[bool, bool]) -> list[Tensor | None]:
        """Write the losses [N]; return the wanted gradients of hidden [N, D] and embedding [V, D]."""
        hidden, embedding = self.hidden, self.embedding
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        # the first chunk overwrites it; without any it stays zero
        blank = torch.empty_like if hidden.shape[0] else torch.zeros_like
        d_embedding = blank(embedding, dtype=self.wide) if wanted[1] else None
        buffer = hidden.new_empty(self.size, embedding.shape[0])
        for start in range(0, hidden.shape[0], self.size):
            part = slice(start, start + self.size)
            rows = hidden[part]
            logits = torch.mm(rows, embedding.t(), out=buffer[: rows.shape[0]])
            nll_of_logits(
                logits,
                self.labels[part],
                self.scale,
                None if nll is None else nll[part],
                gradient=any(wanted),
                weight=None if weight is None else weight[part],
            )
            if d_hidden is not None:
                torch.mm(logits, embedding, out=d_hidden[part])
            if d_embedding is not None:
                product_into(d_embedding, logits.t(), rows, add=start > 0)
        return [d_hidden, d_embedding]


class _TokenNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, embedding: Tensor, labels: Tensor, differentiable: bool) -> Tensor:
        nll = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        wanted = tuple(ctx.needs_input_grad[:2]) if differentiable else (False, False)
        gradients = _Chunks(hidden, embedding, labels).run(nll, None, wanted)
        ctx.save_for_backward(hidden, embedding, labels, *gradients)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nll: Tensor) -> tuple[Tensor | None, ...]:
        hidden, embedding, labels, *gradients = ctx.saved_tensors
        if _is_one_number(d_nll):
            factor = d_nll[:1].to(torch.float32)
            found = [None if x is None else scaled(x, factor, embedding.dtype) for x in gradients]
        else:
            weight = d_nll.to(torch.float32).contiguous()
            found = _Chunks(hidden, embedding, labels).run(None, weight, tuple(ctx.needs_input_grad[:2]))
            found = [None if x is None else x.to(embedding.dtype) for x in found]
        return (*found, None, None)


def _is_one_number(gradient: Tensor) -> bool:
    """Whether all elements of [N] are the same memory."""
    return gradient.numel() > 0 and (gradient.stride(0) == 0 or gradient.numel() == 1)


def fused_nll(hidden: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label under softmax(y E^T / sqrt(D)).

    Args:
        hidden: [N, D].
        embedding: [V, D], hidden's type.
        labels: int64 [N]; -100 = no loss.

    Returns:
        fp32 [N] in nats, 0 where the label is -100.
    """
    return _TokenNll.apply(hidden.contiguous(), embedding.contiguous(), labels.contiguous(), torch.is_grad_enabled())
