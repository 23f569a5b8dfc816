"""What the scorer has to run: modes, context lengths, and the windows that give each target its context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from longspan.errors import UsageError
from longspan.trainer.evaluation.targets import chunks, window_start

STREAM_TOKENS = 512  # of a document in one call, at least, when many stream together
POSITION = "position"
"""Mode of the scores that cover every token of a document, by its place; their `span` is the bucket."""

Key = tuple[int, int, str, int]  # document, span, mode, context length


@dataclass(frozen=True)
class ScoredDocument:
    """A document and its targets.

    Attributes:
        name: its id.
        tokens: int64 [n], from bos on, without eos; may end before the document does.
        token_bytes: int [n], bytes of each token; 0 for bos.
        spans: target tokens [a, b) of each span.
        source: that it belongs to.
        repeats: bool [n], tokens that repeat something from far back; none if empty.
        words: of the whole text; None where only its head is scored.
    """

    name: str
    tokens: np.ndarray
    token_bytes: np.ndarray
    spans: Sequence[tuple[int, int]]
    source: str = ""
    repeats: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    words: int | None = None

    def inputs(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop): int64. Behind its end a document begins again, so that it can lend a state there."""
        if stop <= len(self.tokens):
            return self.tokens[start:stop]
        return self.tokens.take(np.arange(start, stop), mode="wrap")

    def repeats_in(self, start: int, stop: int) -> np.ndarray:
        """Which tokens of [start, stop) are repeats: bool."""
        return self.repeats[start:stop] if len(self.repeats) else np.zeros(stop - start, dtype=bool)


@dataclass(frozen=True)
class Plan:
    """Modes and context lengths.

    Attributes:
        context_tokens: lengths of `truncated`. reset_tokens: of `reset` and `state_reset`.
        window_tokens: W; `carried` and `swapped` are scored from windows of this length, and `state_reset` at W is
            the reference of the memory gain.
        stride_tokens: targets a window. stride_share: or this share of L where that is more.
        segment_tokens: N, tokens of a training segment; `local` clears the recurrent state after each.
        batch_tokens: tokens a forward pass.
    """

    modes: tuple[str, ...]
    context_tokens: tuple[int, ...]
    reset_tokens: tuple[int, ...]
    window_tokens: int
    stride_tokens: int
    batch_tokens: int = 16384
    stride_share: float = 0.0
    segment_tokens: int = 4096

    def modes_at(self, length: int) -> tuple[str, ...]:
        """Modes that are scored with windows of `length` tokens."""
        lengths = {
            "truncated": self.context_tokens,
            "carried": (self.window_tokens,),
            "reset": self.reset_tokens,
            "state_reset": (*self.reset_tokens, self.window_tokens),
            "swapped": (self.window_tokens,),
        }
        return tuple(mode for mode in lengths if mode in self.modes and length in lengths[mode])

    def stride_at(self, length: int) -> int:
        """Targets of one window of `length` tokens of context."""
        return max(self.stride_tokens, int(self.stride_share * length))

    @property
    def lengths(self) -> list[int]:
        """All window lengths, rising."""
        return sorted({*self.context_tokens, *self.reset_tokens, self.window_tokens})

    @property
    def variants(self) -> list[tuple[str, int]]:
        """All (mode, context length) that are scored; 0 for modes whose context is the whole document."""
        whole = [(mode, 0) for mode in ("carried", "swapped", "local") if mode in self.modes]
        return whole + [(m, length) for length in self.lengths for m in self.modes_at(length) if m not in WHOLE]


WHOLE = ("carried", "swapped", "local", POSITION)
"""Modes whose context length is 0: the whole document."""


@dataclass
class Score:
    """Sums over the targets of one (document, span, mode, context length).

    Attributes:
        span: its number; the bucket for `position`.
        context_tokens: the length asked for; 0 for modes whose context is the whole document.
        nats: sum of negative log-likelihoods. tokens, bytes: of the targets.
        context_min, context_max: tokens before the targets that the model could really use.
        repeat_nats, repeat_tokens, repeat_bytes: the part of the sums that belongs to repeats.
    """

    NUMBERS: ClassVar[tuple[str, ...]] = (
        "nats",
        "tokens",
        "bytes",
        "context_min",
        "context_max",
        "repeat_nats",
        "repeat_tokens",
        "repeat_bytes",
    )

    document: int
    span: int
    mode: str
    context_tokens: int
    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    context_min: int = 0
    context_max: int = 0
    repeat_nats: float = 0.0
    repeat_tokens: int = 0
    repeat_bytes: int = 0

    @property
    def key(self) -> Key:
        """What it is the score of."""
        return self.document, self.span, self.mode, self.context_tokens


