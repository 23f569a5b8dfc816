"""What a careful engineer writes in plain PyTorch: torch.compile of the whole model, flex_attention, bf16 weights.

It computes the same layers as the models here with less: no position bias, no learned attention scales, no cache
from the segment before (a token near the start sees fewer keys), no document starts, no dropout. The recurrent
layer does the tokens' attention for all blocks at once and scans the states in a loop that torch.compile unrolls.
Letters: B rows, T tokens, W window, H heads, Dh width of a head, D model width, S states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from longspan.modeling.config import BlockRecurrentConfig, ModelConfig, SlidingWindowConfig
from longspan.trainer.bench.contender import Unavailable

MASK_TILE = 128
# a scan of more blocks is compiled block by block: unrolled, 64 blocks take over two minutes to compile
MAX_UNROLLED_BLOCKS = 64


def l2_normalise(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension, computed in fp32, in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def window_mask(tokens: int, window: int, device: torch.device) -> BlockMask:
    """Each token sees the `window` tokens before it, not itself.

    The tiles are classified by arithmetic: torch's own function makes a mask of tokens^2 elements first, 17 GB for
    131,072 tokens.
    """

    def strict(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k < q) & (q - k <= window)

    if tokens % MASK_TILE:
        return create_block_mask(strict, None, None, tokens, tokens, device=str(device), BLOCK_SIZE=MASK_TILE)
    first = torch.arange(0, tokens, MASK_TILE, device=device)
    gap = first[:, None] - first[None, :]  # between the first query of a tile and its first key
    nearest, farthest = gap - (MASK_TILE - 1), gap + (MASK_TILE - 1)
    full = (nearest >= 1) & (farthest <= window)
    partial = (farthest >= 1) & (nearest <= window) & ~full

    def listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(tiles.int(), dim=1, descending=True, stable=True)
        return tiles.sum(1).int()[None, None], order.int()[None, None]

    return BlockMask.from_kv_blocks(*listed(partial), *listed(full), BLOCK_SIZE=MASK_TILE, mask_mod=strict)


def attend_window(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Attention of [B, H, T, Dh] under `mask`; queries are normalised, so the scale is 1."""
    return flex_attention(q, k, v, block_mask=mask, scale=1.0)


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + 1e-6) * weight."""

    def __init__(self, dim: int) -> None:
        """Args: dim: D."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class WindowAttention(nn.Module):
    """Strict window attention with l2-normalised queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        """Args: config: widths."""
        super().__init__()
        width = config.num_heads * config.head_dim
        self.heads = config.num_heads
        self.project = nn.Linear(config.dim, 3 * width, bias=False)  # query, key, value
        self.output = nn.Linear(width, config.dim, bias=False)

    def forward(self, x: Tensor, mask: BlockMask) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q, k, v = self.project(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        out = attend_window(l2_normalise(q), l2_normalise(k), v, mask)
        return self.output(out.transpose(1, 2).flatten(2))


class RecurrentAttention(nn.Module):
    """Window attention and a state of S vectors: fixed gate, mode skip."""

    def __init__(self, config: ModelConfig, layer: BlockRecurrentConfig) -> None:
        """Args: config, layer: widths and S."""
        super().__init__()
        width = config.num_heads * config.head_dim
        self.heads, self.window = config.num_heads, config.window_tokens
        self.project = nn.Linear(config.dim, 4 * width, bias=False)  # query, key, value, query of the state
        self.output = nn.Linear(2 * width, config.dim, bias=False)
        self.initial = nn.Parameter(0.1 * torch.randn(layer.num_states, config.dim))
        self.ids = nn.Parameter(torch.randn(layer.num_states, config.dim))
        self.norm = RMSNorm(config.dim)
        self.state_project = nn.Linear(config.dim, 4 * width, bias=False)  # key, value, query of self, of tokens
        self.state_output = nn.Linear(2 * width, config.dim, bias=False)
        self.gate = nn.Parameter(0.1 * torch.randn(config.dim))

    def forward(self, x: Tensor, mask: BlockMask) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q, k, v, read_q = self.project(x).unflatten(-1, (4, self.heads, -1)).transpose(1, 3).unbind(2)
        k = l2_normalise(k)
        own = attend_window(l2_normalise(q), k, v, mask)
        blocks = x.shape[1] // self.window
        state_k, state_v = self.scan(self._windows(k), self._windows(v), x.shape[0])
        read_q = l2_normalise(read_q).unflatten(2, (blocks, self.window)).transpose(1, 2).flatten(0, 1)
        read = F.scaled_dot_product_attention(read_q, state_k, state_v, scale=1.0)
        read = read.unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3)
        return self.output(torch.cat([own, read], dim=1).transpose(1, 2).flatten(2))

    def _windows(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of each block the rows [B, H, 2W, Dh] of the block before and itself; zeros before the first."""
        cut = F.pad(x, (0, 0, self.window, 0)).unflatten(2, (-1, self.window))
        return torch.cat([cut[:, :, :-1], cut[:, :, 1:]], dim=3).unbind(2)

    def scan(self, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B*n, H, S, Dh] of the state that enters each of the n blocks."""
        state = self.initial.expand(rows, -1, -1)
        state_keys, state_values = [], []
        for k, v in zip(keys, values, strict=True):
            state, state_k, state_v = self.write(state, k, v)
            state_keys.append(state_k)
            state_values.append(state_v)
        return torch.stack(state_keys, 1).flatten(0, 1), torch.stack(state_values, 1).flatten(0, 1)

    def write(self, state: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The state [B, S, D] after a block whose tokens offer k, v [B, H, 2W, Dh]; its keys and values before."""
        parts = self.state_project(self.norm(state) + self.ids).unflatten(-1, (4, self.heads, -1))
        own_k, own_v, own_q, token_q = parts.transpose(1, 3).unbind(2)
        own_k = l2_normalise(own_k)
        own = F.scaled_dot_product_attention(l2_normalise(own_q), own_k, own_v, scale=1.0)
        tokens = F.scaled_dot_product_attention(l2_normalise(token_q), k, v, scale=1.0)
        written = self.state_output(torch.cat([own, tokens], dim=1).transpose(1, 2).flatten(2))
        keep = torch.sigmoid(self.gate)
        return state * keep + written * (1 - keep), own_k, own_v


