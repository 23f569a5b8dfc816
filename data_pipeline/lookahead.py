"""The plan's next steps, read ahead of their use: what tells the documents which shards are needed next."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from longspan.data_pipeline.entries import DocumentEntry
from longspan.data_pipeline.open_document import Coding, OpenDocument
from longspan.data_pipeline.plan import LanePlan
from longspan.data_pipeline.storage.retry import Counters


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
    """Tokens of one document that a lane's segment holds.

    Attributes:
        lane: global lane. column: first token's place in the segment. document: place in the manifest.
        part_start, part_stop: of the part that the lane streams. start, stop: token range in the document.
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

    Going on by a step asks the plan for one step only, always forwards, so that a plan never has to seek.
    """

    def __init__(self, plan: LanePlan, documents: Documents, lane_start: int, lane_stop: int, steps: int) -> None:
        """Args: steps: how many to look ahead, from 0."""
        self._plan, self._documents = plan, documents
        self._lane_start, self._lane_stop, self._steps = lane_start, lane_stop, steps
        self._first: int | None = None
        self._window: deque[list[Run]] = deque()
        self._uses: Counter[int] = Counter()  # runs in the window by document
        self._entries: dict[int, DocumentEntry] = {}

    def runs(self, step: int) -> list[Run]:
        """The runs of `step`, in order of (lane, column); those of the steps before it are let go of."""
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
            for run in ahead:
                if run.document not in self._uses:
                    new.append(run.document)
                self._uses[run.document] += 1
        if new or changed:
            for document in new:
                self._entries[document] = self._plan.manifest.documents[document]
            self._documents.hold(self._entries.values())
            self._documents.expect(self._entries[document] for document in new)
        return self._window[0]

    def entry(self, document: int) -> DocumentEntry:
        """The entry of a document of the window, by its place in the manifest."""
        return self._entries.get(document) or self._plan.manifest.documents[document]

    def holds(self, document: int) -> bool:
        """Whether a document is in the window."""
        return document in self._uses

    def _ask(self, step: int) -> list[Run]:
        table, parts = self._plan.table(step, self._lane_start, self._lane_stop), self._plan.parts
        columns = (
            table.lane,
            table.column,
            parts.document[table.part],
            parts.start[table.part],
            parts.stop[table.part],
            table.start,
            table.stop,
        )
        return [Run(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def _drop(self, runs: list[Run]) -> bool:
        changed = False
        for run in runs:
            self._uses[run.document] -= 1
            if not self._uses[run.document]:
                del self._uses[run.document]
                self._entries.pop(run.document, None)
                changed = True
        return changed
