"""From plan and shards to batches: one rank's lanes at any step, and the state that proves a resume right."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np

from longspan.data_pipeline.batch import Batch
from longspan.data_pipeline.block import Block
from longspan.data_pipeline.buffers import Buffers
from longspan.data_pipeline.lookahead import Documents, Lookahead
from longspan.data_pipeline.open_document import OpenDocument
from longspan.data_pipeline.plan import LanePlan
from longspan.data_pipeline.plan_state import check_plan_state, plan_state
from longspan.data_pipeline.storage.store import StorageError
from longspan.errors import DataError, UsageError

# More bad documents than this share of the split end the run: beyond a few, the disk or the copy is at fault and
# training on the rest is not what was asked for. A single bad document is always tolerated.
MAX_BAD_FRACTION = 0.01

PREFETCH_STEPS = 16
_BLOCK_TOKENS = 32_768  # of a lane that are read at once, when steps are asked for one after another

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
        # only a part of what is read ahead: the rest is verified meanwhile
        self._most_steps = min(max(1, _BLOCK_TOKENS // plan.segment_tokens), 1 + prefetch_steps // 2)
        self._block: Block | None = None
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
        if self._block is None or step not in self._block.steps:
            follows = self._block is not None and step == self._block.steps.stop
            self._block = None  # its arrays are used again
            self._block = self._next_block(step, self._most_steps if follows else 1)
        return self._block.batch(step)

    def _next_block(self, step: int, count: int) -> Block:
        runs = self._ahead.runs(step, count)
        self._open = {place: document for place, document in self._open.items() if self._ahead.holds(place)}
        plan, coding = self.plan, self._documents.coding
        steps = range(step, step + count)
        block = Block(steps, self._lanes, plan.segment_tokens, plan.quantum, coding, self._buffers)
        block.fill(runs, self._read)
        return block

    def _read(self, place: int, start: int, stop: int, ids: np.ndarray, lengths: np.ndarray) -> bool:
        """Fill in tokens `start` to `stop` of a document; False if it is quarantined.

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
        with self._lock:
            if not quarantine.keys() <= self.quarantine.keys():
                self._block = None  # holds their tokens, perhaps
            self.quarantine.update(quarantine)
            self._open = {
                place: document for place, document in self._open.items() if document.entry.id not in quarantine
            }

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
