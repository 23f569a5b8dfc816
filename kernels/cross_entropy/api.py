"""Public functions of the output layer: logits and token losses."""

from __future__ import annotations

from torch import Tensor

from longspan.errors import ShapeError
from longspan.kernels.cross_entropy.reference import chunked_nll, scaled_logits

__all__ = ["scaled_logits", "token_nll"]


def token_nll(hidden: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label under softmax(y E^T / sqrt(D)), in nats.

    Logits of a long input are never all in memory: they are made a chunk of tokens at a time.

    Args:
        hidden: [B, T, D].
        embedding: [V, D].
        labels: int64 [B, T]; -100 = no loss.

    Returns:
        [B, T] fp32 (fp64 for fp64 input), 0 where the label is -100.

    Raises:
        ShapeError: labels and hidden have different leading shapes.
    """
    if labels.shape != hidden.shape[:-1]:
        raise ShapeError(f"labels are {list(labels.shape)}, hidden vectors {list(hidden.shape)}: [B, T] and [B, T, D].")
    return chunked_nll(hidden.flatten(0, -2), embedding, labels.flatten()).view_as(labels)