@dataclass(frozen=True)
class Window:
    """Inputs [start, stop - 1) of a document, whose last ones predict the targets [first, stop)."""

    document: int
    span: int
    length: int
    start: int
    first: int
    stop: int

    @property
    def num_inputs(self) -> int:
        """Inputs of the forward pass."""
        return self.stop - 1 - self.start


def empty_score(documents: Sequence[ScoredDocument], key: Key, low: int, first: int, stop: int) -> Score:
    """The score of the targets [first, stop), with context from token `low` on, before any loss is added to it."""
    sizes = documents[key[0]].token_bytes[first:stop]
    repeats = documents[key[0]].repeats_in(first, stop)
    return Score(
        *key,
        tokens=stop - first,
        bytes=int(sizes.sum()),
        context_min=first - low,
        context_max=stop - 1 - low,
        repeat_tokens=int(np.count_nonzero(repeats)),
        repeat_bytes=int(sizes[repeats].sum()),
    )


def bucket_edges(num_tokens: int) -> list[tuple[int, int]]:
    """Places [2^k, 2^(k+1)) of the tokens behind bos in a document of `num_tokens` tokens, the last cut short."""
    return [(1 << k, min(2 << k, num_tokens)) for k in range((num_tokens - 1).bit_length())]


def score_keys(documents: Sequence[ScoredDocument], plan: Plan) -> list[Key]:
    """The key of every score that a whole evaluation has, in the order of the scores."""
    keys = [
        (d, span, mode, length)
        for d, document in enumerate(documents)
        for span in range(len(document.spans))
        for mode, length in plan.variants
    ]
    keys += [
        (d, bucket, POSITION, 0)
        for d, document in enumerate(documents)
        for bucket in range(len(bucket_edges(len(document.tokens))))
    ]
    return sorted(keys)


def all_windows(documents: Sequence[ScoredDocument], plan: Plan, quantum: int) -> list[Window]:
    """The windows of every (document, span, context length, piece of so many targets as the stride), in this order.

    Raises:
        UsageError: a target has fewer tokens before it than a context length asks for.
    """
    windows = []
    for d, document in enumerate(documents):
        for s, span in enumerate(document.spans):
            for length in plan.lengths:
                if not plan.modes_at(length):
                    continue
                for first, stop in chunks(span, plan.stride_at(length)):
                    start = window_start(first, length, quantum)
                    if start < 0:
                        raise UsageError(
                            f"target token {first} of {document.name} has fewer than {length} tokens before it. "
                            f"Put the longest context length, {plan.lengths[-1]}, into context_tokens."
                        )
                    windows.append(Window(d, s, length, start, first, stop))
    return windows


def donors_of(documents: Sequence[ScoredDocument]) -> dict[int, int]:
    """Whose state each document gets in `swapped`: the next longer one's, so that it reaches every position.

    The longest one gets the second longest's, which begins again where it ends.

    Raises:
        UsageError: fewer than two documents.
    """
    order = sorted(range(len(documents)), key=lambda d: (len(documents[d].tokens), d))
    if len(order) < 2:
        raise UsageError("mode swapped needs two documents at least; leave it out of modes.")
    return {d: order[i + 1] if i + 1 < len(order) else order[i - 1] for i, d in enumerate(order)}


def shares(documents: Sequence[ScoredDocument], plan: Plan, ranks: int) -> list[list[int]]:
    """Documents of each rank: neighbours in length, so that donors mostly are at hand, of about equal work."""
    order = sorted(range(len(documents)), key=lambda d: (len(documents[d].tokens), d))
    per_target = sum((length / plan.stride_at(length) + 1) * len(plan.modes_at(length)) for length in plan.lengths)
    work = [len(documents[d].tokens) + per_target * sum(b - a for a, b in documents[d].spans) for d in order]
    middle = np.cumsum(work) - np.asarray(work) / 2
    rank_of = np.minimum((middle * ranks / sum(work)).astype(int), ranks - 1)
    return [[d for d, rank in zip(order, rank_of, strict=True) if rank == r] for r in range(ranks)]
