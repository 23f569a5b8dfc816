"""Model configuration: one class a mixer, one for the whole model. Imports no torch.

A model is a list of layers; each entry names its mixer and may be repeated, so hybrids and several
recurrent layers need no further notation.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

ActivationCheckpointing = Literal["none", "mixer", "layer"]  # what the backward pass computes again


class Schema(BaseModel):
    """Frozen, strict about unknown keys; base of every configuration class here."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _LayerConfig(Schema):
    repeat: int = Field(1, ge=1, description="how many such layers follow one another")

    def quantum(self, window_tokens: int) -> int:
        """Tokens between which this layer's state may be cut."""
        return 1


class SlidingWindowConfig(_LayerConfig):
    """Attention to exactly the last `window_tokens` tokens, with a Transformer-XL cache."""

    mixer: Literal["sliding_window"] = "sliding_window"
    positions: Literal["t5", "rope"] = Field("t5", description="learned bias of the distance, or rotary positions")


class BlockRecurrentConfig(_LayerConfig):
    """Block-Recurrent layer (arXiv:2203.07852): window attention plus a recurrent state of `num_states` vectors."""

    mixer: Literal["block_recurrent"] = "block_recurrent"
    gate: Literal["fixed", "lstm"] = Field("fixed", description="gate that writes the state")
    mode: Literal["skip", "dual", "single"] = Field("skip", description="state path: skip has no state FFN")
    candidate: Literal["linear", "tanh"] = Field(
        "linear",
        description="what an lstm gate writes (skip, dual): as the authors' code, or the paper's tanh",
    )
    num_states: int = Field(512, ge=1, description="state vectors")
    update: Literal["trained", "frozen"] = Field(
        "trained", description="frozen keeps the state at its learned initial value: the ablation of all memory"
    )

    @field_validator("candidate")
    @classmethod
    def _candidate_has_an_effect(cls, candidate: str, info: ValidationInfo) -> str:
        gate, mode = info.data.get("gate"), info.data.get("mode")
        if candidate == "tanh" and (gate == "fixed" or mode == "single"):
            raise ValueError(
                f"has no effect with gate {gate} and mode {mode}: the fixed gate writes without a tanh, mode single "
                "with one in any case. Leave it out, or use gate: lstm with mode: skip or dual"
            )
        return candidate

    def quantum(self, window_tokens: int) -> int:
        """The state is written once a block."""
        return window_tokens


class LinearAttentionConfig(_LayerConfig):
    """Linear transformer layer (arXiv:2006.16236): a matrix state, quantum 1."""

    mixer: Literal["linear_attention"] = "linear_attention"


class FullAttentionConfig(_LayerConfig):
    """Causal attention with rotary positions to the last `context_tokens` tokens of the document."""

    mixer: Literal["full_attention"] = "full_attention"
    context_tokens: int = Field(4096, ge=1, description="tokens of the document that a token sees, itself included")


LayerConfig = Annotated[
    SlidingWindowConfig | BlockRecurrentConfig | LinearAttentionConfig | FullAttentionConfig,
    Field(discriminator="mixer"),
]


class RecurrentMemoryConfig(Schema):
    """Recurrent memory around the whole stack (arXiv:2207.06881): read and write tokens in every block."""

    num_tokens: int = Field(8, ge=1, description="memory tokens")
    norm_penalty: float = Field(0.0, ge=0, description="weight of the auxiliary loss on the memory's mean square")


class ModelConfig(Schema):
    """A whole language model."""

    name: str = Field("model", description="name of the recipe, as in the paper's table where there is one")
    vocab_size: int = Field(384, ge=2, description="rows of the embedding; the byte vocabulary is padded to 384")
    dim: int = Field(1024, ge=1, description="width of the residual stream")
    num_heads: int = Field(8, ge=1, description="attention heads")
    head_dim: int = Field(128, ge=2, description="width of one head")
    ffn_dim: int = Field(4096, ge=1, description="hidden width of the feed-forward network")
    window_tokens: int = Field(512, ge=1, description="W: block length and sliding window")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout of residual paths and attention")
    layers: tuple[LayerConfig, ...] = Field(min_length=1, description="layers from the bottom up")
    feedback: bool = Field(
        False, description="window layers read the state of the last recurrent layer too; blocks pass the stack in turn"
    )
    memory: RecurrentMemoryConfig | None = Field(None, description="recurrent memory around the whole stack")

    @field_validator("layers")
    @classmethod
    def _rotary_heads_have_pairs(cls, layers: tuple[LayerConfig, ...], info: ValidationInfo) -> tuple[LayerConfig, ...]:
        rotary = {layer.mixer for layer in layers if getattr(layer, "positions", "") == "rope"}
        rotary |= {layer.mixer for layer in layers if layer.mixer == "full_attention"}
        if rotary and info.data.get("head_dim", 2) % 2:
            raise ValueError(
                f"{' and '.join(sorted(rotary))} with rotary positions turns pairs of a head, and head_dim = "
                f"{info.data['head_dim']} is odd. Use an even head_dim"
            )
        return layers

    @field_validator("feedback")
    @classmethod
    def _feedback_has_a_source_and_readers(cls, feedback: bool, info: ValidationInfo) -> bool:
        mixers = [layer.mixer for layer in info.data.get("layers", ())]
        if not feedback or not mixers:
            return feedback
        if "block_recurrent" not in mixers:
            raise ValueError(
                "no layer has a state that the others could read. Add a block_recurrent layer, or use feedback: false"
            )
        if other := sorted(set(mixers) - {"block_recurrent", "sliding_window"}):
            raise ValueError(
                f"{' and '.join(other)} cannot read the state of another layer, only sliding_window can. "
                "Use sliding_window layers, or feedback: false"
            )
        if set(mixers) == {"block_recurrent"}:
            raise ValueError(
                "has no effect: every layer is recurrent and reads its own state. Add sliding_window layers, or use "
                "feedback: false"
            )
        return feedback

    def expanded_layers(self) -> list[_LayerConfig]:
        """One entry a layer, `repeat` written out."""
        return [layer for layer in self.layers for _ in range(layer.repeat)]

    def indivisible(self, ranks: int) -> list[tuple[str, int]]:
        """(field, value) of the sizes that do not divide over so many tensor-parallel ranks."""
        sizes = {"num_heads": self.num_heads, "ffn_dim": self.ffn_dim, "vocab_size": self.vocab_size}
        return [(name, size) for name, size in sizes.items() if size % ranks]

    @property
    def quantum(self) -> int:
        """Tokens between which the model's state may be cut: the least common multiple of its layers' quanta."""
        quanta = [layer.quantum(self.window_tokens) for layer in self.layers]
        return math.lcm(*quanta, self.window_tokens if self.memory else 1)

    @property
    def is_recurrent(self) -> bool:
        """Whether a trained state is written once a block, so that a segment must hold two blocks or more."""
        return self.memory is not None or any(isinstance(layer, BlockRecurrentConfig) for layer in self.layers)
