"""Recurrent memory around a whole stack (arXiv:2207.06881)."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.kernels.context_parallel.carry import StateGrad, carry_state
from longspan.kernels.context_parallel.shard import ONE_RANK, SequenceShard
from longspan.modeling import state as states
from longspan.modeling.basic import RMSNorm
from longspan.modeling.config import RecurrentMemoryConfig
from longspan.modeling.initialisation import normal_parameter
from longspan.modeling.protocol import Aux, StatefulModule
from longspan.modeling.state import SpecTree, State, StateSpec


class RecurrentMemory(StatefulModule):
    """[read tokens; block; write tokens] goes through the stack, started fresh in each block of W tokens.

    Read and write tokens are RMS(memory) plus ids, as the Block-Recurrent layer treats its state; what the stack
    gives at the write tokens is the memory of the next block. The memory is the only state, zero at a document
    start. Auxiliary loss `memory_norm`: `norm_penalty` times the mean square of the written memory, per token.
    """

    dependency = "stack_scan"
    lookback = 0
    shard: SequenceShard = ONE_RANK
    state_slices: int = 1  # parts of the batch that are handed from rank to rank one by one
    state_grad: StateGrad = "full"

    def __init__(self, stack: StatefulModule, config: RecurrentMemoryConfig, dim: int, window: int) -> None:
        """Args: stack: what the memory goes round; config; dim: width; window: W, tokens of a block."""
        super().__init__()
        self.stack = stack
        self.quantum = window
        self.dim, self.num_tokens, self.norm_penalty = dim, config.num_tokens, config.norm_penalty
        self.norm = RMSNorm(dim)
        self.read_ids = normal_parameter(config.num_tokens, dim, std=1.0)
        self.write_ids = normal_parameter(config.num_tokens, dim, std=1.0)

    def state_spec(self) -> SpecTree:
        """memory [M, D], fp32."""
        wide = torch.promote_types(self.read_ids.dtype, torch.float32)
        return {"memory": StateSpec((self.num_tokens, self.dim), wide, "recurrent")}

    def _tokens(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Read and write tokens [B, M, D] of a memory."""
        base = self.norm(memory)
        return tuple((base + ids.to(base.dtype)).to(ids.dtype) for ids in (self.read_ids, self.write_ids))

    def forward(self, x: Tensor, state: State, *, reset: Tensor) -> tuple[Tensor, State, Aux]:
        """x [B, T, D], reset bool [B, ceil(T/W)] -> y [B, T, D], new memory, auxiliary loss of the written ones."""
        total: Aux = {}

        def run(given: list[Tensor], rows: slice) -> tuple[Tensor, list[Tensor]]:
            memory, outputs = given[0], []
            for index, block in enumerate(x[rows].split(self.quantum, dim=1)):
                memory = memory.masked_fill(reset[rows, index, None, None], 0.0)
                y, memory, aux = self._block(block, memory)
                outputs.append(y)
                for key, value in aux.items():
                    total[key] = total[key] + value if key in total else value
            return torch.cat(outputs, dim=1), [memory]

        y, last = carry_state([state["memory"]], run, self.shard, slices=self.state_slices, state_grad=self.state_grad)
        return y, {"memory": last[0]}, total

    def _block(self, block: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Aux]:
        rows, tokens, _ = block.shape
        read, write = self._tokens(memory)
        x = torch.cat([read, block, write], dim=1)
        reset = torch.zeros(rows, -(-x.shape[1] // self.stack.quantum), dtype=torch.bool, device=x.device)
        y, _, aux = self.stack(x, self.stack.init_state(rows, x.device), reset=reset)
        _, y, written = y.split([self.num_tokens, tokens, self.num_tokens], dim=1)
        written = written.to(memory.dtype).contiguous()
        if self.norm_penalty > 0:
            aux = aux | {"memory_norm": self.norm_penalty * tokens * written.square().mean((1, 2)).sum()}
        return y, written, aux

    def decode_state(self, state: State) -> State:
        """The memory, the stack's decode state after the read tokens, and tokens of the open block."""
        memory = state["memory"]
        count = torch.zeros(memory.shape[0], dtype=torch.int64, device=memory.device)
        return {"memory": memory, "stack": self._open_block(memory), "count": count}

    def _open_block(self, memory: Tensor) -> State:
        """Decode state of a fresh stack that has seen the read tokens."""
        stack = self.stack.decode_state(self.stack.init_state(memory.shape[0], memory.device))
        read, _ = self._tokens(memory)
        for token in read.unbind(1):
            _, stack = self.stack.step(token, stack)
        return stack

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token x [B, D] of each row -> y [B, D], next decode state; rows may be at different places."""
        y, stack = self.stack.step(x, state["stack"])
        count = state["count"] + 1
        full = count == self.quantum
        if not bool(full.any()):
            return y, {"memory": state["memory"], "stack": stack, "count": count}
        closing, written = stack, []
        for token in self._tokens(state["memory"])[1].unbind(1):
            out, closing = self.stack.step(token, closing)
            written.append(out)
        closed = torch.stack(written, dim=1).to(state["memory"].dtype)
        memory = torch.where(full[:, None, None], closed, state["memory"])
        stack = states.where(full, self._open_block(memory), stack)
        return y, {"memory": memory, "stack": stack, "count": torch.where(full, 0, count)}
