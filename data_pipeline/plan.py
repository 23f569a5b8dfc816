"""The lane plan: which tokens of which document every lane holds at every step.

A pure function of the manifest's document lengths and a few settings; reads no data. Every rank computes it, the
position in it is one integer, and the number of data-parallel ranks may change.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longspan.data_pipeline.manifest import Manifest, Split
from longspan.data_pipeline.mixing import deficits, integer_weights
from longspan.data_pipeline.parts import Part, PartSequence, PartTable
from longspan.data_pipeline.plan_snapshots import Snapshots
from longspan.data_pipeline.timeline import Cursor, Held, Supply, Timeline
from longspan.data_pipeline.windows import PieceTable, Windows
from longspan.errors import UsageError

# Of the rules by which lanes are filled: another number means other batches from the same settings.
PLAN_VERSION = 3

_LOGGER = logging.getLogger("longspan.data")
_FEWEST_DOCUMENTS_PER_LANE = 8
_LOWEST_LANE_RATIO = 4


class Piece(NamedTuple):
    """A run of tokens of one document in one lane's segment.

    Attributes:
        lane: global lane. column: first token's place in the segment.
        part: what it is cut from. start, stop: token range in the document, part.start <= start < stop <= part.stop.
    """

    lane: int
    column: int
    part: Part
    start: int
    stop: int


@dataclass(frozen=True)
class Progress:
    """Where the plan stands at a step: its lanes filled, none of it read; per source in order of `LanePlan.sources`.

    Attributes:
        epochs, positions: the part that is handed out next. deficits: in tokens times the sum of weights.
        tokens: read before the step.
    """

    epochs: list[int]
    positions: list[int]
    deficits: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Origin:
    """Where a forked plan goes on from.

    Attributes:
        step: its first step. taken: parts handed out before, per source. tokens: read before, per source.
        waiting: (source, part) that go before all others. num_held: how many of these are in lanes already.
        held: what the lanes go on with, a row a lane; positions are negative by what was read before.
        started: step in which each lane's document started, -1 for none.
        history: settings of the plans before, in order, each with `until_step`.
    """

    step: int
    taken: tuple[int, ...]
    tokens: tuple[int, ...]
    waiting: tuple[tuple[int, Part], ...]
    num_held: int
    held: Held
    started: tuple[int, ...]
    history: tuple[dict[str, Any], ...]


class LanePlan:
    """Lane-ordered schedule of whole documents.

    Each lane streams one document in order over successive steps and then takes the next one. Refills happen in
    order of (step, lane). Sources never drain: each goes on into its next epoch by itself; of a source's documents
    none is ever taken more than once more often than another. May be used from several threads.

    Attributes:
        sources: names, in order of the manifest. weights: their integer shares of tokens.
        parts: what lanes take. supply: in which order. origin: where a forked plan goes on from, None for others.
        warnings: what was logged when the plan was made: short documents, starved lanes.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        split: Split = "train",
        seed: int,
        lanes: int,
        segment_tokens: int,
        quantum: int,
        boundary: str,
        source_weights: Mapping[str, float | Fraction] | None = None,
        max_document_tokens: int | None = None,
        drain: bool = False,
        snapshots: Path | None = None,
        origin: Origin | None = None,
    ) -> None:
        """
        Args:
            manifest: of the corpus. split: which of its documents.
            seed: of the order.
            lanes: rows of the global batch. segment_tokens: T, tokens of a lane in a step, a multiple of `quantum`.
            quantum: Q, documents start on its multiples.
            boundary: "pack": the next document starts at the next multiple of Q; "pad": at the next segment.
            source_weights: share of tokens per source, which sum to 1; by size if None.
            max_document_tokens: longer documents become parts of this many tokens, which are documents of their own:
                each starts with a reset, and the last token of each has no label.
            drain: for evaluation: every document once, by source and as the manifest has them, without mixing; a lane
                for which none is left holds nothing, and there are `num_steps` steps.
            snapshots: folder that keeps places to seek from, e.g. `plan_cache_folder()`; None: memory only.
            origin: made by `fork_plan`.

        Raises:
            UsageError: settings that do not fit together or the corpus.
        """
        self.manifest, self.split, self.seed, self.drain = manifest, split, seed, drain
        self.lanes, self.segment_tokens, self.quantum = lanes, segment_tokens, quantum
        self.boundary, self.max_document_tokens = boundary, max_document_tokens
        self.origin = origin
        self._check(source_weights)
        places = manifest.places(split)
        if not len(places):
            raise UsageError(f"the corpus at {manifest.folder} has no {split} documents.")
        self.parts = PartTable(manifest.documents, places, max_document_tokens)
        self.sources = self.parts.sources
        bounds = self.parts.bounds
        sizes = np.add.reduceat(self.parts.num_tokens, bounds[:-1]).tolist()
        self.weights = integer_weights(dict(zip(self.sources, sizes, strict=True)), source_weights)
        self.warnings = [*self._short_documents(places), *([] if drain else self._starved_lanes())]
        if origin is None:
            for warning in self.warnings:
                _LOGGER.warning(warning)
        mean_tokens = float(self.parts.num_tokens.mean())
        edge_tokens = quantum if boundary == "pack" else segment_tokens
        timeline = Timeline(self._supply(), lanes, segment_tokens, edge_tokens)
        self.supply = timeline.supply
        self._windows = Windows(timeline, Snapshots(self._start(timeline), snapshots, self.digest), mean_tokens)

    def description(self) -> dict[str, Any]:
        """Everything that the plan is a function of, JSON-able; equal descriptions give equal plans."""
        return {
            "plan_version": PLAN_VERSION,
            "manifest_digest": self.manifest.digest,
            "vocabulary_digest": self.manifest.vocabulary.digest,
            "split": self.split,
            "seed": self.seed,
            "drain": self.drain,
            "max_document_tokens": self.max_document_tokens,
            **self.phase(),
            "history": [] if self.origin is None else list(self.origin.history),
        }

    def phase(self) -> dict[str, Any]:
        """The settings that a fork may change."""
        return {
            "lanes": self.lanes,
            "segment_tokens": self.segment_tokens,
            "quantum": self.quantum,
            "boundary": self.boundary,
            "weights": dict(self.weights),
        }

    @property
    def digest(self) -> str:
        """sha256 of the description, in hex."""
        return hashlib.sha256(json.dumps(self.description(), sort_keys=True).encode()).hexdigest()

    @property
    def first_step(self) -> int:
        """0, or the step of the last fork."""
        return 0 if self.origin is None else self.origin.step

    @cached_property
    def num_steps(self) -> int | None:
        """Steps until every lane has ended, the same on all ranks; None unless `drain`."""
        return self._windows.end() if self.drain else None

    def table(self, step: int, lane_start: int, lane_stop: int) -> PieceTable:
        """What lanes `lane_start` to `lane_stop` hold at `step`, as columns in order of (lane, column).

        Raises:
            UsageError: the step lies before the plan's first.
        """
        local = self._local(step)
        return self._windows.at(local).pieces(local, lane_start, lane_stop)

    def pieces(self, step: int, lane_start: int, lane_stop: int) -> list[Piece]:
        """As `table`, as objects; never empty for a lane unless `drain`."""
        local = self._local(step)
        window = self._windows.at(local)
        table = window.pieces(local, lane_start, lane_stop)
        parts = [window.parts[index] for index in table.part.tolist()]
        columns = (table.lane.tolist(), table.column.tolist(), parts, table.start.tolist(), table.stop.tolist())
        return list(map(Piece._make, zip(*columns, strict=True)))

    def progress(self, step: int) -> Progress:
        """Where the plan stands at `step`."""
        local = self._local(step)
        standing = self._windows.at(local).standing(local)
        before = (0,) * len(self.sources) if self.origin is None else self.origin.tokens
        counted = [whole - hidden for whole, hidden in zip(standing.assigned, standing.hidden, strict=True)]
        tokens = [
            was + whole - unread for was, whole, unread in zip(before, standing.assigned, standing.unread, strict=True)
        ]
        sizes = np.diff(self.parts.bounds)
        taken = np.array(standing.taken[: len(sizes)])
        if self.drain:  # one sequence goes through all sources
            taken = np.clip(standing.taken[0] - np.array(self.parts.bounds[:-1]), 0, sizes)
        epochs, positions = np.divmod(taken, sizes)
        return Progress(epochs.tolist(), positions.tolist(), deficits(list(self.weights.values()), counted), tokens)

    def before(self, step: int) -> Cursor:
        """The lanes before `step`, its own refills not done; steps and positions count from the last fork."""
        return self._windows.before(self._local(step))

    def _local(self, step: int) -> int:
        if step < self.first_step:
            raise UsageError(
                f"step {step} lies before the fork at step {self.first_step}: ask the plan that was forked."
            )
        return step - self.first_step

    def _supply(self) -> Supply:
        parts, waiting = self.parts, () if self.origin is None else self.origin.waiting
        if self.drain:
            everything = PartSequence(parts, 0, len(parts), name="", seed=self.seed, shuffle=False)
            return Supply(parts, [everything], list(self.weights.values()))
        sequences = [
            PartSequence(parts, first, stop, name=name, seed=self.seed, shuffle=True)
            for name, (first, stop) in zip(self.sources, pairwise(parts.bounds), strict=True)
        ]
        first = None
        if waiting:
            self.parts = parts.extended(waiting)
            first = PartSequence(self.parts, len(parts), len(self.parts), name="", seed=self.seed, shuffle=False)
        return Supply(self.parts, sequences, list(self.weights.values()), first)

    def _start(self, timeline: Timeline) -> Cursor:
        start, origin = timeline.start(), self.origin
        if origin is None:
            return start
        taken = (*origin.taken, origin.num_held) if origin.waiting else origin.taken
        source = timeline.supply.source_of(origin.held)
        left = origin.held.end
        assigned = tuple(int(left[source == index].sum()) for index in range(len(self.sources)))
        return Cursor(0, taken, assigned, origin.held)

    def _check(self, source_weights: object) -> None:
        problems = []
        if self.segment_tokens % self.quantum:
            problems.append(
                f"data.segment_tokens = {self.segment_tokens}: not a multiple of the model's quantum = {self.quantum}."
            )
        if self.boundary not in ("pack", "pad"):
            problems.append(f"data.boundary = {self.boundary}: allowed are pack and pad.")
        if self.drain and source_weights is not None:
            problems.append("source_weights: a plan that reads every document once has no shares; leave them out.")
        if problems:
            raise UsageError("\n".join(problems))

    def _short_documents(self, places: np.ndarray) -> list[str]:
        lengths = self.manifest.documents.num_tokens[places]
        short = places[lengths < self.quantum]
        if not len(short):
            return []
        first = self.manifest.documents[int(short[0])]
        return [
            f"{len(short)} of {len(places)} documents are shorter than a block of {self.quantum} tokens and are "
            f"padded to it, e.g. {first.id} ({first.num_tokens} tokens)."
        ]

    def _starved_lanes(self) -> list[str]:
        lengths = self.parts.num_tokens
        longest = int(lengths.argmax())
        share = int(lengths[longest]) * self.lanes / int(lengths.sum())
        reasons = []
        if len(lengths) < self.lanes:
            reasons.append(f"{len(lengths)} documents are fewer than the lanes, so that some are read by two at a time")
        elif len(lengths) < _FEWEST_DOCUMENTS_PER_LANE * self.lanes:
            reasons.append(f"{len(lengths)} documents are fewer than {_FEWEST_DOCUMENTS_PER_LANE} a lane")
        if share > 1 / _LOWEST_LANE_RATIO:
            name = self.manifest.documents[int(self.parts.document[longest])].id
            reasons.append(
                f"the longest, {name} ({lengths[longest]} tokens), is {share:.2f} of a lane's part of an epoch "
                f"(more than 1/{_LOWEST_LANE_RATIO})"
            )
        if not reasons:
            return []
        return [
            f"few long documents for {self.lanes} lanes: {'; '.join(reasons)}. Training goes on, but epochs overlap "
            f"and a batch shows few documents at a time; use fewer lanes, or set data.max_document_tokens."
        ]
