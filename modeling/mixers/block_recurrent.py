"""Block-Recurrent attention (arXiv:2203.07852): window attention plus a recurrent state read and written per block."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longspan.kernels.block_recurrent.api import block_recurrent
from longspan.kernels.block_recurrent.inputs import BlockRecurrentInputs, token_resets
from longspan.kernels.block_recurrent.over_ranks import block_recurrent_over_ranks
from longspan.kernels.block_recurrent.packed import project_sum, project_twice
from longspan.kernels.block_recurrent.state_path import (
    Gate,
    StateFeedForward,
    StatePath,
    StateWrite,
    cross_attend,
    project_state,
    write_state,
)
from longspan.kernels.context_parallel.carry import StateGrad
from longspan.kernels.context_parallel.halo import window_cache
from longspan.kernels.context_parallel.shard import ONE_RANK, SequenceShard
from longspan.kernels.feed_forward.api import add_product_
from longspan.kernels.tensor_parallel.collectives import gather_parts
from longspan.kernels.window_attention.api import window_attention
from longspan.kernels.window_attention.reference import NUM_BUCKETS, l2_normalise
from longspan.modeling.basic import Dense, RMSNorm, head_dropout_mask
from longspan.modeling.config import BlockRecurrentConfig, ModelConfig
from longspan.modeling.initialisation import normal_parameter, variance_scaling_
from longspan.modeling.protocol import Aux, StatefulModule
from longspan.modeling.state import SpecTree, State, StateSpec


class StateGate(nn.Module):
    """Parameters of one gate of the state: the paper's fixed gate, or its LSTM gate."""

    def __init__(self, layer: BlockRecurrentConfig, dim: int, hidden_dim: int) -> None:
        """Args: layer: configuration; dim: width of the state; hidden_dim: width of what the LSTM gate sees."""
        super().__init__()
        self.tanh = layer.candidate == "tanh"
        if layer.gate == "fixed":
            self.bias = normal_parameter(dim, std=0.1)
            return
        self.forget_weight = nn.Parameter(variance_scaling_(torch.empty(dim, hidden_dim), scale=0.1))
        self.forget_bias = normal_parameter(dim, std=0.1)
        self.input_weight = nn.Parameter(variance_scaling_(torch.empty(dim, hidden_dim), scale=0.1))
        self.input_bias = normal_parameter(dim, std=0.1)

    def weights(self) -> Gate:
        """The parameters as the kernel takes them."""
        return Gate(**dict(self.named_parameters()), tanh=self.tanh)


class StateWriting(nn.Module):
    """Parameters that write the state: its queries; output and gate (skip, dual); FFN and gate (dual, single)."""

    def __init__(self, model: ModelConfig, layer: BlockRecurrentConfig) -> None:
        """Args: model, layer: configuration."""
        super().__init__()
        dim, width = model.dim, model.num_heads * model.head_dim
        self.mode = layer.mode
        self.query = Dense(dim, width)
        self.token_query = Dense(dim, width)
        self.self_scale = nn.Parameter(torch.ones(model.num_heads))
        self.token_scale = nn.Parameter(torch.ones(model.num_heads))
        if layer.mode != "single":
            self.output = Dense(2 * width, dim)
            self.gate = StateGate(layer, dim, 2 * width)
        if layer.mode == "dual":
            self.ffn_norm = RMSNorm(dim)
        if layer.mode != "skip":
            self.ffn_hidden = Dense(dim if layer.mode == "dual" else 2 * width, model.ffn_dim)
            self.ffn_output = Dense(model.ffn_dim, dim)
            self.ffn_gate = StateGate(layer, dim, model.ffn_dim)

    def weights(self) -> StateWrite:
        """The parameters as the kernel takes them."""
        ffn = None
        if self.mode != "skip":
            norm = self.ffn_norm.scale if self.mode == "dual" else None
            ffn = StateFeedForward(self.ffn_hidden.weight, self.ffn_output.weight, self.ffn_gate.weights(), norm)
        return StateWrite(
            query=self.query.weight,
            token_query=self.token_query.weight,
            self_scale=self.self_scale,
            token_scale=self.token_scale,
            output=None if self.mode == "single" else self.output.weight,
            gate=None if self.mode == "single" else self.gate.weights(),
            ffn=ffn,
        )


