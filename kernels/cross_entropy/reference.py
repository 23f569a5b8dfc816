"""Token losses in plain PyTorch, a chunk of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

MAX_CHUNK_LOGITS = 2**24  # 64 MiB in fp32


def scaled_logits(hidden: Tensor, embedding: Tensor) -> Tensor:
    """y E^T / sqrt(D) in fp32 or more.

    Args:
        hidden: [..., D].
        embedding: [V, D].

    Returns:
        [..., V].
    """
    logits = F.linear(hidden, embedding)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) * embedding.shape[1] ** -0.5


def chunked_nll(hidden: Tensor, embedding: Tensor, labels: Tensor, max_chunk_logits: int = MAX_CHUNK_LOGITS) -> Tensor:
    """Negative log-likelihood of each label; beyond one chunk logits are recomputed in the backward pass.

    Args:
        hidden: [N, D].
        embedding: [V, D].
        labels: int64 [N]; -100 gives 0.
        max_chunk_logits: logits that exist at the same time.

    Returns:
        [N] in nats, fp32 or more.
    """
    chunk = max(1, max_chunk_logits // embedding.shape[0])
    if hidden.shape[0] <= chunk:
        return _nll(hidden, embedding, labels)
    parts = [
        checkpoint(_nll, h, embedding, y, use_reentrant=False, preserve_rng_state=False)
        for h, y in zip(hidden.split(chunk), labels.split(chunk), strict=True)
    ]
    return torch.cat(parts)


def _nll(hidden: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scaled_logits(hidden, embedding), labels, reduction="none", ignore_index=-100)
