"""The moving part of the lane plan: refills of lanes in order of (step, lane)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from heapq import heapify, heapreplace

import numpy as np

from longspan.data_pipeline.parts import PartSequence, PartTable
from longspan.data_pipeline.trial import Grid, Mixer, Upcoming

NO_PART = -1
_LENGTHS_AT_ONCE = 4096
# Waves of numpy calls pay off from this many refills a wave on; they are tried again every so often.
_TRIED_WAVES = 32
_WORTHWHILE_WAVE = 12
_FEWEST_LANES_FOR_WAVES = 32


@dataclass
class Held:
    """Parts in lanes, as columns of int64 [m].

    Attributes:
        lane: which holds it. sequence, ordinal: which part it is: place in one of `Supply.sequences`; NO_PART: none.
        position: of its first token, in tokens of the lane since step 0. length: its tokens.
    """

    lane: np.ndarray
    sequence: np.ndarray
    ordinal: np.ndarray
    position: np.ndarray
    length: np.ndarray

    def where(self, mask: np.ndarray) -> Held:
        """The rows of a boolean mask or index array."""
        return Held(self.lane[mask], self.sequence[mask], self.ordinal[mask], self.position[mask], self.length[mask])

    def followed_by(self, other: Held) -> Held:
        """These rows, then those of `other`."""
        columns = ("lane", "sequence", "ordinal", "position", "length")
        return Held(*(np.concatenate([getattr(self, name), getattr(other, name)]) for name in columns))

    @property
    def end(self) -> np.ndarray:
        """Position after the last token: int64 [m]."""
        return self.position + self.length


@dataclass
class Cursor:
    """All lanes before `step`: the refills of earlier steps are done, its own are not. Never changed in place.

    Attributes:
        taken: parts handed out, per sequence. assigned: tokens of them, per source.
        held: the part that each lane took last, a row a lane.
    """

    step: int
    taken: tuple[int, ...]
    assigned: tuple[int, ...]
    held: Held


class Supply:
    """What lanes take parts from: an optional first sequence that goes before all, then sources mixed by weights.

    Attributes:
        parts: the columns. sequences: one a source in order of `parts.sources`, and perhaps `first` after them.
        weights: integers, one a source.
    """

    def __init__(
        self, parts: PartTable, sequences: list[PartSequence], weights: list[int], first: PartSequence | None = None
    ) -> None:
        """Args: as the attributes; a single finite sequence of all sources' parts takes the place of the sources'."""
        self.parts, self.weights = parts, weights
        self.sequences = sequences if first is None else [*sequences, first]
        self.first = None if first is None else len(sequences)
        self.is_mixed = len(sequences) == len(weights) and sum(weight > 0 for weight in weights) > 1
        self.only = 0 if len(sequences) != len(weights) else next(i for i, weight in enumerate(weights) if weight)

    def source_of(self, held: Held) -> np.ndarray:
        """Index of the source of each part, -1 for none: int64 [m]."""
        source = held.sequence.copy()
        for index, sequence in enumerate(self.sequences):
            if sequence.is_finite:
                here = held.sequence == index
                source[here] = self.parts.source[sequence.parts(held.ordinal[here])]
        return source

    def sources_of_first(self, taken: int) -> list[int]:
        """Index of the source of each part of `first` after the first `taken`; none without such a sequence."""
        if self.first is None:
            return []
        first = self.sequences[self.first]
        sources: list[int] = self.parts.source[first.parts(np.arange(taken, first.size))].tolist()
        return sources

    def parts_of(self, held: Held) -> np.ndarray:
        """Index into `parts` of each part: int64 [m]; every row holds one."""
        indices = np.empty(len(held.lane), dtype=np.int64)
        for index, sequence in enumerate(self.sequences):
            here = held.sequence == index
            indices[here] = sequence.parts(held.ordinal[here])
        return indices


class Timeline:
    """Refills lanes from a supply; the state is in the cursors."""

    def __init__(self, supply: Supply, lanes: int, segment_tokens: int, edge_tokens: int) -> None:
        """
        Args:
            supply: of parts. lanes: rows of the global batch. segment_tokens: tokens of a lane in a step.
            edge_tokens: a part starts on a multiple of this; divides `segment_tokens`.
        """
        self.supply, self.lanes, self.segment_tokens = supply, lanes, segment_tokens
        self._edge_tokens = edge_tokens
        self._edges = segment_tokens // edge_tokens
        self._longest = int(supply.parts.num_tokens.max(initial=0))

    def start(self) -> Cursor:
        """All lanes empty, before step 0."""
        zeros = np.zeros(self.lanes, dtype=np.int64)
        held = Held(np.arange(self.lanes), zeros + NO_PART, zeros, zeros, zeros)
        return Cursor(0, (0,) * len(self.supply.sequences), (0,) * len(self.supply.weights), held)

    def remaining(self, cursor: Cursor) -> int | None:
        """Parts that are left to take; None if they never end."""
        return self.supply.sequences[self.supply.only].remaining(cursor.taken[self.supply.only])

    def advance(self, cursor: Cursor, step: int) -> tuple[Cursor, Held]:
        """The lanes before `step`, not before the cursor's, and what they took on the way, in order.

        Cost on one CPU core: about 0.1 us a refill in waves of lanes, if documents are of like length; 0.7 us if they
        are not or lanes are few; 2.5 us if sources are mixed.
        """
        refills = self._nothing()
        if self._takes_waves(cursor):
            cursor, refills = self._waves(cursor, step)
        if cursor.step < step:
            cursor, more = self._one_by_one(cursor, step)
            refills = refills.followed_by(more)
        return cursor, refills

    def _takes_waves(self, cursor: Cursor) -> bool:
        supply = self.supply
        if self.lanes < _FEWEST_LANES_FOR_WAVES or supply.is_mixed or supply.sequences[supply.only].is_finite:
            return False
        return supply.first is None or supply.sequences[supply.first].remaining(cursor.taken[supply.first]) == 0

    def _waves(self, cursor: Cursor, step: int) -> tuple[Cursor, Held]:
        """Refill by waves of the lanes that are due first; stops before `step` if the waves are small.

        Lanes sorted by (step, lane) all take the next parts at once. That is what they do one by one, up to the
        first lane that is due after one before it in the wave will be due again.
        """
        sequence, lanes, edges = self.supply.sequences[self.supply.only], self.lanes, self._edges
        first = taken = cursor.taken[self.supply.only]
        place, lane = self._places(cursor), np.arange(lanes)
        key = place // edges * lanes + lane
        limit, rows, waves = step * lanes, [], 0
        lengths = costs = np.zeros(0, dtype=np.int64)
        while True:
            order = key.argsort()
            key, place, lane = key[order], place[order], lane[order]
            if key[0] >= limit or (waves == _TRIED_WAVES and taken - first < _WORTHWHILE_WAVE * waves):
                break
            if not len(costs):
                lengths = sequence.lengths(taken, _LENGTHS_AT_ONCE)
                costs = -(-lengths // self._edge_tokens)
            wide = min(len(costs), lanes if key[-1] < limit else int(key.searchsorted(limit)))
            after = place[:wide] + costs[:wide]
            after_key = after // edges * lanes + lane[:wide]
            is_late = key[1:wide] >= np.minimum.accumulate(after_key)[:-1]
            size = int(is_late.argmax()) + 1 if wide > 1 else 1
            if wide > 1 and not is_late[size - 1]:
                size = wide
            rows.append((lane[:size], place[:size].copy(), lengths[:size]))
            key[:size], place[:size] = after_key[:size], after[:size]
            lengths, costs = lengths[size:], costs[size:]
            taken, waves = taken + size, waves + 1
        if not rows:
            return replace(cursor, step=step), self._nothing()
        lane, place, length = (np.concatenate(column) for column in zip(*rows, strict=True))
        refills = Held(
            lane, np.full(len(lane), self.supply.only), np.arange(first, taken), place * self._edge_tokens, length
        )
        return self._after(cursor, refills, min(step, int(key[0]) // lanes)), refills

    def _one_by_one(self, cursor: Cursor, step: int) -> tuple[Cursor, Held]:
        supply, grid = self.supply, Grid(self.lanes, self._edges, self._edge_tokens)
        queues = [
            Upcoming(sequence, taken, self._edge_tokens)
            for sequence, taken in zip(supply.sequences, cursor.taken, strict=True)
        ]
        place, edges = self._places(cursor), grid.edges
        heap = ((place // edges * self.lanes + np.arange(self.lanes)) * edges + place % edges).tolist()
        heapify(heap)
        mixer = self._mixer(cursor, grid, heap, queues) if supply.is_mixed else None
        index = supply.only if supply.first is None else supply.first
        first_sources = iter(supply.sources_of_first(cursor.taken[-1]))
        dues: list[int] = []
        chosen: list[int] = []
        sizes: list[int] = []
        limit, leap = step * grid.span, grid.span - edges
        while (due := heap[0]) < limit:
            if mixer is not None and index != supply.first:
                index, length, cost = mixer.take(due)
            else:
                try:
                    length, cost = queues[index].take()
                except LookupError:
                    if index != supply.first:
                        break
                    index = supply.only
                    continue
                if mixer is not None:
                    mixer.give(due, next(first_sources), length)
            dues.append(due)
            chosen.append(index)
            sizes.append(length)
            heapreplace(heap, due + cost + (due % edges + cost) // edges * leap)
        refills = self._decode(dues, chosen, sizes, cursor)
        return self._after(cursor, refills, step), refills

    def _decode(self, dues: list[int], chosen: list[int], lengths: list[int], cursor: Cursor) -> Held:
        due, sequence, length = (np.array(column, dtype=np.int64) for column in (dues, chosen, lengths))
        ordinal = np.empty_like(due)
        for index, taken in enumerate(cursor.taken):
            here = sequence == index
            ordinal[here] = taken + np.arange(np.count_nonzero(here))
        place = due // (self.lanes * self._edges) * self._edges + due % self._edges
        return Held(due // self._edges % self.lanes, sequence, ordinal, place * self._edge_tokens, length)

    def _after(self, cursor: Cursor, refills: Held, step: int) -> Cursor:
        taken = np.bincount(refills.sequence, minlength=len(cursor.taken))
        source = self.supply.source_of(refills)
        assigned = [int(refills.length[source == index].sum()) for index in range(len(cursor.assigned))]
        held = cursor.held.where(np.arange(self.lanes))  # a copy
        for name in ("sequence", "ordinal", "position", "length"):
            getattr(held, name)[refills.lane] = getattr(refills, name)  # a lane's last refill stays
        return Cursor(
            step,
            tuple(was + int(more) for was, more in zip(cursor.taken, taken, strict=True)),
            tuple(was + more for was, more in zip(cursor.assigned, assigned, strict=True)),
            held,
        )

    def _places(self, cursor: Cursor) -> np.ndarray:
        """Where each lane's next part starts, in edges: int64 [G]."""
        return -(-cursor.held.end // self._edge_tokens)

    def _mixer(self, cursor: Cursor, grid: Grid, heap: list[int], queues: list[Upcoming]) -> Mixer:
        held = cursor.held.where(cursor.held.sequence != NO_PART)
        columns = (held.lane, self.supply.source_of(held), held.position, held.length)
        rows = list(zip(*(column.tolist() for column in columns), strict=True))
        return Mixer(self.supply.weights, grid, cursor.step, cursor.assigned, rows, heap, queues, self._longest)

    def _nothing(self) -> Held:
        empty = np.zeros(0, dtype=np.int64)
        return Held(empty, empty, empty, empty, empty)
