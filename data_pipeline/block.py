"""A few steps of lanes, read at once: one read of a document then serves several batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from longspan.data_pipeline.batch import Batch
from longspan.data_pipeline.buffers import Buffers
from longspan.data_pipeline.lookahead import Run
from longspan.data_pipeline.open_document import Coding
from longspan.data_pipeline.vocabulary import NO_LABEL

_LONGEST_SUM_OF_32_BITS = 2**16  # so many numbers of 16 bits; numpy adds them up several times as fast as in 64 bits

# (place of a document, start, stop, ids, lengths) -> whether the arrays hold it; otherwise they hold anything
Read = Callable[[int, int, int, np.ndarray, np.ndarray], bool]


class Block:
    """What B lanes hold in some steps, as narrow as it is stored; batches are cut from it and widened.

    Attributes:
        steps: of the plan, S of them.
    """

    def __init__(
        self, steps: range, lanes: range, segment_tokens: int, quantum: int, coding: Coding, buffers: Buffers
    ) -> None:
        """
        Args:
            steps: one after another. lanes: of the plan. segment_tokens: T, of a lane in a step. quantum: Q.
            coding: of the documents. buffers: where arrays come from.
        """
        self.steps = steps
        self._lanes, self._length, self._quantum, self._buffers = lanes, segment_tokens, quantum, buffers
        rows, length = len(lanes), len(steps) * segment_tokens
        self._ids = buffers.take((rows, length + 1), coding.dtype)  # one more: the last label
        self._lengths = buffers.take((rows, length), np.uint16)
        self._pad = coding.pad
        self._reset = np.zeros((rows, length // quantum), dtype=bool)
        self._doc_ids = np.full((rows, length // quantum), -1, dtype=np.int64)
        self._holes: list[list[tuple[int, int, int]]] = [[] for _ in steps]  # of a step: (row, start, stop), no labels

    def fill(self, runs: Iterable[Run], read: Read) -> None:
        """Read all of it; padding without labels where there is nothing or `read` says no.

        Args:
            runs: of the steps, in order of (lane, column); columns count from the first step.
        """
        filled = [0] * len(self._lanes)  # up to here a row's ids are settled
        quantum = self._quantum
        for lane, column, place, part_start, part_stop, start, stop in runs:
            row = lane - self._lanes.start
            if start == part_start:
                self._reset[row, column // quantum] = True
            with_next = min(stop + 1, part_stop)  # the token after the run, too, if the part goes on
            end = column + with_next - start - 1
            if not read(place, start, with_next, self._ids[row, column : end + 1], self._lengths[row, column:end]):
                continue
            self._leave(row, filled[row], column)
            filled[row] = end + 1
            self._doc_ids[row, column // quantum : -(-(column + stop - start) // quantum)] = place
        for row, column in enumerate(filled):
            self._leave(row, column, self._ids.shape[1])

    def batch(self, step: int) -> Batch:
        """The rows at a step, in arrays of their own."""
        number, length = step - self.steps.start, self._length
        first, quanta = number * length, length // self._quantum
        shape = (len(self._lanes), length)
        tokens, labels = self._buffers.take(shape, np.int64), self._buffers.take(shape, np.int64)
        target_bytes = self._buffers.take(shape, np.int32)
        np.copyto(tokens, self._ids[:, first : first + length])
        np.copyto(labels, self._ids[:, first + 1 : first + length + 1])
        np.copyto(target_bytes, self._lengths[:, first : first + length])
        num_valid = labels.size
        for row, start, stop in self._holes[number]:
            labels[row, start:stop] = NO_LABEL
            num_valid -= stop - start
        cut = slice(number * quanta, (number + 1) * quanta)
        return Batch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            reset=torch.from_numpy(self._reset[:, cut].copy()),
            doc_ids=torch.from_numpy(self._doc_ids[:, cut].copy()),
            target_bytes=torch.from_numpy(target_bytes),
            lane_ids=torch.from_numpy(np.arange(self._lanes.start, self._lanes.stop)),
            num_valid=num_valid,
            num_bytes=_sum(target_bytes),
        )

    def _leave(self, row: int, start: int, stop: int) -> None:
        """No document has ids in columns `start` to `stop` of a row: padding, and no label for the id before them."""
        self._ids[row, start:stop] = self._pad
        start, stop = max(start - 1, 0), min(stop, self._lengths.shape[1])
        self._lengths[row, start:stop] = 0
        length = self._length
        for number in range(start // length, -(-stop // length) if start < stop else 0):
            first = number * length
            self._holes[number].append((row, max(start - first, 0), min(stop - first, length)))


def _sum(lengths: np.ndarray) -> int:
    """Of int32 [B, T] of values that fit into 16 bits."""
    if lengths.shape[1] > _LONGEST_SUM_OF_32_BITS:
        return int(lengths.sum(dtype=np.int64))
    return int(lengths.view(np.uint32).sum(axis=1, dtype=np.uint32).sum(dtype=np.int64))
