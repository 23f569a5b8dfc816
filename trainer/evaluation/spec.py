"""What an evaluation measures: documents, targets, context lengths and modes. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

PROTOCOL = "ppl-vs-length/1.1"
"""Version of targets, modes and reductions; raise the number when any result would change."""

Mode = Literal["truncated", "carried", "reset", "state_reset", "swapped", "local"]


def _safe_name(name: str) -> str:
    """A name that can stand in tables, tags and names of files; no path."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError("use 1 to 64 letters, digits, `.`, `_` and `-`, the first a letter or a digit")
    return name


SpecName = Annotated[str, AfterValidator(_safe_name)]


class EvaluationSpec(BaseModel):
    """Perplexity versus context length on fixed targets of held-out documents."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: SpecName = Field(description="name of the spec, shown in results; no path")
    shards: str | None = Field(None, description="folder of shards; those that the checkpoint was trained on if unset")
    split: Literal["held_out", "train"] = Field("held_out", description="documents to score")
    sources: tuple[str, ...] | None = Field(None, min_length=1, description="only documents of these sources")
    max_documents: int | None = Field(
        None, ge=2, description="at most so many documents, in the order of the hashes of their ids"
    )
    max_document_bytes: int | None = Field(None, ge=1, description="targets lie within this head of a document")
    spans_per_document: int = Field(4, ge=1, description="byte spans that are scored in each document")
    span_bytes: int = Field(8192, ge=1, description="length of one span")
    context_tokens: tuple[int, ...] = Field(min_length=1, description="context lengths L of the curve, rising")
    reset_context_tokens: tuple[int, ...] | None = Field(
        None,
        description="context lengths of reset and state_reset, rising; W always joins state_reset",
    )
    modes: tuple[Mode, ...] = Field(
        ("truncated", "carried", "reset", "state_reset", "swapped"), description="how the context is given"
    )
    stride_tokens: int = Field(256, ge=1, description="targets scored per window; their context is L to L + stride")
    stride_share: float = Field(
        0.0,
        ge=0,
        le=0.25,
        description="of L that the stride may be where that is more: long contexts cost fewer windows",
    )
    repeat_ngram_tokens: int = Field(
        8, ge=1, description="a token that completes so long an n-gram, last seen more than W tokens back, is a repeat"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="type of weights and activations")
    bytes_per_token: int = Field(
        1, ge=1, description="bytes of a token, on average or more: puts L tokens before the first target"
    )
    bootstrap_samples: int = Field(10000, ge=100, description="resamples of the documents")
    confidence: float = Field(0.95, gt=0, lt=1, description="probability inside the intervals")
    seed: int = Field(0, ge=0, description="of the resamples")
    batch_tokens: int = Field(16384, ge=1, description="tokens in one forward pass; changes speed and memory alone")

    @field_validator("context_tokens", "reset_context_tokens")
    @classmethod
    def _rising(cls, lengths: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if lengths is not None and (list(lengths) != sorted(set(lengths)) or lengths[:1] < (1,)):
            raise ValueError(f"context lengths {list(lengths)} are not rising positive numbers")
        return lengths

    @field_validator("modes")
    @classmethod
    def _has_reference(cls, modes: tuple[Mode, ...]) -> tuple[Mode, ...]:
        if "carried" not in modes or len(set(modes)) != len(modes):
            raise ValueError("name each mode once, and `carried` always: every gain is measured against it")
        return modes

    @property
    def longest_tokens(self) -> int:
        """The longest context that any mode is asked for."""
        return max(*self.context_tokens, *(self.reset_context_tokens or (1,)))

    @property
    def reset_lengths(self) -> tuple[int, ...]:
        """Context lengths of `reset` and `state_reset`."""
        return self.context_tokens if self.reset_context_tokens is None else self.reset_context_tokens

    def canonical(self) -> dict[str, Any]:
        """All fields that a result depends on; `batch_tokens` is not among them."""
        return self.model_dump(mode="json", exclude={"batch_tokens"})

    @property
    def digest(self) -> str:
        """Hash of the canonical form, 32 hexadecimal characters."""
        return digest_of(self.canonical())


def digest_of(value: Any) -> str:
    """First 32 hexadecimal characters of the sha256 of `value` as canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Canonical(Protocol):
    """A spec of any kind."""

    def canonical(self) -> dict[str, Any]:
        """All fields that a result depends on."""


def evaluation_key(fingerprint: str, spec: Canonical, dataset_digest: str) -> str:
    """Name of the result of one (checkpoint, spec, dataset, protocol): the same inputs are evaluated once."""
    return digest_of(
        {"checkpoint": fingerprint, "spec": spec.canonical(), "dataset": dataset_digest, "protocol": PROTOCOL}
    )
