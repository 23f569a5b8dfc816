"""Public function of the token embedding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.errors import ShapeError
from longspan.kernels import backend
from longspan.kernels.checks import check_devices

__all__ = ["embed"]


def embed(tokens: Tensor, embedding: Tensor) -> Tensor:
    """The row of each token.

    The fused form sums the gradient of a row over its tokens in fp32, in the order of the tokens, and rounds it once.

    Args:
        tokens: int64 [...], each in [0, V).
        embedding: [V, D].

    Returns:
        [..., D], the embedding's type.

    Raises:
        ShapeError: tokens are not int64, the embedding is not a matrix, or they are on different devices.
    """
    if tokens.dtype != torch.int64 or embedding.dim() != 2:
        raise ShapeError(
            f"tokens are {tokens.dtype}, the embedding {list(embedding.shape)}: they must be int64 and [V, D]."
        )
    check_devices("embedding", embedding, tokens)
    if not embedding.requires_grad or not torch.is_grad_enabled() or tokens.numel() == 0:
        return F.embedding(tokens, embedding)
    unsupported = "the kernel sums in fp32 and the embedding is fp64." if embedding.dtype == torch.float64 else None
    if backend.choose("embedding", embedding, tokens, unsupported=unsupported) == "triton":
        from longspan.kernels.embedding.triton import fused_embed

        return fused_embed(tokens, embedding)
    return F.embedding(tokens, embedding)
