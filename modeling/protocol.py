"""The state protocol: one interface for a mixer, a layer, a stack and a whole model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from longspan.errors import ShapeError
from longspan.kernels.tensor_parallel.shard import WHOLE, TensorShard
from longspan.modeling.state import SpecTree, State, StateSpec, tree_map

Dependency = Literal["parallel", "affine_scan", "state_scan", "stack_scan", "token_serial"]
Aux = dict[str, Tensor]


class StatefulModule(nn.Module, ABC):
    """A causal map of token vectors [B, T, D] that carries an explicit state along the sequence.

    Attributes:
        quantum: tokens between which the state may be cut, and on multiples of which documents start.
        lookback: tokens of keys and values needed from the left.
        dependency: how blocks of tokens depend on each other; decides how the sequence may be divided over ranks.
        adds_residual: `forward` takes a keyword `residual`, [B, T, D] or None, to which its last product adds y in the
            residual's own memory (`kernels.feed_forward.api.add_product_`).
        tensor_shard: which heads and hidden units this rank has (`tensor_parallel.shard_model`).
    """

    quantum: int
    lookback: int
    dependency: Dependency
    adds_residual: bool = False
    tensor_shard: TensorShard = WHOLE

    @abstractmethod
    def state_spec(self) -> SpecTree:
        """Shape, dtype, kind and initial value of each state tensor."""

    @abstractmethod
    def forward(self, x: Tensor, state: State, *, reset: Tensor) -> tuple[Tensor, State, Aux]:
        """Map tokens, from and to a state.

        Args:
            x: [B, T, D]. With T a multiple of `quantum` the new state may be continued; with any other T the
                outputs are right, but the new state is a final one.
            state: as `init_state` or an earlier call returned it.
            reset: bool [B, ceil(T/quantum)]: a document starts there, so the state returns to its initial value.

        Returns:
            y [B, T, D]; the new state; auxiliary losses, each a scalar, weighted and summed over tokens.
        """

    def init_state(self, batch: int, device: torch.device | str | None = None) -> State:
        """The state at a document start; gradient reaches learned initial values through it.

        Args:
            batch: rows.
            device: where; the parameters' device if None.
        """
        device = next(self.parameters()).device if device is None else torch.device(device)

        def initial(spec: StateSpec) -> Tensor:
            if spec.init == "zeros":
                return torch.zeros(batch, *spec.shape, dtype=spec.dtype, device=device)
            # a copy: the state must not change when an optimizer updates the parameter
            value = self.get_parameter(spec.init).to(device=device, dtype=spec.dtype)
            return value.expand(batch, *spec.shape).clone()

        return tree_map(initial, self.state_spec())

    def decode_state(self, state: State) -> State:
        """A state at an edge of the quantum in the form that `step` takes."""
        return state

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token x [B, D] of each row: y [B, D] and the next decode state; equal to `forward`."""
        assert self.quantum == 1, "a module with a larger quantum brings a step of its own"
        reset = torch.zeros(x.shape[0], 1, dtype=torch.bool, device=x.device)
        y, state, _ = self(x.unsqueeze(1), state, reset=reset)
        return y.squeeze(1), state


def refine_reset(reset: Tensor, tokens: int, coarse: int, fine: int) -> Tensor:
    """Reset flags on a grid of `coarse` tokens as flags on a grid of `fine` tokens.

    Args:
        reset: bool [B, ceil(T/coarse)].
        tokens: T.
        coarse, fine: grids in tokens; coarse is a multiple of fine.

    Returns:
        bool [B, ceil(T/fine)].
    """
    if coarse == fine:
        return reset
    refined = reset.new_zeros(reset.shape[0], -(-tokens // fine))
    refined[:, :: coarse // fine] = reset
    return refined


def check_reset(reset: Tensor, batch: int, tokens: int, quantum: int, device: torch.device) -> None:
    """Raises ShapeError unless `reset` is bool [B, ceil(T/quantum)] on the device of the tokens."""
    wanted = (batch, -(-tokens // quantum))
    if reset.shape != wanted or reset.dtype != torch.bool:
        raise ShapeError(
            f"reset is {reset.dtype} {list(reset.shape)}, expected torch.bool {list(wanted)}: one flag for each "
            f"{quantum} of {tokens} tokens. Make the flags on the grid of the model's quantum."
        )
    if reset.device != device:
        raise ShapeError(
            f"reset is on {reset.device}, the tokens on {device}. Move both to the model's device with .to(device)."
        )
