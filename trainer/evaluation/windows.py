"""What the scorer has to run: modes, context lengths, and the windows that give each target its context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longspan.errors import UsageError
from longspan.trainer.evaluation.targets import chunks, window_start

STREAM_TOKENS = 512  # most tokens that one document streams at once: bounds the rows that stream together


@dataclass(frozen=True)
class ScoredDocument:
    """A document and its targets.

    Attributes:
        name: its id.
        tokens: int64[n], from bos on; may end before the document does.
        token_bytes: int[n], bytes of each token; 0 for bos and eos.
        spans: target tokens [a, b) of each span.
    """

    name: str
    tokens: np.ndarray
    token_bytes: np.ndarray
    spans: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Plan:
    """Modes and context lengths.

    Attributes:
        context_tokens: lengths of `truncated`. reset_tokens: of `reset` and `state_reset`.
        window_tokens: W; `carried` and `swapped` are scored from windows of this length, and `state_reset` at W is
            the reference of the memory gain.
        stride_tokens: targets a window. batch_tokens: tokens a forward pass.
    """

    modes: tuple[str, ...]
    context_tokens: tuple[int, ...]
    reset_tokens: tuple[int, ...]
    window_tokens: int
    stride_tokens: int
    batch_tokens: int = 16384

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

    @property
    def lengths(self) -> list[int]:
        """All window lengths, rising."""
        return sorted({*self.context_tokens, *self.reset_tokens, self.window_tokens})


@dataclass
class Score:
    """Sums over the targets of one (document, span, mode, context length).

    Attributes:
        context_tokens: the length asked for; 0 for `carried` and `swapped`, whose context is the whole document.
        nats: sum of negative log-likelihoods. tokens, bytes: of the targets.
        context_min, context_max: tokens before the targets that the model could really use.
    """

    document: int
    span: int
    mode: str
    context_tokens: int
    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    context_min: int = 0
    context_max: int = 0


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


def all_windows(documents: Sequence[ScoredDocument], plan: Plan, quantum: int) -> list[Window]:
    """The windows of every (document, span, piece of `stride_tokens` targets, context length), in this order.

    Raises:
        UsageError: a target has fewer tokens before it than a context length asks for.
    """
    windows = []
    for d, document in enumerate(documents):
        for s, span in enumerate(document.spans):
            for first, stop in chunks(span, plan.stride_tokens):
                for length in plan.lengths:
                    start = window_start(first, length, quantum)
                    if start < 0:
                        raise UsageError(
                            f"target token {first} of {document.name} has fewer than {length} tokens before it. "
                            f"Put the longest context length, {plan.lengths[-1]}, into context_tokens."
                        )
                    windows.append(Window(d, s, length, start, first, stop))
    return windows


def donors_of(documents: Sequence[ScoredDocument]) -> dict[int, int]:
    """Whose state each document gets in `swapped`: the next longer one's, so that it reaches every position."""
    order = sorted(range(len(documents)), key=lambda d: (len(documents[d].tokens), d))
    if len(order) < 2:
        raise UsageError("mode swapped needs two documents at least; leave it out of modes.")
    return {d: order[i + 1] if i + 1 < len(order) else order[i - 1] for i, d in enumerate(order)}


def stream_stops(starts: dict[int, list[Window]], quantum: int) -> list[int]:
    """Positions where the stream halts: window starts, and enough in between to bound one forward pass."""
    step = max(STREAM_TOKENS // quantum, 1) * quantum
    last = max(starts, default=0)
    return sorted({*starts, *range(step, last, step)})
