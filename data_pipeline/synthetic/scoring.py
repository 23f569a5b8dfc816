"""Accuracy on synthetic tasks: whole answers, whole samples, by size, as counts with an interval.

A rounded 100% hides a tail of errors, and a mean over symbols hides strings that are wrong somewhere; so everything
here is counts, and a sample is right only where all of it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longspan.data_pipeline.synthetic.documents import SyntheticDocument
from longspan.data_pipeline.synthetic.samples import NO_LABEL

_Z = 1.959963984540054  # two-sided 95%


@dataclass(frozen=True)
class Accuracy:
    """Right samples among those with low <= size <= high, and a 95% interval of the share that is right."""

    low: int
    high: int
    right: int
    total: int

    @property
    def share(self) -> float:
        """Right share, nan without samples."""
        return self.right / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the share."""
        return interval(self.right, self.total)


def interval(right: int, total: int) -> tuple[float, float]:
    """A 95% interval of a share: Wilson's; with no error (or nothing right) the rule of three, 3 / total."""
    if not total:
        return 0.0, 1.0
    if right == total:
        return max(0.0, 1 - 3 / total), 1.0
    if not right:
        return 0.0, min(1.0, 3 / total)
    share, weight = right / total, _Z**2 / total
    centre = share + weight / 2
    half = _Z * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return (centre - half) / (1 + weight), (centre + half) / (1 + weight)


def by_size(sizes: np.ndarray, right: np.ndarray, bins: Sequence[tuple[int, int]]) -> list[Accuracy]:
    """Accuracy in each bin.

    Args:
        sizes: [samples]. right: bool [samples].
        bins: smallest and largest size of each bin.
    """
    rows = []
    for low, high in bins:
        inside = (sizes >= low) & (sizes <= high)
        rows.append(Accuracy(low, high, int(np.count_nonzero(right & inside)), int(np.count_nonzero(inside))))
    return rows


def right_samples(document: SyntheticDocument, answer_of: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Samples all of whose answers' tokens are right: bool [samples].

    Args:
        answer_of: int64 [tokens], from `documents.answer_of_tokens`.
        right: bool [tokens], whether the model's best guess for this token was it.
    """
    whole = np.ones(len(document.sizes), dtype=bool)
    wrong = answer_of[(answer_of >= 0) & ~right]
    whole[document.sample_of[wrong]] = False
    return whole


def right_labels(labels: np.ndarray, guesses: np.ndarray) -> bool:
    """Whether every asked label of a string was guessed.

    Args:
        labels: int [n], NO_LABEL where nothing is asked.
        guesses: int [n].
    """
    asked = labels != NO_LABEL
    return bool(np.array_equal(labels[asked], np.asarray(guesses)[asked]))
