"""From plan and shards to batches: one rank's lanes at any step, and the state that proves a resume right."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
import torch

from longspan.data_pipeline.batch import Batch
from longspan.data_pipeline.buffers import Buffers
from longspan.data_pipeline.lookahead import Documents, Lookahead
from longspan.data_pipeline.open_document import OpenDocument
from longspan.data_pipeline.plan import LanePlan
from longspan.data_pipeline.plan_state import check_plan_state, plan_state
from longspan.data_pipeline.storage.store import StorageError
from longspan.data_pipeline.vocabulary import NO_LABEL
from longspan.errors import DataError, UsageError

# More bad documents than this share of the split end the run: beyond a few, the disk or the copy is at fault and
# training on the rest is not what was asked for. A single bad document is always tolerated.
MAX_BAD_FRACTION = 0.01

PREFETCH_STEPS = 16

_LOGGER = logging.getLogger("longspan.data")


class LaneReader:
    """Batches of lanes `lane_start` to `lane_stop` of a plan.

    A document that does not verify is quarantined: its place in the plan is kept and filled with padding without
    loss, so that no other lane moves. A store that does not answer is another matter: it ends the run, and nothing of
    the data is lost.
    """

    def __init__(
        self,
        plan: LanePlan,
        documents: Documents,
        lane_start: int,
        lane_stop: int,
        *,
        max_bad_fraction: float = MAX_BAD_FRACTION,
        prefetch_steps: int = PREFETCH_STEPS,
    ) -> None:
        """
        Args:
            plan: of the run. documents: of the same manifest.
            lane_start, lane_stop: this rank's lanes of the plan's.
            max_bad_fraction: share of the split's documents above which bad ones end the run.
            prefetch_steps: how many steps ahead of their use documents are fetched and verified.

        Raises:
            UsageError: the lanes are not among the plan's.
        """
        if not 0 <= lane_start < lane_stop <= plan.lanes:
            raise UsageError(f"lanes {lane_start} to {lane_stop} are not within the plan's {plan.lanes} lanes.")
        self.plan = plan
        self.quarantine: dict[str, str] = {}
        self._documents = documents
        self._lanes = range(lane_start, lane_stop)
        self._max_bad = max(1, int(max_bad_fraction * len(plan.manifest.places(plan.split))))
        self._ahead = Lookahead(plan, documents, lane_start, lane_stop, prefetch_steps)
        self._open: dict[int, OpenDocument] = {}
        self._buffers = Buffers()
        self._lock = threading.Lock()

    def batch(self, step: int) -> Batch:
        """The lanes' rows at `step`, counted from 0; the same whenever and wherever it is asked for.

        Raises:
            DataError: too many documents are bad. StorageError: a store does not answer.
        """
        with self._lock:
            return self._batch(step)

    def _batch(self, step: int) -> Batch:
        rows, length, quantum, first = len(self._lanes), self.plan.segment_tokens, self.plan.quantum, self._lanes.start
        coding = self._documents.coding
        ids = self._buffers.take((rows, length + 1), coding.dtype)  # one more: the last label
        lengths = self._buffers.take((rows, length), np.uint16)
        ids.fill(coding.pad)
        lengths.fill(0)
        reset = np.zeros((rows, length // quantum), dtype=bool)
        doc_ids = np.full((rows, length // quantum), -1, dtype=np.int64)
        labelled = [0] * rows  # up to here a row's labels are settled
        holes: list[tuple[int, int, int]] = []
        num_valid = 0
        runs = self._ahead.runs(step)
        self._open = {place: document for place, document in self._open.items() if self._ahead.holds(place)}
        for lane, column, place, part_start, part_stop, start, stop in runs:
            row = lane - first
            if start == part_start:
                reset[row, column // quantum] = True
            with_next = min(stop + 1, part_stop)  # the token after the run, too, if the part goes on
            end = column + with_next - start - 1
            if not self._read(place, start, with_next, ids[row, column : end + 1], lengths[row, column:end]):
                continue
            if labelled[row] < column:
                holes.append((row, labelled[row], column))
            labelled[row] = end
            num_valid += end - column
            doc_ids[row, column // quantum : -(-(column + stop - start) // quantum)] = place
        holes += [(row, end, length) for row, end in enumerate(labelled) if end < length]
        return self._tensors(ids, lengths, reset, doc_ids, holes, num_valid)

    def _tensors(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        reset: np.ndarray,
        doc_ids: np.ndarray,
        holes: list[tuple[int, int, int]],
        num_valid: int,
    ) -> Batch:
        """Widen and shift; `holes` are (row, start, stop) without labels."""
        tokens = self._buffers.take(lengths.shape, np.int64)
        labels = self._buffers.take(lengths.shape, np.int64)
        target_bytes = self._buffers.take(lengths.shape, np.int32)
        # twice as fast in 32 bits, which hold the sum of a row of up to 2^16 numbers of 16 bits
        sum_dtype = np.uint32 if lengths.shape[1] <= 2**16 else np.int64
        np.copyto(tokens, ids[:, :-1])
        np.copyto(labels, ids[:, 1:])
        np.copyto(target_bytes, lengths)
        for row, start, stop in holes:
            labels[row, start:stop] = NO_LABEL
        return Batch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            reset=torch.from_numpy(reset),
            doc_ids=torch.from_numpy(doc_ids),
            target_bytes=torch.from_numpy(target_bytes),
            lane_ids=torch.arange(self._lanes.start, self._lanes.stop),
            num_valid=num_valid,
            num_bytes=int(lengths.sum(axis=1, dtype=sum_dtype).sum(dtype=np.int64)),
        )

    def _read(self, place: int, start: int, stop: int, ids: np.ndarray, lengths: np.ndarray) -> bool:
        """Fill in tokens `start` to `stop` of a document; False, and padding, if it is quarantined.

        Args:
            place: of the document in the manifest.
            ids: coding.dtype [stop - start]. lengths: of the labels, uint16 [stop - start - 1].

        Raises:
            DataError: too many documents are bad. StorageError: a store does not answer.
        """
        document = self._open.get(place)
        entry = self._ahead.entry(place) if document is None else document.entry
        try:
            if document is None:
                if entry.id in self.quarantine:
                    return False
                document = self._documents.open(entry)
            try:
                document.read_into(start, stop, ids, lengths)
            except DataError as error:
                _LOGGER.warning("reading again: %s", error)
                document = self._documents.reopen(entry)
                document.read_into(start, stop, ids, lengths)
        except StorageError:
            raise
        except DataError as error:
            ids.fill(self._documents.coding.pad)
            lengths.fill(0)
            self._open.pop(place, None)
            self._quarantine(entry.id, str(error))
            return False
        self._open[place] = document
        return True

    def _quarantine(self, document_id: str, reason: str) -> None:
        self.quarantine[document_id] = reason
        count = len(self.quarantine)
        _LOGGER.warning("quarantined document %s (%d so far): %s", document_id, count, reason)
        if count > self._max_bad:
            raise DataError(
                f"{count} documents are bad, {self._max_bad} are tolerated: {', '.join(sorted(self.quarantine))}. "
                f"Last: {reason}"
            )

    def adopt_quarantine(self, quarantine: dict[str, str]) -> None:
        """Take over documents that another rank or an earlier process found bad: {document id: reason}."""
        self.quarantine.update(quarantine)
        self._open = {place: document for place, document in self._open.items() if document.entry.id not in quarantine}

    def state(self, next_step: int) -> dict[str, Any]:
        """Where reading stands before `next_step`, JSON-able; the same on all ranks but for `quarantine`.

        See `plan_state`.
        """
        return plan_state(self.plan, next_step, self.quarantine)

    def check_state(self, state: dict[str, Any]) -> None:
        """Compare a saved state with this plan, and take over its quarantine.

        Raises:
            UsageError: it was saved under other settings or with another corpus; names all that differ.
            DataError: it is damaged, or its lanes are not where this plan has them; names the first such lane.
        """
        self.adopt_quarantine(check_plan_state(self.plan, state))
