"""What a task hands over, and to which split its text belongs."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np

Split = Literal["train", "validation", "test"]
NO_LABEL = -100  # torch's cross_entropy ignores it by default

_SHARES: dict[Split, range] = {"train": range(0, 192), "validation": range(192, 224), "test": range(224, 256)}  # of 256


@dataclass(frozen=True)
class Sample:
    """One question with its answers.

    Attributes:
        text: ASCII, answers included.
        answers: int64 [answers, 2], first byte and the byte after the last of each answer in `text`, in order. A model
            of text is scored on these bytes alone; an answer is right when all its bytes are.
        size: the length that a per-length accuracy goes by, in the unit of the task's configuration.
        labels: int16 [len(text)], for tasks with a state: what is right after reading this byte, NO_LABEL where nothing
            is asked. For models with a classifier at each position; never part of `text`, where they would give the
            state away.
        choices: all answers of the same form that could have been right, in an order that says nothing; for scoring by
            likelihood rank. Empty where they are too many.
    """

    text: bytes
    answers: np.ndarray
    size: int
    labels: np.ndarray | None = None
    choices: tuple[bytes, ...] = ()

    def answer(self, number: int = 0) -> bytes:
        """The bytes of one answer."""
        start, stop = self.answers[number].tolist()
        return self.text[start:stop]


def asked_last(question: bytes, answer: bytes, size: int, choices: tuple[bytes, ...] = ()) -> Sample:
    """A sample whose only answer ends the text: `question` = `answer`."""
    start = len(question) + 1
    spans = np.array([[start, start + len(answer)]], dtype=np.int64)
    return Sample(question + b"=" + answer, spans, size, choices=choices)


def labelled(symbols: bytes, labels: np.ndarray, answer: bytes, choices: tuple[bytes, ...]) -> Sample:
    """A sample with a label after each symbol, and the last one written out as the answer.

    Args:
        labels: [len(symbols)], integers, NO_LABEL where nothing is asked.
        answer: the last label in letters.
    """
    plain = asked_last(symbols, answer, len(symbols), choices)
    whole = np.full(len(plain.text), NO_LABEL, dtype=np.int16)
    whole[: len(symbols)] = labels
    return Sample(plain.text, plain.answers, plain.size, whole, choices)


def split_of(kind: str, text: bytes, longest_train: int | None = None) -> Split:
    """Which split a text belongs to, whatever seed or sizes it was drawn with: three quarters train, an eighth each
    else.

    Args:
        kind: the task's kind.
        longest_train: for kinds with too few strings to hold any out inside the training lengths: texts up to this many
            symbols are train, longer ones test.
    """
    if longest_train is not None:
        return "train" if text.index(b"=") <= longest_train else "test"
    digest = blake2b(text, digest_size=1, person=kind.encode()[:16]).digest()
    return next(split for split, share in _SHARES.items() if digest[0] in share)
