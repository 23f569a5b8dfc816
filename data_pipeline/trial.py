"""The next source where documents are long, by trying what follows from each choice.

A document of megabytes keeps its lane for hundreds of steps; whether the shares come out right is decided by which
lanes fall free meanwhile and how long the next documents are. All of that is known: the plan is a function of
lengths. So each promising source is tried: the next refills are walked, once by least squares as `Credit` has them and
once all from this source, and the source that leaves the smallest squared deficits over the steps walked is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapreplace
from typing import NamedTuple

from longspan.data_pipeline.mixing import Credit, deficits
from longspan.data_pipeline.parts import PartSequence

# A part is tried only while it is more than this share of all tokens that count: later it cannot do harm any more.
# So of a plan's refills only some hundreds to thousands are trials, whatever its length.
TRIED_SHARE = 256
_MOST_CANDIDATES = 4
_MOST_REFILLS = 32
_MOST_STEPS = 64
_TIMES = 8
_LENGTHS_AT_ONCE = 4096


class Grid(NamedTuple):
    """How places in lanes are counted: by edges, on which parts start.

    One number, `due`, is the next free edge of a lane: it sorts by step, then lane, and carries the place within the
    step: due = (step * lanes + lane) * edges + edge.

    Attributes:
        lanes: rows of the global batch. edges: of a lane in a step. edge_tokens: between two edges.
    """

    lanes: int
    edges: int
    edge_tokens: int

    @property
    def span(self) -> int:
        """Of `due` from a step to the next."""
        return self.lanes * self.edges

    def after(self, due: int, cost: int) -> int:
        """The due of the same lane `cost` edges later."""
        return due + cost + (due % self.edges + cost) // self.edges * (self.span - self.edges)

    def position(self, due: int) -> int:
        """In tokens of the lane since step 0."""
        return (due // self.span * self.edges + due % self.edges) * self.edge_tokens


class Upcoming:
    """The parts of a sequence after the first `taken`, to look at before they are taken."""

    def __init__(self, sequence: PartSequence, taken: int, edge_tokens: int) -> None:
        """Args: edge_tokens: a part costs whole edges of a lane."""
        self._sequence, self._taken, self._edge_tokens = sequence, taken, edge_tokens
        self._rows: list[tuple[int, int]] = []
        self._at = 0

    def peek(self, ahead: int = 0) -> tuple[int, int]:
        """(tokens, edges of the lane) of the part that is `ahead` parts away.

        Raises:
            LookupError: there is none, of a sequence that ends.
        """
        try:
            return self._rows[self._at + ahead]
        except IndexError:
            self._load(ahead)
        return self._rows[ahead]

    def take(self) -> tuple[int, int]:
        """(tokens, edges of the lane) of the next part, and go on to the one after; LookupError if there is none."""
        row = self.peek()
        self._at += 1
        return row

    def _load(self, ahead: int) -> None:
        del self._rows[: self._at]
        self._at = 0
        while ahead >= len(self._rows):
            lengths = self._sequence.lengths(self._taken, _LENGTHS_AT_ONCE)
            if not len(lengths):
                return
            self._taken += len(lengths)
            costs = -(-lengths // self._edge_tokens)
            self._rows += zip(lengths.tolist(), costs.tolist(), strict=True)


class Mixer:
    """Chooses the source of each refill in a walk over steps and lanes."""

    def __init__(
        self,
        weights: list[int],
        grid: Grid,
        step: int,
        assigned: Sequence[int],
        held: Sequence[tuple[int, int, int, int]],
        heap: list[int],
        queues: list[Upcoming],
        longest: int,
    ) -> None:
        """
        Args:
            weights: integers, one a source. grid: of the lanes. step: now.
            assigned: tokens handed out per source, all parts whole.
            held: (lane, source, position, tokens) of the parts that are in lanes.
            heap: dues of all lanes; the walk keeps it up to date. queues: what is next, one a source.
            longest: tokens of the longest part of all.
        """
        self._weights, self._grid, self._heap, self._queues = weights, grid, heap, queues
        self._span, self._edges, self._edge_tokens = grid.span, grid.edges, grid.edge_tokens
        self._segment_tokens = grid.edges * grid.edge_tokens
        self._credit = Credit(weights, self._segment_tokens, step, assigned, [row[1:] for row in held])
        self._candidates = self._credit.candidates
        self._places = {index: place for place, index in enumerate(self._candidates)}
        self._lengths = [queues[index].peek()[0] for index in self._candidates]
        self._last_trial = TRIED_SHARE * longest
        self._may_try = self._credit.total(step) < self._last_trial
        self._assigned = list(assigned)
        self._in_lane = {lane: (source, position, position + tokens) for lane, source, position, tokens in held}
        self._new: list[tuple[int, int, int]] = []  # taken since these were brought up to date: (due, source, tokens)

    def give(self, due: int, source: int, tokens: int) -> None:
        """The lane that is due takes a part of `source` that was not chosen here."""
        self._credit.add(source, due // self._span, due % self._edges * self._edge_tokens, tokens)
        self._new.append((due, source, tokens))

    def take(self, due: int) -> tuple[int, int, int]:
        """What the lane that is due takes next: (source, tokens, edges of the lane)."""
        step, offset = due // self._span, due % self._edges * self._edge_tokens
        if self._may_try and self._is_worth_a_trial(step):
            source = self._best(due, sorted(self._credit.ranked(step, offset, self._lengths)[:_MOST_CANDIDATES]))
        else:
            source = self._credit.next_source(step, offset, self._lengths)
        tokens, cost = self._queues[source].take()
        self._lengths[self._places[source]] = self._queues[source].peek()[0]
        self._credit.add(source, step, offset, tokens)
        if self._may_try:
            self._new.append((due, source, tokens))
        return source, tokens, cost

    def _is_worth_a_trial(self, step: int) -> bool:
        total, longest = self._credit.total(step), max(self._lengths)
        self._may_try = total < self._last_trial
        return longest > self._credit.ahead and total < TRIED_SHARE * longest

    def _best(self, due: int, choices: list[int]) -> int:
        """Of the choices, the one after which deficits are smallest; ties by order."""
        step = due // self._grid.span
        tried = [self._try(due, choice, keep) for choice in choices for keep in (False, True)]
        # Only as far as each of them was walked: a lane that is free and not filled would say nothing.
        end = max(step + 1, min(free for free, _ in tried))
        times = [step - (step - end) * number // _TIMES for number in range(1, _TIMES + 1)]
        squares = [0] * len(tried)
        read = self._read(times)
        for place, (_, parts) in enumerate(tried):
            for time, before in zip(times, read, strict=True):
                counted = before[:]
                now = time * self._segment_tokens
                for source, position, tokens in parts:
                    if now > position:
                        counted[source] += min(now - position, tokens)
                behind = deficits(self._weights, counted)
                squares[place] += sum([behind[index] ** 2 for index in self._candidates])
        return choices[squares.index(min(squares)) // 2]

    def _try(self, due: int, choice: int, keep: bool) -> tuple[int, list[tuple[int, int, int]]]:
        """The step of the first refill that was not walked, and (source, position, tokens) of those that were.

        Args:
            keep: whether all refills are of `choice`, and not only the first.
        """
        grid, credit, heap = self._grid, self._credit.copy(), self._heap[:]
        queues, ahead = self._queues, [0] * len(self._queues)
        last = due + _MOST_STEPS * grid.span
        parts: list[tuple[int, int, int]] = []
        while len(parts) < _MOST_REFILLS and (due := heap[0]) < last:
            step, offset = due // grid.span, due % grid.edges * grid.edge_tokens
            if parts and not keep:
                lengths = [queues[index].peek(ahead[index])[0] for index in self._candidates]
                choice = credit.next_source(step, offset, lengths)
            tokens, cost = queues[choice].peek(ahead[choice])
            ahead[choice] += 1
            credit.add(choice, step, offset, tokens)
            parts.append((choice, grid.position(due), tokens))
            heapreplace(heap, grid.after(due, cost))
        return heap[0] // grid.span, parts

    def _read(self, steps: list[int]) -> list[list[int]]:
        """Tokens of each source that are read before each of these steps, of parts that lanes have taken already."""
        grid = self._grid
        for due, source, tokens in self._new:
            position = grid.position(due)
            self._in_lane[due // grid.edges % grid.lanes] = (source, position, position + tokens)
            self._assigned[source] += tokens
        self._new.clear()
        read = [self._assigned[:] for _ in steps]
        for step, counted in zip(steps, read, strict=True):
            now = step * self._segment_tokens
            for source, position, end in self._in_lane.values():
                if end > now:
                    counted[source] -= end - max(now, position)
        return read
