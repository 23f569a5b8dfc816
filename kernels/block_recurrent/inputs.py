"""What the forms of the Block-Recurrent layer's attention take and give."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspan.errors import ShapeError
from longspan.kernels.block_recurrent.state_path import StatePath
from longspan.kernels.window_attention.reference import NUM_BUCKETS, l2_normalise, last_window


@dataclass(frozen=True)
class BlockRecurrentInputs:
    """Projected tokens, cache, state and weights; B rows, T tokens, W window, H heads, Dh width of a head."""

    qkv: Tensor  # [B, T, 3, H, Dh]: query, key, value as projected
    state_query: Tensor  # [B, T, H, Dh] as projected: reads the state
    cached_keys: Tensor  # [B, W, H, Dh] of the tokens before, normalised; zero before a document
    cached_values: Tensor  # [B, W, H, Dh]
    bias_table: Tensor  # [H, 32]
    scale: Tensor  # [H], of the window's logits
    state_scale: Tensor  # [H], of the logits of the read of the state
    state: Tensor  # [B, S, D] fp32, before the first block
    reset: Tensor  # bool [B, ceil(T/W)], a document starts with the block
    path: StatePath
    drop: Tensor | None  # [H, W, 2W] multiplier of the window's probabilities
    # where the path has more heads than these tokens: those that they read, and what its writes read
    own_heads: slice | None = None
    all_tokens: Tensor | None = None  # [2, B, W+T, H', Dh]: keys, normalised, and values, cache in front

    @property
    def window(self) -> int:
        """W."""
        return self.cached_keys.shape[1]

    @property
    def tokens(self) -> int:
        """T."""
        return self.qkv.shape[1]

    @property
    def divided(self) -> bool:
        """Whether the path has heads that these tokens do not read."""
        return self.own_heads is not None and self.path.heads != self.qkv.shape[3]

    def split(self, counts: list[int]) -> list[BlockRecurrentInputs]:
        """The same for the first counts[0] rows of the batch, the next counts[1], ...; the state as well."""
        names = ("qkv", "state_query", "cached_keys", "cached_values", "reset", "state")
        # split, not indexing: the gradient of an index is as large as the whole tensor
        parts = [getattr(self, name).split(counts) for name in names]
        every = [None] * len(counts) if self.all_tokens is None else self.all_tokens.split(counts, dim=1)
        given = zip(every, *parts, strict=True)
        return [replace(self, all_tokens=seen, **dict(zip(names, part, strict=True))) for seen, *part in given]

    def check(self) -> None:
        """Raises ShapeError unless everything fits together."""
        if self.qkv.dim() != 5 or self.qkv.shape[2] != 3 or 0 in self.qkv.shape:
            raise ShapeError(
                f"qkv is {list(self.qkv.shape)}, expected [B, T, 3, H, Dh] with at least one row and one token."
            )
        if self.cached_keys.dim() != 4 or self.window == 0:
            raise ShapeError(
                f"cached_keys is {list(self.cached_keys.shape)}, expected [B, W, H, Dh] with a window of at least one."
            )
        rows, tokens, _, heads, width = self.qkv.shape
        states, dim = self.path.initial.shape
        wanted = {
            "state_query": (rows, tokens, heads, width),
            "cached_keys": (rows, self.window, heads, width),
            "cached_values": (rows, self.window, heads, width),
            "state": (rows, states, dim),
            "reset": (rows, -(-tokens // self.window)),
        }
        for name, shape in wanted.items():
            given = getattr(self, name).shape
            if given != shape:
                raise ShapeError(
                    f"{name} is {list(given)}, expected {list(shape)} for {rows} rows of {tokens} tokens in blocks of "
                    f"{self.window}. Pass the state and the reset flags of the same rows and tokens."
                )
        if self.reset.dtype != torch.bool:
            raise ShapeError(f"reset is {self.reset.dtype}: it must be bool. Use reset.bool().")
        self._check_heads(heads)
        tensors = {name: getattr(self, name) for name in (*wanted, "bias_table", "scale", "state_scale")}
        for name, tensor in {**tensors, "initial state": self.path.initial, "drop": self.drop}.items():
            if tensor is not None and tensor.device != self.qkv.device:
                raise ShapeError(
                    f"{name} is on {tensor.device}, qkv on {self.qkv.device}. Move all of them to one device."
                )

    def _check_heads(self, heads: int) -> None:
        wanted = {
            "bias_table": (heads, NUM_BUCKETS),
            "scale": (heads,),
            "state_scale": (heads,),
            "drop": (heads, self.window, 2 * self.window),
        }
        for name, shape in wanted.items():
            given = getattr(self, name)
            if given is not None and given.shape != shape:
                raise ShapeError(f"{name} is {list(given.shape)}, expected {list(shape)} for {heads} heads.")

    def normalised(self) -> NormalisedTokens:
        """What the plain PyTorch forms attend with."""
        q, k, v = self.qkv.unbind(2)
        return NormalisedTokens(
            q=l2_normalise(q, self.scale),
            state_query=l2_normalise(self.state_query, self.state_scale),
            keys=torch.cat([self.cached_keys, l2_normalise(k)], dim=1),
            values=torch.cat([self.cached_values, v], dim=1),
        )


@dataclass(frozen=True)
class NormalisedTokens:
    """Tokens as they take part in the softmax."""

    q: Tensor  # [B, T, H, Dh], normalised and scaled: attends the window
    state_query: Tensor  # [B, T, H, Dh], normalised and scaled: reads the state
    keys: Tensor  # [B, W+T, H, Dh], cache in front, normalised
    values: Tensor  # [B, W+T, H, Dh], cache in front

    def cache(self, reset: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, W, H, Dh] for the next call; `reset` is bool [B, ceil(T/W)]."""
        starts = token_resets(reset, self.q.shape[1], window)
        return last_window(self.keys, starts, window), last_window(self.values, starts, window)


def token_resets(reset: Tensor, tokens: int, window: int) -> Tensor:
    """Flags of blocks bool [B, ceil(T/W)] as flags of tokens bool [B, T]."""
    starts = reset.new_zeros(reset.shape[0], tokens)
    starts[:, ::window] = reset
    return starts


@dataclass(frozen=True)
class BlockRecurrentOutputs:
    """Result for the tokens, the cache for the next call, and the state after the segment."""

    own: Tensor  # [B, T, H, Dh], window attention
    read: Tensor  # [B, T, H, Dh], read of the state
    keys: Tensor  # [B, W, H, Dh]
    values: Tensor  # [B, W, H, Dh]
    state: Tensor  # [B, S, D] fp32; a last block shorter than W leaves the state unchanged
    states: Tensor | None = None  # [B, ceil(T/W), S, D] after every block, where the form has them all
