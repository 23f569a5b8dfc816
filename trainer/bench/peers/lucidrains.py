"""block-recurrent-transformer-pytorch 0.4.4 at the sizes of a model here, as its documentation says to use it.

It differs from the paper: keys and values of one head, an averaging gate, rotary positions, GEGLU. Of what its
metadata requires only einops and beartype are imported, so `pip install --no-deps` with those two is enough.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn

from longspan.modeling.config import BlockRecurrentConfig, ModelConfig
from longspan.trainer.bench.contender import Unavailable

PACKAGE = "block_recurrent_transformer_pytorch"


def recurrent_layers(config: ModelConfig) -> tuple[int, ...]:
    """Numbers of the recurrent layers, the first layer being 1."""
    layers = enumerate(config.expanded_layers(), start=1)
    return tuple(number for number, layer in layers if isinstance(layer, BlockRecurrentConfig))


def build(config: ModelConfig, segment_tokens: int, device: torch.device) -> nn.Module:
    """Its model with fp32 weights and its flash flag on.

    Raises:
        Unavailable: the package is not installed.
    """
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError as error:
        reason = f"pip install --no-deps block-recurrent-transformer-pytorch==0.4.4 einops beartype ({error})"
        raise Unavailable("not installed", reason) from None
    states = [layer.num_states for layer in config.layers if isinstance(layer, BlockRecurrentConfig)]
    model: nn.Module = package.BlockRecurrentTransformer(
        num_tokens=config.vocab_size,
        dim=config.dim,
        depth=len(config.expanded_layers()),
        dim_head=config.head_dim,
        heads=config.num_heads,
        ff_mult=max(1, config.ffn_dim // config.dim),
        max_seq_len=segment_tokens,
        block_width=config.window_tokens,
        recurrent_layers=recurrent_layers(config),
        num_state_vectors=states[0] if states else None,
        use_flash_attn=device.type == "cuda",
    )
    return model.to(device)


def loss(model: nn.Module, tokens: Tensor, precision: str) -> Tensor:
    """Mean loss over tokens int64 [B, N+1], under autocast for bf16."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        value: Tensor = model(tokens, return_loss=True)[0]
    return value
