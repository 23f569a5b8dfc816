"""Initial values of parameters; all draw from torch's global generator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# standard deviation of a unit normal truncated at two standard deviations
_TRUNCATED_STD = 0.87962566103423978


def variance_scaling_(weight: Tensor, scale: float = 1.0) -> Tensor:
    """Truncated normal of variance scale / fan-in, cut at two standard deviations; weight is [out, in]."""
    std = (scale / weight.shape[1]) ** 0.5 / _TRUNCATED_STD
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def normal_parameter(*shape: int, std: float) -> nn.Parameter:
    """A parameter drawn from N(0, std^2)."""
    return nn.Parameter(torch.empty(*shape).normal_(std=std))
