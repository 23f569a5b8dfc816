"""From plan and shards to batches: one rank's lanes at any step, and the state that proves a resume right."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

import numpy as np
import torch

from longspan.data_pipeline.batch import Batch
from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.plan import LanePlan, Piece
from longspan.data_pipeline.vocabulary import NO_LABEL, PAD, ByteVocabulary
from longspan.errors import DataError, UsageError

# More bad documents than this share of the split end the run: beyond a few, the disk or the copy is at fault and
# training on the rest is not what was asked for. A single bad document is always tolerated.
MAX_BAD_FRACTION = 0.01

STATE_VERSION = 1
_LOGGER = logging.getLogger("longspan.data")


class LaneReader:
    """Batches of lanes `lane_start` to `lane_stop` of a plan.

    A document that does not verify is quarantined: its place in the plan is kept and filled with padding without
    loss, so that no other lane moves.
    """

    def __init__(
        self,
        plan: LanePlan,
        documents: DocumentReader,
        lane_start: int,
        lane_stop: int,
        *,
        max_bad_fraction: float = MAX_BAD_FRACTION,
    ) -> None:
        """
        Args:
            plan: of the run. documents: of the same manifest.
            lane_start, lane_stop: this rank's lanes of the plan's.
            max_bad_fraction: share of the split's documents above which bad ones end the run.

        Raises:
            UsageError: the lanes are not among the plan's.
        """
        if not 0 <= lane_start < lane_stop <= plan.lanes:
            raise UsageError(f"lanes {lane_start} to {lane_stop} are not within the plan's {plan.lanes} lanes.")
        self.plan = plan
        self.quarantine: dict[str, str] = {}
        self._documents = documents
        self._lanes = range(lane_start, lane_stop)
        self._max_bad = max(1, int(max_bad_fraction * len(plan.manifest.split(plan.split))))

    def batch(self, step: int) -> Batch:
        """The lanes' rows at `step`, counted from 0; the same whenever and wherever it is asked for.

        Raises:
            DataError: too many documents are bad.
        """
        rows, length, quantum = len(self._lanes), self.plan.segment_tokens, self.plan.quantum
        tokens = np.full((rows, length), PAD, dtype=np.int64)
        labels = np.full((rows, length), NO_LABEL, dtype=np.int64)
        reset = np.zeros((rows, length // quantum), dtype=bool)
        doc_ids = np.full((rows, length // quantum), -1, dtype=np.int64)
        for piece in self.plan.pieces(step, self._lanes.start, self._lanes.stop):
            row, column, size = piece.lane - self._lanes.start, piece.column, piece.stop - piece.start
            if piece.start == piece.part.start:
                reset[row, column // quantum] = True
            ids = self._read(piece)
            if ids is None:
                continue
            tokens[row, column : column + size] = ids[:size]
            labels[row, column : column + len(ids) - 1] = ids[1:]
            doc_ids[row, column // quantum : -(-(column + size) // quantum)] = piece.part.document
        target_bytes = ByteVocabulary.target_bytes(labels)
        return Batch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            reset=torch.from_numpy(reset),
            doc_ids=torch.from_numpy(doc_ids),
            target_bytes=torch.from_numpy(target_bytes),
            lane_ids=torch.arange(self._lanes.start, self._lanes.stop),
            num_valid=int(np.count_nonzero(labels != NO_LABEL)),
            num_bytes=int(target_bytes.sum()),
        )

    def _read(self, piece: Piece) -> np.ndarray | None:
        """The piece's tokens and the one after them if the part goes on; None if the document is quarantined."""
        entry = self.plan.manifest.documents[piece.part.document]
        if entry.id in self.quarantine:
            return None
        try:
            return self._documents.token_range(entry, piece.start, min(piece.stop + 1, piece.part.stop))
        except DataError as error:
            self._quarantine(entry.id, str(error))
            return None

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

    def state(self, next_step: int) -> dict[str, Any]:
        """Where reading stands before `next_step`, JSON-able; the same on all ranks but for `quarantine`.

        `lanes` could be computed from `step`; it is there so that a resume can prove that it goes on in the same
        place. Deficits are integers, in tokens times the sum of weights.
        """
        plan, progress = self.plan, self.plan.progress(next_step)
        state = {
            "version": STATE_VERSION,
            "plan": plan.description(),
            "step": next_step,
            "tokens_seen": dict(zip(plan.sources, progress.tokens, strict=True)),
            "source_epoch": dict(zip(plan.sources, progress.epochs, strict=True)),
            "source_pos": dict(zip(plan.sources, progress.positions, strict=True)),
            "deficit": dict(zip(plan.sources, progress.deficits, strict=True)),
            "lanes": self._lane_positions(next_step),
            "quarantine": sorted([name, reason] for name, reason in self.quarantine.items()),
        }
        return {**state, "digest": _digest(state)}

    def check_state(self, state: dict[str, Any]) -> None:
        """Compare a saved state with this plan, and take over its quarantine.

        Raises:
            UsageError: it was saved under other settings or with another corpus; names all that differ.
            DataError: it is damaged, or its lanes are not where this plan has them; names the first such lane.
        """
        if state.get("version") != STATE_VERSION:
            raise UsageError(f"data state version {state.get('version')}; this version reads {STATE_VERSION}.")
        if _digest(state) != state.get("digest"):
            raise DataError("the saved data state does not match its digest. Resume from another checkpoint.")
        saved, own = state["plan"], self.plan.description()
        differing = [
            f"{name}: {saved.get(name)} saved, {own[name]} now" for name in own if saved.get(name) != own[name]
        ]
        if differing:
            listed = "\n  ".join(differing)
            raise UsageError(
                f"the checkpoint was written with other data settings:\n  {listed}\n"
                f"Set them back to resume, or start a new run with --init-from."
            )
        mine = json.loads(json.dumps(self._lane_positions(state["step"])))
        for lane, (theirs, ours) in enumerate(zip(state["lanes"], mine, strict=True)):
            if theirs != ours:
                raise DataError(f"lane {lane} at step {state['step']}: saved {theirs}, the plan says {ours}.")
        self.adopt_quarantine(dict(state["quarantine"]))

    def _lane_positions(self, step: int) -> list[dict[str, Any]]:
        """For all lanes of the plan, the document that each one's segment of `step` begins with."""
        documents = self.plan.manifest.documents
        first: dict[int, Piece] = {}
        for piece in self.plan.pieces(step, 0, self.plan.lanes):
            first.setdefault(piece.lane, piece)
        return [
            {
                "doc_id": documents[piece.part.document].id,
                "part": piece.part.number,
                "offset": piece.start,
                "sha256": documents[piece.part.document].sha256[:16],
            }
            for _, piece in sorted(first.items())
        ]


def _digest(state: dict[str, Any]) -> str:
    rest = {key: value for key, value in state.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
