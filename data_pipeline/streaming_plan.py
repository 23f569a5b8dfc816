"""The shard-major plan: lanes take documents in the order in which shards hold them, shards permuted each epoch.

For stores that are slow to seek in, and for shards that are read whole: at any time the lanes hold documents of a few
shards next to each other in the order, and every shard is read once an epoch, front to back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from longspan.data_pipeline.manifest import Manifest
from longspan.data_pipeline.mixing import deficits
from longspan.data_pipeline.parts import PartSequence, PartTable
from longspan.data_pipeline.plan import LanePlan, Progress
from longspan.data_pipeline.timeline import NO_PART, Held, Supply
from longspan.errors import UsageError


class Pass(NamedTuple):
    """One reading of a shard.

    Attributes:
        shard: its name. start, stop: ordinals in the stream of the parts that it holds.
    """

    shard: str
    start: int
    stop: int


class ShardSequence(PartSequence):
    """All parts of a split, shard after shard; within a shard in the order of the archive."""

    def __init__(self, parts: PartTable, manifest: Manifest, seed: int) -> None:
        """Args: parts: of `manifest`; seed: of the order of shards."""
        super().__init__(parts, 0, len(parts), name="", seed=seed, shuffle=True)
        codes, names = manifest.documents.codes("shard")
        present, shard = np.unique(codes[parts.document], return_inverse=True)
        self._names = [names[code] for code in present]
        offset = manifest.documents.integers("offset")[parts.document]
        self._by_shard = np.lexsort((parts.number, offset, shard)).astype(np.int32)
        self._counts = np.bincount(shard, minlength=len(self._names))
        self._begins = np.cumsum(self._counts) - self._counts

    def shards(self, epoch: int) -> list[int]:
        """The shards, as places in their list, in the order of an epoch."""

        def key(place: int) -> bytes:
            return hashlib.blake2b(f"{self._seed}\0{epoch}\0{self._names[place]}".encode(), digest_size=8).digest()

        return sorted(range(len(self._names)), key=lambda place: (key(place), place))

    def passes(self, ordinal: int) -> Iterator[Pass]:
        """Without end: the readings of shards from the one that holds `ordinal` on."""
        epoch = ordinal // self.size
        while True:
            begin = epoch * self.size
            for place in self.shards(epoch):
                end = begin + int(self._counts[place])
                if end > ordinal:
                    yield Pass(self._names[place], begin, end)
                begin = end
            epoch += 1

    def _permutation(self, epoch: int) -> np.ndarray:
        chosen = [
            self._by_shard[self._begins[place] : self._begins[place] + self._counts[place]]
            for place in self.shards(epoch)
        ]
        return np.concatenate(chosen)


class _StreamSupply(Supply):
    """One sequence without end that holds parts of all sources."""

    def source_of(self, held: Held) -> np.ndarray:
        """Index of the source of each part, -1 for none: int64 [m]."""
        source = np.full(len(held.lane), NO_PART, dtype=np.int64)
        here = held.sequence != NO_PART
        source[here] = self.parts.source[self.sequences[0].parts(held.ordinal[here])]
        return source


class StreamPlan(LanePlan):
    """A lane plan whose documents come in the order of a stream of shards.

    As a `LanePlan` it is a pure function of the manifest and a few settings, its position is one integer, and every
    rank computes it. Sources come as the shards hold them: no `source_weights`, no `drain`, no `origin`.
    """

    def description(self) -> dict[str, Any]:
        """Everything that the plan is a function of, JSON-able."""
        return {**super().description(), "order": "shards"}

    def progress(self, step: int) -> Progress:
        """Where the plan stands at `step`; epoch and position are the stream's, the same for all sources."""
        standing = self._windows.at(step).standing(step)
        epoch, position = divmod(standing.taken[0], self._stream.size)
        count = len(self.sources)
        tokens = [whole - unread for whole, unread in zip(standing.assigned, standing.unread, strict=True)]
        counted = [whole - hidden for whole, hidden in zip(standing.assigned, standing.hidden, strict=True)]
        return Progress([epoch] * count, [position] * count, deficits(list(self.weights.values()), counted), tokens)

    def passes(self, step: int, lane_start: int, lane_stop: int) -> Iterator[Pass]:
        """The readings of shards from the oldest document on that lanes `lane_start` to `lane_stop` hold at `step`.

        Those that hold none of the documents which these lanes hold, or take later, can be left out.
        """
        cursor = self.before(step)
        held = cursor.held.where(np.arange(lane_start, lane_stop))
        held = held.where((held.sequence != NO_PART) & (held.end > step * self.segment_tokens))
        return self._stream.passes(int(min(held.ordinal, default=cursor.taken[0])))

    def _check(self, source_weights: object) -> None:
        super()._check(source_weights)
        if source_weights is not None or self.drain or self.origin is not None:
            raise UsageError(
                "a plan that streams whole shards takes documents as they come: it has no source weights, does not "
                "end, and cannot be forked. Use the ranged reader for these."
            )

    def _supply(self) -> Supply:
        self._stream = ShardSequence(self.parts, self.manifest, self.seed)
        return _StreamSupply(self.parts, [self._stream], list(self.weights.values()))
