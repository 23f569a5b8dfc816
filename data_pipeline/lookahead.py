"""The plan's next steps, read ahead of their use: what tells the documents which shards are needed next."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np

from longspan.data_pipeline.entries import DocumentEntry
from longspan.data_pipeline.open_document import Coding, OpenDocument
from longspan.data_pipeline.plan import LanePlan
from longspan.data_pipeline.storage.retry import Counters

# rows of an array of runs, which are the fields of `Run`
_LANE, _COLUMN, _DOCUMENT, _PART_START, _, _START, _STOP = range(7)


class Documents(Protocol):
    """What a reader asks of documents; see `DocumentReader`.

    Attributes:
        coding: how they are stored. counters: what happened on the way to them.
    """

    coding: Coding
    counters: Counters

    def begin(self, step: int) -> None:
        """Reading goes on at this step, wherever it was."""
        ...

    def open(self, entry: DocumentEntry) -> OpenDocument:
        """The document, verified."""
        ...

    def reopen(self, entry: DocumentEntry) -> OpenDocument:
        """The document from a new copy."""
        ...

    def expect(self, entries: Iterable[DocumentEntry]) -> None:
        """These are needed next, in this order."""
        ...

    def hold(self, entries: Iterable[DocumentEntry]) -> None:
        """These are needed still, no others."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class Run(NamedTuple):
    """Tokens of one document that a lane holds.

    Attributes:
        lane: global lane. column: first token's place in the segment, or in those of several steps one after another.
        document: place in the manifest. part_start, part_stop: of the part that the lane streams.
        start, stop: token range in the document.
    """

    lane: int
    column: int
    document: int
    part_start: int
    part_stop: int
    start: int
    stop: int


class Lookahead:
    """Runs of lanes `lane_start` to `lane_stop` for a step and those after it.

    Going on asks the plan for as many steps, always forwards, so that a plan never has to seek.
    """

    def __init__(self, plan: LanePlan, documents: Documents, lane_start: int, lane_stop: int, steps: int) -> None:
        """Args: steps: how many to look ahead, from 0."""
        self._plan, self._documents = plan, documents
        self._lane_start, self._lane_stop, self._steps = lane_start, lane_stop, steps
        self._first: int | None = None
        self._window: deque[np.ndarray] = deque()  # int64 [fields of Run, runs] of each step
        self._uses: Counter[int] = Counter()  # runs in the window by document
        self._entries: dict[int, DocumentEntry] = {}

    def runs(self, step: int, count: int = 1) -> list[Run]:
        """The runs of `count` steps from `step` on, in order of (lane, column), as of one long segment.

        Those of the steps before are let go of.

        Args:
            count: from 1 to one more than it looks ahead.
        """
        changed = False
        if self._first is None or not self._first <= step < self._first + len(self._window):
            self._window = deque()
            self._uses.clear()
            self._entries.clear()
            self._documents.begin(step)
        else:
            for _ in range(step - self._first):
                changed |= self._drop(self._window.popleft())
        self._first = step
        new: list[int] = []
        while len(self._window) <= self._steps:
            ahead = self._ask(step + len(self._window))
            self._window.append(ahead)
            for document in ahead[_DOCUMENT].tolist():
                if document not in self._uses:
                    new.append(document)
                self._uses[document] += 1
        if new or changed:
            for document in new:
                self._entries[document] = self._plan.manifest.documents[document]
            self._documents.hold(self._entries.values())
            self._documents.expect(self._entries[document] for document in new)
        return list(map(Run._make, self._joined(count).T.tolist()))

    def entry(self, document: int) -> DocumentEntry:
        """The entry of a document of the window, by its place in the manifest."""
        return self._entries.get(document) or self._plan.manifest.documents[document]

    def holds(self, document: int) -> bool:
        """Whether a document is in the window."""
        return document in self._uses

    def _ask(self, step: int) -> np.ndarray:
        table, parts = self._plan.table(step, self._lane_start, self._lane_stop), self._plan.parts
        document, start, stop = parts.document[table.part], parts.start[table.part], parts.stop[table.part]
        columns = (table.lane, table.column, document, start, stop, table.start, table.stop)
        return np.concatenate(columns).reshape(len(columns), -1)

    def _joined(self, count: int) -> np.ndarray:
        """The first steps of the window; what a lane goes on with at the next step becomes one run."""
        tables = list(islice(self._window, count))
        if count == 1:
            return tables[0]
        runs = np.concatenate(tables, axis=1)
        runs[_COLUMN] += np.repeat(np.arange(count) * self._plan.segment_tokens, [table.shape[1] for table in tables])
        runs = runs[:, runs[_LANE].argsort(kind="stable")]
        before, after = runs[:, :-1], runs[:, 1:]
        goes_on = after[_START] == before[_STOP]
        for field in (_LANE, _DOCUMENT, _PART_START):
            goes_on &= after[field] == before[field]
        is_last = np.ones(runs.shape[1], dtype=bool)
        is_last[:-1] = ~goes_on
        is_first = np.roll(is_last, 1)
        joined = runs[:, is_first]
        joined[_STOP] = runs[_STOP, is_last]
        return joined

    def _drop(self, runs: np.ndarray) -> bool:
        changed = False
        for document in runs[_DOCUMENT].tolist():
            self._uses[document] -= 1
            if not self._uses[document]:
                del self._uses[document]
                self._entries.pop(document, None)
                changed = True
        return changed
