"""The moving part of the lane plan: refills of lanes in order of (step, lane), with snapshots to seek from."""

from __future__ import annotations

from bisect import bisect_right
from heapq import heapreplace
from typing import NamedTuple

from longspan.data_pipeline.mixing import Part, SourceMixer

_MOST_SNAPSHOTS = 64
_FIRST_SNAPSHOT_INTERVAL_STEPS = 256


class Held(NamedTuple):
    """A part in a lane; `position` counts tokens of the lane since step 0, `source` is an index."""

    position: int
    source: int
    part: Part

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.position + self.part.num_tokens


class Cursor:
    """All lanes with the refills of steps up to and including `step` done.

    Attributes:
        held: per lane, the parts that it holds at `step` (and perhaps some that ended before).
        mixer: where the sources stand.
    """

    def __init__(self, lanes: int, mixer: SourceMixer) -> None:
        """All lanes empty, before step 0."""
        self.step = -1
        self.mixer = mixer
        self.held: list[list[Held]] = [[] for _ in range(lanes)]
        self.free = [0] * lanes  # position where the lane's next part starts
        self.refills = [(0, lane) for lane in range(lanes)]  # heap of (step that holds this position, lane)

    def copy(self) -> Cursor:
        """An independent cursor at the same place."""
        twin = Cursor(0, self.mixer.copy())
        twin.step, twin.free, twin.refills = self.step, self.free[:], self.refills[:]
        twin.held = [held[:] for held in self.held]
        return twin


class Timeline:
    """Cursors at any step: going on by a step costs only its refills, going elsewhere starts at a snapshot."""

    def __init__(self, lanes: int, segment_tokens: int, edge_tokens: int, mixer: SourceMixer) -> None:
        """
        Args:
            lanes: rows of the global batch. segment_tokens: tokens of a lane in a step.
            edge_tokens: a part starts on a multiple of this; divides `segment_tokens`.
            mixer: hands out the parts.
        """
        self._segment_tokens = segment_tokens
        self._edge_tokens = edge_tokens
        self._cursor = Cursor(lanes, mixer)
        self._snapshots = [self._cursor.copy()]
        self._interval_steps = _FIRST_SNAPSHOT_INTERVAL_STEPS

    def at(self, step: int) -> Cursor:
        """The lanes at `step`; valid until the next call, not to be changed."""
        place = bisect_right(self._snapshots, step, key=lambda snapshot: snapshot.step) - 1
        nearest = self._snapshots[place]
        if step < self._cursor.step or nearest.step > self._cursor.step:
            self._cursor = nearest.copy()
        cursor = self._cursor
        while cursor.refills[0][0] <= step:
            cursor.step = cursor.refills[0][0] - 1
            if cursor.step >= self._snapshots[-1].step + self._interval_steps:
                self._keep_snapshot()
            self._refill(cursor)
        cursor.step = step
        return cursor

    def _refill(self, cursor: Cursor) -> None:
        step, lane = cursor.refills[0]
        begin = step * self._segment_tokens
        source, part = cursor.mixer.take()
        new = Held(cursor.free[lane], source, part)
        cursor.held[lane] = [*(held for held in cursor.held[lane] if held.end > begin), new]
        cursor.free[lane] = -(-new.end // self._edge_tokens) * self._edge_tokens
        heapreplace(cursor.refills, (cursor.free[lane] // self._segment_tokens, lane))

    def _keep_snapshot(self) -> None:
        if len(self._snapshots) >= _MOST_SNAPSHOTS:
            self._snapshots = self._snapshots[::2]
            self._interval_steps *= 2
        self._snapshots.append(self._cursor.copy())
