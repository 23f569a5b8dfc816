"""Public functions of the output layer: logits and token losses."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.errors import ShapeError
from longspan.kernels import backend
from longspan.kernels.checks import check_devices
from longspan.kernels.cross_entropy import reference

__all__ = ["scaled_logits", "token_nll"]


def scaled_logits(hidden: Tensor, embedding: Tensor) -> Tensor:
    """y E^T / sqrt(D) in fp32 or more.

    Args:
        hidden: [..., D].
        embedding: [V, D].

    Returns:
        [..., V].

    Raises:
        ShapeError: the widths differ, V or D is 0, or devices differ.
    """
    if hidden.dim() < 1 or embedding.dim() != 2 or embedding.shape[1] != hidden.shape[-1]:
        raise ShapeError(
            f"hidden vectors are {list(hidden.shape)}, the embedding {list(embedding.shape)}: [..., D] and [V, D]."
        )
    _check_embedding(embedding)
    check_devices("scaled_logits", hidden, embedding)
    return reference.scaled_logits(hidden, embedding)


def token_nll(hidden: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label under softmax(y E^T / sqrt(D)), in nats.

    Logits of a long input are never all in memory: they are made a chunk of tokens at a time. The fused form computes
    gradients in the forward pass, for a loss that is a sum over tokens; for any other it computes them again.

    Args:
        hidden: [B, T, D].
        embedding: [V, D].
        labels: int64 [B, T]; -100 = no loss.

    Returns:
        [B, T] fp32 (fp64 for fp64 input), 0 where the label is -100. Other labels outside of [0, V) are an error of
        the device, or give NaN.

    Raises:
        ShapeError: labels and hidden have different leading shapes, the widths differ, V or D is 0, labels are not
            int64, or devices differ.
    """
    if labels.shape != hidden.shape[:-1]:
        raise ShapeError(f"labels are {list(labels.shape)}, hidden vectors {list(hidden.shape)}: [B, T] and [B, T, D].")
    if hidden.dim() < 2 or embedding.dim() != 2 or embedding.shape[1] != hidden.shape[-1]:
        raise ShapeError(
            f"hidden vectors are {list(hidden.shape)}, the embedding {list(embedding.shape)}: [B, T, D] and [V, D]."
        )
    _check_embedding(embedding)
    if labels.dtype != torch.int64:
        raise ShapeError(f"labels are {labels.dtype}: they must be int64. Use labels.long().")
    unsupported = None
    if hidden.dtype == torch.float64:
        unsupported = "the kernel computes in fp32 and these tensors are fp64."
    elif hidden.dtype != embedding.dtype:
        unsupported = f"hidden vectors are {hidden.dtype}, the embedding {embedding.dtype}."
    rows = hidden.flatten(0, -2)
    if backend.choose("cross_entropy", hidden, embedding, labels, unsupported=unsupported) == "triton":
        from longspan.kernels.cross_entropy.autograd import fused_nll

        return fused_nll(rows, embedding, labels.flatten()).view_as(labels)
    return reference.chunked_nll(rows, embedding, labels.flatten()).view_as(labels)


def _check_embedding(embedding: Tensor) -> None:
    if 0 in embedding.shape:
        raise ShapeError(
            f"the embedding is {list(embedding.shape)}: V and D must be at least 1. Pass the whole output embedding."
        )
