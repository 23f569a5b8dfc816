"""The Feedback variant of Block-Recurrent Transformers (arXiv:2203.07852): every layer reads the recurrent state."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from longspan.kernels.block_recurrent.state_path import cross_attend, project_state
from longspan.kernels.context_parallel.carry import StateGrad, carry_state
from longspan.kernels.context_parallel.shard import ONE_RANK, SequenceShard
from longspan.kernels.window_attention.reference import l2_normalise
from longspan.modeling.basic import Dense
from longspan.modeling.config import ModelConfig, SlidingWindowConfig
from longspan.modeling.mixers.block_recurrent import BlockRecurrent
from longspan.modeling.mixers.sliding_window import SlidingWindow
from longspan.modeling.protocol import Aux
from longspan.modeling.stack import MIXERS, Stack
from longspan.modeling.state import State, pack, unpack

_READ = ("read_keys", "read_values")


class FeedbackWindow(SlidingWindow):
    """Window attention whose tokens also read the state of a recurrent layer, with an extra query per head.

    Works within one block. Beside its own keys and values the state that it is given holds `read_keys` and
    `read_values` [B, H, S, Dh], what the recurrent state offers in this block; they are not carried.
    """

    def __init__(self, model: ModelConfig, layer: SlidingWindowConfig, reset_grid: int) -> None:
        """Args: as `SlidingWindow`."""
        super().__init__(model, layer, reset_grid)
        width = model.num_heads * model.head_dim
        self.state_query = Dense(model.dim, width)
        self.output = Dense(2 * width, model.dim)
        self.state_scale = nn.Parameter(torch.ones(model.num_heads))

    def forward(
        self, x: Tensor, state: State, *, reset: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, State, Aux]:
        """x [B, T, D] of one block, reset bool [B, T] -> y [B, T, D], new keys and values, no auxiliary loss.

        residual: see `Dense`.
        """
        own, new_state = self.attend(x, state, reset)
        query = l2_normalise(self.state_query(x).unflatten(-1, (self.heads, -1)), self.state_scale)
        read = cross_attend(query.transpose(1, 2), *(state[name] for name in _READ)).transpose(1, 2)
        return self.output(torch.cat([own, read], dim=2).flatten(2), residual), new_state, {}


class FeedbackStack(Stack):
    """A stack whose window layers read the state that enters the block, of the last recurrent layer in stack order.

    That state depends on all layers below it in the blocks before, so the blocks of a segment pass the whole stack
    one after another: nothing but the tokens of a block is parallel. Dropout masks are drawn anew for each block.
    """

    shard: SequenceShard = ONE_RANK
    state_slices: int = 1  # parts of the batch that are handed from rank to rank one by one
    state_grad: StateGrad = "full"

    def __init__(self, model: ModelConfig) -> None:
        """Args: model: configuration; one layer is recurrent, all others are sliding windows."""
        super().__init__(model, MIXERS | {SlidingWindowConfig: FeedbackWindow})
        self.dependency = "stack_scan"
        layers = self._named()
        self._readers = {name for name, layer in layers if isinstance(layer.mixer, FeedbackWindow)}
        self._source = [name for name, layer in layers if isinstance(layer.mixer, BlockRecurrent)][-1]

    def forward(self, x: Tensor, state: State, *, reset: Tensor) -> tuple[Tensor, State, Aux]:
        """x [B, T, D], reset bool [B, ceil(T/W)] -> y [B, T, D], new state, sums of auxiliary losses."""
        total: Aux = {}
        names = list(pack(state))

        def run(given: list[Tensor], rows: slice) -> tuple[Tensor, list[Tensor]]:
            carried, outputs = unpack(dict(zip(names, given, strict=True))), []
            for index, block in enumerate(x[rows].split(self.quantum, dim=1)):
                starts = reset[rows, index : index + 1]
                seen = self._with_read(carried, self._offered(carried, starts))
                y, carried, aux = super(FeedbackStack, self).forward(block, seen, reset=starts)
                outputs.append(y)
                for key, value in aux.items():
                    total[key] = total[key] + value if key in total else value
            return torch.cat(outputs, dim=1), [pack(carried)[name] for name in names]

        y, last = carry_state(
            list(pack(state).values()), run, self.shard, slices=self.state_slices, state_grad=self.state_grad
        )
        return y, unpack(dict(zip(names, last, strict=True))), total

    def _offered(self, state: State, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, Dh], of this rank's heads, of the state that enters a block; starts bool [B, 1]."""
        mixer = dict(self._named())[self._source].mixer
        recurrent = cast(BlockRecurrent, mixer).recurrent
        path = replace(recurrent.weights(), write=None)  # keys and values alone
        wide = torch.promote_types(path.initial.dtype, torch.float32)
        initial = path.initial.to(wide).expand(starts.shape[0], -1, -1)
        # a frozen state is always the initial one, and is not carried
        vectors = torch.where(starts[..., None], initial, state[self._source].get("state", initial))
        projected = project_state(vectors, path, path.stacked())
        own = self.tensor_shard.part(path.heads)
        return projected.keys[:, own], projected.values[:, own]

    def _with_read(self, state: State, offered: tuple[Tensor, Tensor]) -> State:
        read = dict(zip(_READ, offered, strict=True))
        return {name: entry | read if name in self._readers else entry for name, entry in state.items()}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token x [B, D] of each row -> y [B, D], next decode state; rows may be at different places."""
        source = state[self._source]
        return super().step(x, self._with_read(state, (source["state_keys"], source["state_values"])))