class RecurrentState(nn.Module):
    """Parameters of the state: initial value, ids, keys and values, and what writes it unless it is frozen."""

    def __init__(self, model: ModelConfig, layer: BlockRecurrentConfig) -> None:
        """Args: model, layer: configuration."""
        super().__init__()
        width = model.num_heads * model.head_dim
        self.heads = model.num_heads
        self.initial = normal_parameter(layer.num_states, model.dim, std=0.1)
        self.norm = RMSNorm(model.dim)
        self.ids = normal_parameter(layer.num_states, model.dim, std=1.0)
        self.key = Dense(model.dim, width)
        self.value = Dense(model.dim, width)
        self.write = StateWriting(model, layer) if layer.update == "trained" else None

    def weights(self) -> StatePath:
        """The parameters as the kernel takes them."""
        return StatePath(
            heads=self.heads,
            initial=self.initial,
            norm=self.norm.scale,
            ids=self.ids,
            key=self.key.weight,
            value=self.value.weight,
            write=None if self.write is None else self.write.weights(),
        )


class BlockRecurrent(StatefulModule):
    """Window attention and S recurrent state vectors.

    State: normalised keys and values of the last block (cache) and the state vectors (recurrent, fp32). A frozen
    state is no state at all: every block reads the learned initial value, and only the cache is carried.

    Tensor-parallel ranks divide the tokens' heads, not the state's: each runs the whole state path, over the keys and
    values of all heads, and its tokens read their own heads of it. So the serial chain waits for nobody, and on each
    rank what flows back through it is a part of the gradient (docs/decisions/014-tensor-parallel-by-slicing.md).
    """

    dependency = "state_scan"
    adds_residual = True
    shard: SequenceShard = ONE_RANK
    state_slices: int = 1  # parts of the batch that are handed from rank to rank one by one
    state_grad: StateGrad = "full"

    def __init__(self, model: ModelConfig, layer: BlockRecurrentConfig, reset_grid: int) -> None:
        """Args: model, layer: configuration; reset_grid: unused, documents start on multiples of W here anyway."""
        super().__init__()
        self.window = self.quantum = self.lookback = model.window_tokens
        self.heads, self.head_dim = model.num_heads, model.head_dim
        self.num_states, self.dim, self.dropout = layer.num_states, model.dim, model.dropout
        width = model.num_heads * model.head_dim
        self.query = Dense(model.dim, width)
        self.key = Dense(model.dim, width)
        self.value = Dense(model.dim, width)
        self.state_query = Dense(model.dim, width)
        self.output = Dense(2 * width, model.dim)
        self.scale = nn.Parameter(torch.ones(model.num_heads))
        self.state_scale = nn.Parameter(torch.ones(model.num_heads))
        self.position_table = normal_parameter(model.num_heads, NUM_BUCKETS, std=NUM_BUCKETS**-0.5)
        self.recurrent = RecurrentState(model, layer)

    def state_spec(self) -> SpecTree:
        """keys, values [W, H, Dh] in the compute dtype; state [S, D] fp32 unless frozen."""
        dtype = self.key.weight.dtype
        cache = StateSpec((self.window, self.heads, self.head_dim), dtype, "cache", head_axis=2)
        specs: SpecTree = {"keys": cache, "values": cache}
        if self.recurrent.write is not None:
            wide = torch.promote_types(dtype, torch.float32)
            specs["state"] = StateSpec((self.num_states, self.dim), wide, "recurrent", init="recurrent.initial")
        return specs

    def _state_vectors(self, state: State, rows: int) -> Tensor:
        """[B, S, D]: carried, or the learned initial value if frozen."""
        if self.recurrent.write is not None:
            return state["state"]
        initial = self.recurrent.initial
        return initial.to(torch.promote_types(initial.dtype, torch.float32)).expand(rows, -1, -1)

    def _stacked(self) -> Tensor:
        """Weights of query, key and value as one matrix [3*H*Dh, D]."""
        return torch.cat([self.query.weight, self.key.weight, self.value.weight])

    def forward(
        self, x: Tensor, state: State, *, reset: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, State, Aux]:
        """x [B, T, D], reset bool [B, ceil(T/W)] -> y [B, T, D], new state, no auxiliary loss.

        residual: see `Dense`.
        """
        drop = None
        if self.training and self.dropout > 0:
            drop = head_dropout_mask(self.heads, self.window, self.dropout, x, self.tensor_shard)
        qkv, state_query = project_twice(x, self._stacked(), self.state_query.weight)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))
        starts = token_resets(reset, x.shape[1], self.window)
        qkv, keys, values = window_cache(qkv, state["keys"], state["values"], starts, self.shard)
        own = self.tensor_shard.part(self.recurrent.heads)
        inputs = BlockRecurrentInputs(
            qkv=qkv,
            state_query=state_query.unflatten(-1, (self.heads, -1)),
            cached_keys=keys,
            cached_values=values,
            bias_table=self.position_table,
            scale=self.scale,
            state_scale=self.state_scale,
            state=self._state_vectors(state, x.shape[0]),
            reset=reset,
            path=self.recurrent.weights(),
            drop=drop,
            own_heads=own,
            all_tokens=self._all_tokens(qkv, keys, values) if self.recurrent.write is not None else None,
        )
        y, new_state = self._attend(inputs, residual)
        return y, new_state, {}

    def _all_tokens(self, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor | None:
        """Normalised keys and values of all ranks' heads [2, B, W+T, H', Dh], cache in front; None if all are ours."""
        if self.tensor_shard.size == 1:
            return None
        seen = (torch.cat([keys, l2_normalise(qkv[:, :, 1])], dim=1), torch.cat([values, qkv[:, :, 2]], dim=1))
        return gather_parts(torch.stack(seen), 3, self.tensor_shard)

    def _own(self, heads: Tensor) -> Tensor:
        """This rank's heads of [B, H', S, Dh]."""
        return heads[:, self.tensor_shard.part(heads.shape[1])]

    def _attend(self, inputs: BlockRecurrentInputs, residual: Tensor | None) -> tuple[Tensor, State]:
        """Attention and output projection, added to a residual if there is one; the state goes from rank to rank."""
        if self.recurrent.write is None or self.shard.size == 1:
            out = block_recurrent(inputs)
        else:
            out = block_recurrent_over_ranks(inputs, self.shard, slices=self.state_slices, state_grad=self.state_grad)
        sides = out.own.flatten(2), out.read.flatten(2)
        weight = self.output.weight
        y = project_sum(*sides, weight) if residual is None else add_product_(residual, weight, *sides)
        new_state: State = {"keys": out.keys, "values": out.values}
        if self.recurrent.write is not None:
            new_state["state"] = out.state.contiguous()  # of all blocks' states the last, perhaps
        return y, new_state

    def decode_state(self, state: State) -> State:
        """Rolling keys and values of the last 2W tokens, state, its projections, and tokens of the open block."""
        rows = state["keys"].shape[0]
        path = self.recurrent.weights()
        vectors = self._state_vectors(state, rows)
        projected = project_state(vectors, path, path.stacked())
        return {
            # the older half is out of sight until the open block is full, and gone by then
            "keys": torch.cat([torch.zeros_like(state["keys"]), state["keys"]], dim=1),
            "values": torch.cat([torch.zeros_like(state["values"]), state["values"]], dim=1),
            "state": vectors,
            "state_keys": self._own(projected.keys),
            "state_values": self._own(projected.values),
            "count": torch.zeros(rows, dtype=torch.int64, device=vectors.device),
        }

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token x [B, D] of each row -> y [B, D], next decode state; rows may be at different places."""
        x = x.unsqueeze(1)
        no_reset = torch.zeros(x.shape[0], 1, dtype=torch.bool, device=x.device)
        own, keys, values = window_attention(
            F.linear(x, self._stacked()).unflatten(-1, (3, self.heads, -1)),
            state["keys"][:, self.window :],
            state["values"][:, self.window :],
            self.position_table,
            self.scale,
            reset=no_reset,
            reset_grid=self.window,
        )
        q = l2_normalise(self.state_query(x).unflatten(-1, (self.heads, -1)), self.state_scale).transpose(1, 2)
        read = cross_attend(q, state["state_keys"], state["state_values"]).transpose(1, 2)
        y = self.output(torch.cat([own, read], dim=2).flatten(2)).squeeze(1)
        oldest = slice(1, self.window + 1)
        new_state = state | {
            "keys": torch.cat([state["keys"][:, oldest], keys], dim=1),
            "values": torch.cat([state["values"][:, oldest], values], dim=1),
            "count": state["count"] + 1,
        }
        return y, self._close_blocks(new_state)

    def _close_blocks(self, state: State) -> State:
        """Write the state in the rows whose block is full."""
        full = state["count"] == self.window
        if not bool(full.any()):
            return state
        count = torch.where(full, 0, state["count"])
        if self.recurrent.write is None:
            return state | {"count": count}
        path = self.recurrent.weights()
        stacked = path.stacked()
        seen = gather_parts(torch.stack([state["keys"], state["values"]]), 3, self.tensor_shard)
        keys, values = seen.transpose(2, 3).unbind(0)
        vectors = write_state(state["state"], project_state(state["state"], path, stacked), keys, values, path)
        vectors = torch.where(full[:, None, None], vectors, state["state"])
        projected = project_state(vectors, path, stacked)
        return state | {
            "state": vectors,
            "state_keys": self._own(projected.keys),
            "state_values": self._own(projected.values),
            "count": count,
        }