class Layer(nn.Module):
    """Mixer and feed-forward network with residuals."""

    def __init__(self, config: ModelConfig, mixer: nn.Module) -> None:
        """Args: config: widths; mixer: window or recurrent attention."""
        super().__init__()
        self.norm, self.ffn_norm = RMSNorm(config.dim), RMSNorm(config.dim)
        self.mixer = mixer
        self.hidden = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.output = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor, mask: BlockMask) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + self.mixer(self.norm(x), mask)
        return x + self.output(torch.relu(self.hidden(self.ffn_norm(x))))


class PlainModel(nn.Module):
    """Tied embedding, layers, mean cross-entropy on logits that are in memory as a whole."""

    def __init__(self, config: ModelConfig) -> None:
        """Args: config: of sliding-window and block-recurrent (fixed, skip) layers.

        Raises:
            Unavailable: the model has something else.
        """
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config, _mixer(config, layer)) for layer in config.expanded_layers())
        self.norm = RMSNorm(config.dim)

    def forward(self, tokens: Tensor, labels: Tensor, mask: BlockMask) -> Tensor:
        """Mean loss in nats of labels int64 [B, T] after tokens int64 [B, T]."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        logits = F.linear(self.norm(x) * x.shape[-1] ** -0.5, self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def _mixer(config: ModelConfig, layer: object) -> nn.Module:
    if config.memory is None and not config.feedback:
        if isinstance(layer, SlidingWindowConfig):
            return WindowAttention(config)
        if isinstance(layer, BlockRecurrentConfig) and (layer.gate, layer.mode, layer.update) == (
            "fixed",
            "skip",
            "trained",
        ):
            return RecurrentAttention(config, layer)
    raise Unavailable("not supported", "written for sliding-window and recurrent (fixed gate, skip) layers only")


def compiled(model: PlainModel, segment_tokens: int) -> tuple[Callable[..., Tensor], str]:
    """The model under torch.compile, and a note about how.

    Args:
        model: on its device.
        segment_tokens: T, which decides how the scan is compiled.
    """
    recurrent = [module for module in model.modules() if isinstance(module, RecurrentAttention)]
    if not any(segment_tokens // module.window > MAX_UNROLLED_BLOCKS for module in recurrent):
        return torch.compile(model, dynamic=False), "no bias, no cache, no dropout"
    for module in recurrent:
        module.write = torch.compile(module.write, dynamic=False)  # type: ignore[method-assign]
        module.scan = torch.compiler.disable(module.scan, recursive=False)  # type: ignore[method-assign]
    return torch.compile(model, dynamic=False), "no bias, no cache, no dropout; scan compiled by block"
