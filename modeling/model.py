"""The language model: tied embedding, stack of layers, final norm, token losses."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor, nn

from longspan.errors import ShapeError
from longspan.kernels.tensor_parallel.shard import WHOLE, TensorShard
from longspan.kernels.tensor_parallel.vocabulary import vocabulary_logits, vocabulary_nll
from longspan.modeling import state as states
from longspan.modeling.basic import Embedding, RMSNorm, TiledDropout
from longspan.modeling.config import ActivationCheckpointing, ModelConfig
from longspan.modeling.feedback import FeedbackStack
from longspan.modeling.memory import RecurrentMemory
from longspan.modeling.protocol import Aux, StatefulModule, check_reset
from longspan.modeling.stack import Stack
from longspan.modeling.state import State


class LanguageModel(nn.Module):
    """Next-token model over documents whose state is carried from call to call."""

    tensor_shard: TensorShard = WHOLE

    def __init__(self, config: ModelConfig) -> None:
        """Args: config: the whole model; parameters are drawn from torch's global generator."""
        super().__init__()
        self.config = config
        self.quantum = config.quantum
        self.embedding = Embedding(config.vocab_size, config.dim)  # N(0, 1), also the output matrix
        self.backbone: StatefulModule = FeedbackStack(config) if config.feedback else Stack(config)
        if config.memory is not None:
            self.backbone = RecurrentMemory(self.backbone, config.memory, config.dim, config.window_tokens)
        self.final_norm = RMSNorm(config.dim)
        self.dropout = TiledDropout(config.dropout)

    def set_activation_checkpointing(self, policy: ActivationCheckpointing) -> None:
        """What the backward pass computes again instead of keeping it: "none", each "mixer", or each "layer".

        Raises:
            ValueError: another policy.
        """
        policies = get_args(ActivationCheckpointing)
        if policy not in policies:
            raise ValueError(f"activation checkpointing = {policy!r}: use one of {', '.join(policies)}.")
        for module in self.modules():
            if isinstance(module, Stack):
                module.set_activation_checkpointing(policy)

    def init_state(self, batch: int, device: torch.device | str | None = None) -> State:
        """The state at a document start in `batch` rows; on the parameters' device if None."""
        return self.backbone.init_state(batch, device)

    def state_spec(self) -> states.SpecTree:
        """Shape, dtype, kind and initial value of each state tensor."""
        return self.backbone.state_spec()

    def forward(
        self, tokens: Tensor, state: State, *, reset: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, State, Aux]:
        """Logits or token losses.

        Args:
            tokens: int64 [B, T].
            state: of the B rows; never changed in place.
            reset: bool [B, ceil(T/quantum)], a document starts there.
            labels: int64 [B, T], -100 = no loss; or None.

        Returns:
            Without labels logits [B, T, vocab_size] fp32; with labels the negative log-likelihood of each label
            in nats, [B, T] fp32, 0 where the label is -100. The new state, with gradient: detach it before the
            next step. Auxiliary losses, weighted and summed over tokens.

        Raises:
            ShapeError: tokens, reset, state and labels do not fit together, or are on another device than the weights.
        """
        self._check(tokens, state, reset)
        if labels is not None:
            self._check_labels(tokens, labels)
        y, state, aux = self.backbone(self.embedding(tokens), state, reset=reset)
        y = self.final_norm(y, self.dropout.mask(y))
        if labels is None:
            return vocabulary_logits(y, self.embedding.weight, self.tensor_shard), state, aux
        return vocabulary_nll(y, self.embedding.weight, labels, self.tensor_shard), state, aux

    def advance(self, tokens: Tensor, state: State, *, reset: Tensor) -> State:
        """The new state alone, without the cost of logits; arguments and errors as of `forward`."""
        self._check(tokens, state, reset)
        new_state: State = self.backbone(self.embedding(tokens), state, reset=reset)[1]
        return new_state

    def _check(self, tokens: Tensor, state: State, reset: Tensor) -> None:
        """Raises ShapeError unless tokens, state and reset fit together."""
        if tokens.dim() != 2:
            raise ShapeError(f"tokens are {list(tokens.shape)}, expected [B, T]. Add the missing dimension.")
        if 0 in tokens.shape:
            raise ShapeError(f"tokens are {list(tokens.shape)}: there must be at least one row and one token.")
        self._check_device(tokens)
        check_reset(reset, tokens.shape[0], tokens.shape[1], self.quantum, tokens.device)
        states.check(state, self.state_spec(), tokens.shape[0], tokens.device)

    def _check_device(self, tokens: Tensor) -> None:
        """Raises ShapeError unless the tokens are where the weights are."""
        device = self.embedding.weight.device
        if tokens.device != device:
            raise ShapeError(f"the tokens are on {tokens.device}, the model on {device}. Move either with .to(device).")

    def _check_labels(self, tokens: Tensor, labels: Tensor) -> None:
        """Raises ShapeError unless there is a label for each token, on its device."""
        if labels.shape != tokens.shape:
            raise ShapeError(
                f"labels are {list(labels.shape)}, tokens {list(tokens.shape)}: give each token its label."
            )
        if labels.device != tokens.device:
            raise ShapeError(f"labels are on {labels.device}, the tokens on {tokens.device}. Move both to one device.")

    def reset_rows(self, state: State, rows: Tensor, kinds: tuple[str, ...] = ("recurrent", "cache")) -> State:
        """The state with its tensors of the given kinds at their initial value in the rows bool [B]."""
        initial = states.where(rows, self.init_state(rows.shape[0], rows.device), state)
        return states.of_kinds(self.state_spec(), kinds, initial, state)

    def swap_rows(self, state: State, permutation: Tensor, kinds: tuple[str, ...] = ("recurrent",)) -> State:
        """The state with row i's tensors of the given kinds taken from row permutation[i], int64 [B]."""
        return states.of_kinds(self.state_spec(), kinds, states.index_select(state, permutation), state)

    def decode_state(self, state: State) -> State:
        """A state at an edge of the quantum in the form that `step_tokens` takes."""
        return self.backbone.decode_state(state)

    def step_tokens(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """One more token of each row.

        Args:
            tokens: int64 [B].
            state: from `decode_state` or from here, of the B rows; never changed in place.

        Returns:
            Logits [B, vocab_size] fp32; the next decode state.

        Raises:
            ShapeError: tokens are not [B], have other rows than the state, or tokens, state and weights are on several
                devices.
        """
        if tokens.dim() != 1 or tokens.shape[0] == 0:
            raise ShapeError(f"tokens are {list(tokens.shape)}, expected [B], one of each row.")
        self._check_device(tokens)
        for name, tensor in states.pack(state).items():
            if tensor.device != tokens.device:
                raise ShapeError(
                    f"state tensor {name} is on {tensor.device}, the tokens on {tokens.device}. "
                    "Move the state with longspan.modeling.state.to, or the tokens, to the device of the model."
                )
        y, state = self.backbone.step(self.embedding(tokens), state)
        return vocabulary_logits(self.final_norm(y), self.embedding.weight, self.tensor_shard), state


def build_model(config: ModelConfig) -> LanguageModel:
    """A freshly initialised model; draws from torch's global generator, which the caller seeds."""
    return LanguageModel(config)
