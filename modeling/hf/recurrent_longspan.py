"""The recurrent mixer of the Hugging Face form: a window whose tokens also read a state, written once a block."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.modeling.hf.mixers_longspan import Norm, Piece, WindowMixer, attend, unit


class Gate(nn.Module):
    """c' = c * f + new * i, a channel each: one constant ("fixed"), or computed from `hidden` ("lstm")."""

    def __init__(self, block: dict[str, Any], dim: int, hidden: int) -> None:
        """block: gate, candidate; hidden: width of what an lstm gate looks at."""
        super().__init__()
        self.kind, self.tanh = block["gate"], block.get("candidate") == "tanh"
        if self.kind == "fixed":
            self.bias = nn.Parameter(torch.zeros(dim))
        else:
            self.forget_weight, self.input_weight = (nn.Parameter(torch.zeros(dim, hidden)) for _ in range(2))
            self.forget_bias, self.input_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(2))

    def forward(self, state: Tensor, new: Tensor, hidden: Tensor) -> Tensor:
        """state float32 [B, S, D], new [B, S, D], hidden [B, S, any] -> float32 [B, S, D]."""
        new = torch.tanh(new.float()) if self.tanh else new
        if self.kind == "fixed":
            keep = torch.sigmoid(self.bias.float())
            return state * keep + new.float() * (1 - keep)
        forget = F.linear(hidden, self.forget_weight).float() + self.forget_bias.float()
        write = F.linear(hidden, self.input_weight).float() + self.input_bias.float()
        return state * torch.sigmoid(forget + 1) + new.float() * torch.sigmoid(write - 1)


class StateWriting(nn.Module):
    """Parameters that write the state, and the write."""

    def __init__(self, config: Any, block: dict[str, Any]) -> None:
        """block: gate, candidate and mode."""
        super().__init__()
        dim, heads, hidden = config.hidden_size, config.num_attention_heads, config.intermediate_size
        inner = heads * config.head_dim
        self.mode = block["mode"]
        self.query, self.token_query = (nn.Linear(dim, inner, bias=False) for _ in range(2))
        self.self_scale, self.token_scale = (nn.Parameter(torch.ones(heads)) for _ in range(2))
        if self.mode != "single":
            self.output = nn.Linear(2 * inner, dim, bias=False)
            self.gate = Gate(block, dim, 2 * inner)
        if self.mode == "dual":
            self.ffn_norm = Norm(dim)
        if self.mode != "skip":
            self.ffn_hidden = nn.Linear(dim if self.mode == "dual" else 2 * inner, hidden, bias=False)
            self.ffn_output = nn.Linear(hidden, dim, bias=False)
            self.ffn_gate = Gate(block, dim, hidden)

    def forward(self, state: Tensor, read: Tensor) -> Tensor:
        """The state after a block; state float32 [B, S, D], read [B, S, 2*H*K] -> float32 [B, S, D]."""
        if self.mode != "single":
            state = self.gate(state, self.output(read), read)
        if self.mode == "skip":
            return state
        seen = self.ffn_norm(state).to(read.dtype) if self.mode == "dual" else read
        hidden = torch.relu(self.ffn_hidden(seen))
        new = self.ffn_output(hidden)
        return self.ffn_gate(state, torch.tanh(new) if self.mode == "single" else new, hidden)


class RecurrentState(nn.Module):
    """Parameters of the state: initial value, ids, keys and values, and what writes it unless it is frozen."""

    def __init__(self, config: Any, block: dict[str, Any]) -> None:
        """block: num_states, update, gate, candidate, mode."""
        super().__init__()
        dim, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.initial, self.ids = (nn.Parameter(torch.zeros(block["num_states"], dim)) for _ in range(2))
        self.norm = Norm(dim)
        self.key, self.value = (nn.Linear(dim, inner, bias=False) for _ in range(2))
        self.write = None if block.get("update") == "frozen" else StateWriting(config, block)

    def inputs(self, state: Tensor) -> Tensor:
        """What the projections of a state [B, S, D] see: [B, S, D]."""
        return (self.norm(state) + self.ids.float()).to(self.key.weight.dtype)


class RecurrentMixer(WindowMixer):
    """A window whose tokens also read a state of S vectors, which is written once a block.

    Tensors besides those of the window: state float32 [B, S, D] after the last complete block, and what tokens
    read of it, state_keys and state_values [B, S, H, K].
    """

    def __init__(self, config: Any, block: dict[str, Any]) -> None:
        """block: gate, mode, num_states, update."""
        super().__init__(config, block, reads=2)
        self.state_query = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.state_scale = nn.Parameter(torch.ones(self.heads))
        self.recurrent = RecurrentState(config, block)

    def start(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """Null keys and values, the learned initial state."""
        state = self.recurrent.initial.float().expand(batch, -1, -1)
        return {**super().start(batch, device), **self.readable(state)}

    def readable(self, state: Tensor) -> dict[str, Tensor]:
        """A state [B, S, D] with its keys and values, which are kept so that no token computes them again."""
        u = self.recurrent.inputs(state)
        keys, values = unit(self.split(self.recurrent.key(u))), self.split(self.recurrent.value(u))
        return {"state": state, "state_keys": keys, "state_values": values}

    def blocks(
        self, h: Tensor, pieces: list[Piece], tensors: dict[str, Tensor], kernels: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """All blocks at once, but for the chain of the states."""
        mixed, state, after = kernels.recurrent_blocks(self, h, tensors)
        after |= self.readable(state) if self.recurrent.write is not None else {}
        return self.output(mixed), {**tensors, **after}

    def with_state(
        self, h: Tensor, mixed: Tensor, keys: Tensor, values: Tensor, piece: Piece, tensors: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens read the state from before their block; a complete block then writes it."""
        before = {name: tensors[name] for name in ("state", "state_keys", "state_values")}
        query = unit(self.split(self.state_query(h)), self.state_scale)
        mixed = torch.cat([mixed, attend(query, before["state_keys"], before["state_values"])], -1)
        write = self.recurrent.write
        if not piece.ends or write is None:
            return mixed, before
        u = self.recurrent.inputs(before["state"])
        own = unit(self.split(write.query(u)), write.self_scale)
        others = unit(self.split(write.token_query(u)), write.token_scale)
        read = [attend(own, before["state_keys"], before["state_values"]), attend(others, keys, values)]
        after = self.readable(write(before["state"], torch.cat(read, -1)))
        return mixed, {name: piece.where_ended(after[name], before[name]) for name in before}
