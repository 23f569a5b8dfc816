"""Small modules that every layer uses: dense, RMSNorm, dropout, feed-forward network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longspan.kernels.feed_forward.api import add_feed_forward_, add_product_, feed_forward
from longspan.kernels.norm.api import multiply_tiled, rms_norm
from longspan.kernels.tensor_parallel.shard import WHOLE, TensorShard
from longspan.kernels.tensor_parallel.vocabulary import vocabulary_embed
from longspan.modeling.initialisation import variance_scaling_

DROPOUT_TILE_TOKENS = 128


class Dense(nn.Module):
    """x W^T without bias; truncated-normal variance scaling."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        """Args: in_dim, out_dim: widths of input and output."""
        super().__init__()
        self.weight = nn.Parameter(variance_scaling_(torch.empty(out_dim, in_dim)))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., in_dim] -> [..., out_dim]; with a residual its sum with that, written over it (`adds_in_place`)."""
        return F.linear(x, self.weight) if residual is None else add_product_(residual, self.weight, x)


class Embedding(nn.Embedding):
    """A vector for each token; each tensor-parallel rank holds the vectors of its part of the vocabulary."""

    tensor_shard: TensorShard = WHOLE

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [...] -> [..., dim]."""
        return vocabulary_embed(tokens, self.weight, self.tensor_shard)


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + 1e-6) * scale, statistics in fp32 or more."""

    def __init__(self, dim: int) -> None:
        """Args: dim: width."""
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [..., dim] -> [..., dim], times a dropout mask of `TiledDropout.mask` if there is one."""
        return rms_norm(x, self.scale, mask)


class TiledDropout(nn.Module):
    """Dropout with one mask of 128 tokens, shared by all rows and tiled over the sequence, as in the paper's code."""

    def __init__(self, probability: float) -> None:
        """Args: probability: of a value to be dropped."""
        super().__init__()
        self.probability = probability

    def mask(self, x: Tensor) -> Tensor | None:
        """Fresh multipliers [min(T, 128), D] for x [B, T, D]; None outside training."""
        if not self.training or self.probability == 0:
            return None
        tokens, dim = x.shape[-2:]
        return dropout_mask((min(tokens, DROPOUT_TILE_TOKENS), dim), self.probability, x)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]; the identity outside training."""
        mask = self.mask(x)
        return x if mask is None else multiply_tiled(x, mask)


def head_dropout_mask(heads: int, window: int, probability: float, like: Tensor, shard: TensorShard) -> Tensor:
    """Mask [H, W, 2W] of the window's probabilities for this rank's H heads: its part of the mask of all heads, so that
    every rank draws the same numbers."""
    mask = dropout_mask((heads * shard.size, window, 2 * window), probability, like)
    return mask[shard.part(mask.shape[0])]


def dropout_mask(shape: tuple[int, ...], probability: float, like: Tensor) -> Tensor:
    """Multipliers 0 or 1 / (1 - probability) in the dtype and on the device of `like`."""
    keep = 1 - probability
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(keep).div_(keep)


class FeedForward(nn.Module):
    """relu(x W1^T) W2^T."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        """Args: dim: width of input and output; hidden_dim: width between."""
        super().__init__()
        self.hidden = Dense(dim, hidden_dim)
        self.output = Dense(hidden_dim, dim)

    def forward(self, x: Tensor, *, keep_hidden: bool = True, residual: Tensor | None = None) -> Tensor:
        """Hidden vectors are kept or computed again.

        Args:
            x: [..., dim].
            keep_hidden: for the backward pass, instead of computing it there again.
            residual: as in `Dense`, and then hidden vectors are kept.

        Returns:
            [..., dim].
        """
        if residual is not None:
            return add_feed_forward_(residual, x, self.hidden.weight, self.output.weight)
        return feed_forward(x, self.hidden.weight, self.output.weight, keep_hidden=keep_hidden)
