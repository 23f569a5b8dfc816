"""What the forms of the Block-Recurrent layer's attention take and give."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from longspan.kernels.block_recurrent.state_path import StatePath


@dataclass(frozen=True)
class BlockRecurrentInputs:
    """Projected tokens, cache, state and weights; B rows, T tokens, W window, H heads, Dh width of a head."""

    q: Tensor  # [B, T, H, Dh], normalised and scaled: attends the window
    state_query: Tensor  # [B, T, H, Dh], normalised and scaled: reads the state
    keys: Tensor  # [B, W+T, H, Dh], cache in front, normalised
    values: Tensor  # [B, W+T, H, Dh], cache in front
    bias_table: Tensor  # [H, 32]
    scale: Tensor  # [H]
    state: Tensor  # [B, S, D] fp32, before the first block
    reset: Tensor  # bool [B, ceil(T/W)], a document starts with the block
    path: StatePath
    drop: Tensor | None  # [H, W, 2W] multiplier of the window's probabilities

    @property
    def window(self) -> int:
        """W."""
        return self.keys.shape[1] - self.q.shape[1]


@dataclass(frozen=True)
class BlockRecurrentOutputs:
    """Result for the tokens and the state after every block."""

    tokens: Tensor  # [B, T, 2*H, Dh]: heads of the window, then heads of the read of the state
    states: Tensor  # [B, ceil(T/W), S, D]; a last block shorter than W leaves the state unchanged
