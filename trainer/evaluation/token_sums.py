"""Sums of token losses over ranges of documents, taken on the host while the device goes on with later segments."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from longspan.trainer.evaluation.windows import Key, ScoredDocument

_SEGMENTS_BEHIND = 2  # so many are on their way while an older one is summed

Range = tuple[int, int, Key]  # target tokens [a, b), and the score that they belong to


class TokenSums:
    """Adds up the losses of targets as a document streams; memory does not grow with its length.

    A segment's losses are copied to pinned memory without waiting for the device, and summed some segments later.
    """

    def __init__(self, documents: Sequence[ScoredDocument], ranges: Mapping[int, Sequence[Range]]) -> None:
        """Args: documents; ranges: of each document that is scored, what to sum."""
        self._documents, self._ranges = documents, ranges
        self._parts: dict[Key, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        self._waiting: deque[tuple[Tensor, torch.cuda.Event | None, list[int], int]] = deque()

    def add(self, nll: Tensor, rows: Sequence[int], first: int) -> None:
        """Take the losses of a segment.

        Args:
            nll: [B, T] nats, on any device.
            rows: document of each row.
            first: target token that column 0 is the loss of.
        """
        copied, copy_event = nll, None
        if nll.device.type == "cuda":
            copied = torch.empty(nll.shape, dtype=nll.dtype, pin_memory=True)
            copied.copy_(nll, non_blocking=True)
            copy_event = torch.cuda.Event()
            copy_event.record()
        self._waiting.append((copied, copy_event, list(rows), first))
        while len(self._waiting) > _SEGMENTS_BEHIND:
            self._take()

    def finish(self) -> dict[Key, tuple[float, float]]:
        """Sum of nats of each range, and the part of its repeats."""
        while self._waiting:
            self._take()
        return {key: (math.fsum(every), math.fsum(repeats)) for key, (every, repeats) in self._parts.items()}

    def _take(self) -> None:
        copied, copy_event, rows, first = self._waiting.popleft()
        if copy_event is not None:
            copy_event.synchronize()
        values = copied.numpy()
        for row, document in zip(values, rows, strict=True):
            for start, stop, key in self._ranges.get(document, ()):
                low, high = max(start, first), min(stop, first + len(row))
                if low < high:
                    nats = row[low - first : high - first].astype(np.float64)
                    every, repeats = self._parts[key]
                    every.append(float(nats.sum()))
                    repeats.append(float(nats[self._documents[document].repeats_in(low, high)].sum()))
