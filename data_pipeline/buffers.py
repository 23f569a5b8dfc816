"""Arrays for batches, used again when nobody holds them any more.

The memory of a batch is large enough that the allocator gives it back to the system and takes it anew each time; the
page faults of that cost more than everything else in making a batch.
"""

from __future__ import annotations

import sys

import numpy as np

_MOST_KEPT = 4  # of a kind: the batch that is made, the one that is trained on, and some slack
_OWN_REFERENCES = 3  # the list's, the loop variable's and that of getrefcount itself


class Buffers:
    """A pool of arrays. Not to be shared between threads."""

    def __init__(self) -> None:
        self._kept: dict[tuple[tuple[int, ...], str], list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
        """An array of any content, to which nothing else refers: no tensor made from one given out before, no view."""
        kept = self._kept.setdefault((shape, np.dtype(dtype).str), [])
        for array in kept:
            if sys.getrefcount(array) == _OWN_REFERENCES:
                return array
        array = np.empty(shape, dtype=dtype)
        if len(kept) < _MOST_KEPT:
            kept.append(array)
        return array
