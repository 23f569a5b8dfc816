"""Some steps of a lane plan at once, as columns: what every lane holds at each of them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import cached_property
from typing import NamedTuple

import numpy as np

from longspan.data_pipeline.mixing import tokens_in_view
from longspan.data_pipeline.parts import Part
from longspan.data_pipeline.plan_snapshots import Snapshots
from longspan.data_pipeline.timeline import NO_PART, Cursor, Held, Timeline

_MOST_WINDOW_STEPS = 64
_WINDOW_PIECES = 16_384
_WALK_REFILLS = 32_768
_KEPT_WINDOWS = 4


class PieceTable(NamedTuple):
    """Pieces as columns in order of (lane, column), int64 [m]; to be read only.

    Attributes:
        lane: global lane. column: first token's place in the segment.
        part: index into the plan's parts. start, stop: token range in the document.
    """

    lane: np.ndarray
    column: np.ndarray
    part: np.ndarray
    start: np.ndarray
    stop: np.ndarray


class Standing(NamedTuple):
    """Where a plan stands at a step: its lanes filled, none of it read.

    Attributes:
        taken: parts handed out, per sequence. assigned: tokens of them; unread: those not read before the step;
        hidden: those that mixing does not count yet; all per source.
    """

    taken: list[int]
    assigned: list[int]
    unread: list[int]
    hidden: list[int]


class Window:
    """The pieces of steps `start` to `stop`, made at once.

    Attributes:
        after: the lanes before `stop`.
    """

    def __init__(self, timeline: Timeline, before: Cursor, stop: int) -> None:
        """Args: timeline: of the plan; before: the lanes before the first step; stop: step after the last."""
        self.start, self.stop = before.step, stop
        self._before, self._timeline = before, timeline
        self.after, self._refills = timeline.advance(before, stop)
        self._held = before.held.where(before.held.sequence != NO_PART).followed_by(self._refills)
        self._cut(self._held)

    @property
    def num_refills(self) -> int:
        """Parts that lanes take in these steps."""
        return len(self._refills.lane)

    @cached_property
    def parts(self) -> dict[int, Part]:
        """The parts that lanes hold in these steps, by index into the plan's parts."""
        table = self._timeline.supply.parts
        return {index: table.part(index) for index in np.unique(self._columns[2]).tolist()}

    def pieces(self, step: int, lane_start: int, lane_stop: int) -> PieceTable:
        """What lanes `lane_start` to `lane_stop` hold at `step`."""
        row = (step - self.start) * self._timeline.lanes
        first, last = self._bounds[row + lane_start], self._bounds[row + lane_stop]
        return PieceTable(*(column[first:last] for column in self._columns))

    def standing(self, step: int) -> Standing:
        """Where the plan stands at `step`."""
        size, sources = self._timeline.segment_tokens, len(self._before.assigned)
        steps = self._refills.position // size
        done = int(steps.searchsorted(step, side="right"))
        refills = self._refills.where(np.arange(done))
        held = self._held.where(np.arange(len(self._held.lane) - len(steps) + done))
        held = held.where(held.end > step * size)
        supply = self._timeline.supply
        taken = np.bincount(refills.sequence, minlength=len(self._before.taken)) + np.array(self._before.taken)
        source = supply.source_of(refills)
        more = [int(refills.length[source == index].sum()) for index in range(sources)]
        source = supply.source_of(held)
        unread = held.end - np.maximum(step * size, held.position)
        return Standing(
            taken=[int(number) for number in taken],
            assigned=[was + new for was, new in zip(self._before.assigned, more, strict=True)],
            unread=[int(unread[source == index].sum()) for index in range(sources)],
            hidden=tokens_in_view(source, held.position, held.length, step, size, sources),
        )

    def _cut(self, held: Held) -> None:
        """Cut what the lanes hold at the edges of steps, and sort it by (step, lane, column)."""
        timeline, size = self._timeline, self._timeline.segment_tokens
        begin, end = np.maximum(held.position, self.start * size), np.minimum(held.end, self.stop * size)
        held, begin, end = held.where(begin < end), begin[begin < end], end[begin < end]
        steps = (end - 1) // size - begin // size + 1
        row = np.repeat(np.arange(len(steps)), steps)
        step = np.arange(len(row)) - np.repeat(np.cumsum(steps) - steps - begin // size, steps)
        lane = held.lane[row]
        key = (step - self.start) * timeline.lanes + lane
        order = key.argsort(kind="stable")  # of one lane, what it took first stays first
        row, step, lane = row[order], step[order], lane[order]
        first = np.maximum(begin[row], step * size)
        last = np.minimum(end[row], (step + 1) * size)
        part = timeline.supply.parts_of(held)
        shift = (timeline.supply.parts.start[part] - held.position)[row]
        self._columns = (lane, first - step * size, part[row], first + shift, last + shift)
        self._bounds = key[order].searchsorted(np.arange((self.stop - self.start) * timeline.lanes + 1)).tolist()


class Windows:
    """The window of any step. Going on costs only the refills in between, going elsewhere starts at a snapshot.

    May be used from several threads.
    """

    def __init__(self, timeline: Timeline, snapshots: Snapshots, mean_tokens: float) -> None:
        """Args: timeline: of the plan; snapshots: with its first cursor; mean_tokens: of a part."""
        self._timeline, self._snapshots = timeline, snapshots
        refills = timeline.lanes * timeline.segment_tokens / mean_tokens  # a step
        self._window_steps = int(max(1, min(_MOST_WINDOW_STEPS, _WINDOW_PIECES // (timeline.lanes + refills))))
        self._walk_steps = int(max(1, _WALK_REFILLS // max(1.0, refills)))
        self._windows: OrderedDict[int, Window] = OrderedDict()
        self._lock = threading.Lock()

    def at(self, step: int) -> Window:
        """The window that holds `step`."""
        start = step // self._window_steps * self._window_steps
        with self._lock:
            window = self._windows.get(start)
            if window is None:
                window = Window(self._timeline, self._seek(start), start + self._window_steps)
                self._snapshots.offer(window.after, window.num_refills)
                self._snapshots.save()
                while len(self._windows) >= _KEPT_WINDOWS:
                    self._windows.popitem(last=False)
                self._windows[start] = window
            self._windows.move_to_end(start)
            return window

    def before(self, step: int) -> Cursor:
        """The lanes before `step`, with its own refills not done."""
        with self._lock:
            return self._seek(step)

    def end(self) -> int:
        """The first step at which no lane holds anything, of a plan that ends."""
        with self._lock:
            cursor = self._snapshots.nearest(0)
            while self._timeline.remaining(cursor):
                cursor = self._walk(cursor, cursor.step + self._walk_steps)
            return int(-(-cursor.held.end.max() // self._timeline.segment_tokens))

    def _seek(self, step: int) -> Cursor:
        known = [self._snapshots.nearest(step), *(window.after for window in self._windows.values())]
        cursor = max((cursor for cursor in known if cursor.step <= step), key=lambda cursor: cursor.step)
        while cursor.step < step:
            cursor = self._walk(cursor, min(step, cursor.step + self._walk_steps))
        return cursor

    def _walk(self, cursor: Cursor, step: int) -> Cursor:
        cursor, refills = self._timeline.advance(cursor, step)
        self._snapshots.offer(cursor, len(refills.lane))
        return cursor
