"""The feed-forward network in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def feed_forward(x: Tensor, hidden_weight: Tensor, output_weight: Tensor) -> Tensor:
    """relu(x W1^T) W2^T.

    Args:
        x: [..., D].
        hidden_weight: W1 [F, D].
        output_weight: W2 [D', F].

    Returns:
        [..., D'].
    """
    return F.linear(torch.relu(F.linear(x, hidden_weight)), output_weight)
