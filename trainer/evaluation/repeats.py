"""Which tokens repeat something from far back: a view of memory that needs no other model to say what matters."""

from __future__ import annotations

import numpy as np


def repeated_tokens(tokens: np.ndarray, ngram_tokens: int, beyond_tokens: int) -> np.ndarray:
    """Tokens that complete an n-gram whose last occurrence before ended more than `beyond_tokens` tokens earlier.

    Ids are compared, not hashes of them. Cost: O(n log n) sorting for each doubling of the n-gram.

    Args:
        tokens: int [n], ids of a document from its start.
        ngram_tokens: length of the n-grams.
        beyond_tokens: what a window of this many tokens still sees is no repeat.

    Returns:
        bool [n].
    """
    repeated = np.zeros(len(tokens), dtype=bool)
    if len(tokens) < ngram_tokens:
        return repeated
    names = _ngram_names(np.asarray(tokens), ngram_tokens)
    order = np.argsort(names, kind="stable")
    again = names[order[1:]] == names[order[:-1]]
    repeated[ngram_tokens - 1 + order[1:][again]] = (order[1:] - order[:-1])[again] > beyond_tokens
    return repeated


def _ngram_names(tokens: np.ndarray, ngram_tokens: int) -> np.ndarray:
    """A number for the n-gram that starts at each place, equal where they are: int64 [n - ngram_tokens + 1]."""
    names, width = _renumbered(tokens.astype(np.int64)), 1
    while width < ngram_tokens:
        # two that overlap make one whose length is no power of two
        shift = min(width, ngram_tokens - width)
        first, second = names[: len(names) - shift], names[shift:]
        names, width = _renumbered(first * (int(names.max()) + 1) + second), width + shift
    return names


def _renumbered(values: np.ndarray) -> np.ndarray:
    """Values as 0, 1, ... so that pairs of them fit into 64 bits."""
    return np.asarray(np.unique(values, return_inverse=True)[1]).reshape(-1)
