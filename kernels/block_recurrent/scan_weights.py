"""Weights of the state scan in one flat record, so that an autograd function can take and differentiate them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from longspan.kernels.block_recurrent.state_path import Gate, StatePath, StateWrite


@dataclass(frozen=True)
class ScanWeights:
    """What the scan of a trained state needs; absent weights are None. Shapes as in `state_path`.

    G is 1 for the fixed gate and 3 (written value, forget, input) for the LSTM gate.
    """

    initial: Tensor  # [S, D]
    norm: Tensor  # [D]
    ids: Tensor  # [S, D]
    stacked: Tensor  # [4*H*Dh, D]: key, value, self query, token query
    self_scale: Tensor  # [H]
    token_scale: Tensor  # [H]
    output: Tensor | None  # [D, 2*H*Dh]
    gate_bias: Tensor | None  # [D]
    forget_weight: Tensor | None  # [D, 2*H*Dh]
    forget_bias: Tensor | None
    input_weight: Tensor | None
    input_bias: Tensor | None
    ffn_norm: Tensor | None  # [D]
    ffn_hidden: Tensor | None  # [F, D] or [F, 2*H*Dh]
    ffn_output: Tensor | None  # [D, F]
    ffn_gate_bias: Tensor | None  # [D]
    ffn_forget_weight: Tensor | None  # [D, F]
    ffn_forget_bias: Tensor | None
    ffn_input_weight: Tensor | None
    ffn_input_bias: Tensor | None
    tanh: bool = False  # of what the gate writes
    ffn_tanh: bool = False  # of what the FFN's gate writes

    @classmethod
    def of(cls, path: StatePath) -> ScanWeights:
        """The weights of a path that writes its state, each dense, as the kernels read them."""
        write = path.write
        assert write is not None, "a frozen state has nothing to scan"
        gate, ffn = write.gate or Gate(), write.ffn
        last = Gate() if ffn is None else ffn.gate
        tensors = (
            path.initial,
            path.norm,
            path.ids,
            path.stacked(),
            write.self_scale,
            write.token_scale,
            write.output,
            gate.bias,
            gate.forget_weight,
            gate.forget_bias,
            gate.input_weight,
            gate.input_bias,
            None if ffn is None else ffn.norm,
            None if ffn is None else ffn.hidden,
            None if ffn is None else ffn.output,
            last.bias,
            last.forget_weight,
            last.forget_bias,
            last.input_weight,
            last.input_bias,
        )
        return cls.from_tensors([None if x is None else x.contiguous() for x in tensors], gate.tanh, last.tanh)

    def path(self) -> StatePath:
        """The same weights as a path of mode skip."""
        key, value, query, token_query = self.stacked.chunk(4)
        write = StateWrite(query, token_query, self.self_scale, self.token_scale, self.output, self.gate)
        return StatePath(self.heads, self.initial, self.norm, self.ids, key, value, write)

    @staticmethod
    def names() -> tuple[str, ...]:
        """The fields that are tensors, in order."""
        return tuple(field.name for field in fields(ScanWeights))[:-2]

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor | None], tanh: bool, ffn_tanh: bool) -> ScanWeights:
        """The weights whose `tensors()` these are."""
        return cls(**dict(zip(cls.names(), tensors, strict=True)), tanh=tanh, ffn_tanh=ffn_tanh)  # type: ignore[arg-type]

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors in order: the first arguments of the constructor."""
        return tuple(getattr(self, name) for name in self.names())

    @property
    def heads(self) -> int:
        """H."""
        return self.self_scale.shape[0]

    @property
    def mode(self) -> str:
        """skip, dual or single."""
        if self.ffn_hidden is None:
            return "skip"
        return "single" if self.output is None else "dual"

    @property
    def gate(self) -> Gate:
        """Gate of what the read writes (skip, dual)."""
        return Gate(self.gate_bias, self.forget_weight, self.forget_bias, self.input_weight, self.input_bias, self.tanh)

    @property
    def ffn_gate(self) -> Gate:
        """Gate of what the state FFN writes (dual, single)."""
        return Gate(
            self.ffn_gate_bias,
            self.ffn_forget_weight,
            self.ffn_forget_bias,
            self.ffn_input_weight,
            self.ffn_input_bias,
            self.ffn_tanh,
        )

    def read_matrix(self) -> Tensor:
        """Everything that multiplies what the state has read: [G*D, 2*H*Dh] (skip, dual) or [F, 2*H*Dh] (single)."""
        if self.output is None:
            assert self.ffn_hidden is not None
            return self.ffn_hidden
        return _gated(self.output, self.gate)

    def hidden_matrix(self) -> Tensor:
        """Everything that multiplies the hidden layer of the state FFN: [G*D, F]."""
        assert self.ffn_output is not None
        return _gated(self.ffn_output, self.ffn_gate)


def _gated(output: Tensor, gate: Gate) -> Tensor:
    if gate.forget_weight is None or gate.input_weight is None:
        return output
    return torch.cat([output, gate.forget_weight, gate.input_weight])
