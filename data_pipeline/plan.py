"""The lane plan: which tokens of which document every lane holds at every step.

A pure function of the manifest's document lengths and a few settings; reads no data. Every rank computes it, the
position in it is one integer, and the number of data-parallel ranks may change.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

from longspan.data_pipeline.manifest import Manifest, Split
from longspan.data_pipeline.mixing import Part, SourceMixer, SourceOrder, integer_weights, split_document
from longspan.data_pipeline.timeline import Timeline
from longspan.errors import UsageError

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


class LanePlan:
    """Lane-ordered schedule of whole documents.

    Each lane streams one document in order over successive steps and then takes the next one. Refills happen in
    order of (step, lane). Sources never drain: each goes on into its next epoch by itself. May be used from several
    threads.

    Attributes:
        sources: names, in order of the manifest. weights: their integer shares of tokens.
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
        source_weights: dict[str, float] | None = None,
        max_document_tokens: int | None = None,
    ) -> None:
        """
        Args:
            manifest: of the corpus. split: which of its documents.
            seed: of the order.
            lanes: rows of the global batch. segment_tokens: T, tokens of a lane in a step, a multiple of `quantum`.
            quantum: Q, documents start on its multiples.
            boundary: "pack": the next document starts at the next multiple of Q; "pad": at the next segment.
            source_weights: share of tokens per source; by size if None.
            max_document_tokens: longer documents become parts of this many tokens, which are documents of their own:
                each starts with a reset, and the last token of each has no label.

        Raises:
            UsageError: settings that do not fit together or the corpus.
        """
        self.manifest, self.split, self.seed = manifest, split, seed
        self.lanes, self.segment_tokens, self.quantum = lanes, segment_tokens, quantum
        self.boundary, self.max_document_tokens = boundary, max_document_tokens
        self._check()
        by_source = self._parts_by_source()
        self.sources = list(by_source)
        sizes = {name: sum(part.num_tokens for part in parts) for name, parts in by_source.items()}
        self.weights = integer_weights(sizes, source_weights)
        orders = [SourceOrder(name, parts, manifest.documents, seed) for name, parts in by_source.items()]
        mixer = SourceMixer(orders, [self.weights[name] for name in self.sources])
        self._timeline = Timeline(lanes, segment_tokens, quantum if boundary == "pack" else segment_tokens, mixer)
        self._lock = threading.Lock()
        parts = [part for parts_of_source in by_source.values() for part in parts_of_source]
        self.warnings = [*self._short_documents(), *self._starved_lanes(parts)]
        for warning in self.warnings:
            _LOGGER.warning(warning)

    def description(self) -> dict[str, Any]:
        """Everything that the plan is a function of, JSON-able; equal descriptions give equal plans."""
        return {
            "manifest_digest": self.manifest.digest,
            "vocabulary_digest": self.manifest.vocabulary.digest,
            "split": self.split,
            "seed": self.seed,
            "lanes": self.lanes,
            "segment_tokens": self.segment_tokens,
            "quantum": self.quantum,
            "boundary": self.boundary,
            "max_document_tokens": self.max_document_tokens,
            "weights": self.weights,
        }

    def pieces(self, step: int, lane_start: int, lane_stop: int) -> list[Piece]:
        """What lanes `lane_start` to `lane_stop` hold at `step`, in order of (lane, column); never empty for a lane."""
        begin = step * self.segment_tokens
        end = begin + self.segment_tokens
        pieces = []
        with self._lock:
            for lane, held_in_lane in enumerate(self._timeline.at(step).held[lane_start:lane_stop], lane_start):
                for held in held_in_lane:
                    first, last = max(held.position, begin), min(held.end, end)
                    if first < last:
                        shift = held.part.start - held.position
                        pieces.append(Piece(lane, first - begin, held.part, first + shift, last + shift))
        return pieces

    def progress(self, step: int) -> Progress:
        """Where the plan stands at `step`."""
        begin = step * self.segment_tokens
        with self._lock:
            cursor = self._timeline.at(step)
            mixer = cursor.mixer
            tokens = mixer.assigned[:]
            for held_in_lane in cursor.held:
                for held in held_in_lane:
                    tokens[held.source] -= max(0, held.end - max(begin, held.position))
            return Progress(mixer.epochs[:], mixer.positions[:], mixer.deficits(), tokens)

    def _parts_by_source(self) -> dict[str, list[Part]]:
        by_source: dict[str, list[Part]] = {}
        for index, document in enumerate(self.manifest.documents):
            if document.split == self.split:
                parts = split_document(index, document.num_tokens, self.max_document_tokens)
                by_source.setdefault(document.source, []).extend(parts)
        if not by_source:
            raise UsageError(f"the corpus at {self.manifest.folder} has no {self.split} documents.")
        return by_source

    def _check(self) -> None:
        if self.segment_tokens % self.quantum:
            raise UsageError(
                f"data.segment_tokens = {self.segment_tokens}: not a multiple of the model's quantum = {self.quantum}."
            )
        if self.boundary not in ("pack", "pad"):
            raise UsageError(f"data.boundary = {self.boundary}: allowed are pack and pad.")

    def _short_documents(self) -> list[str]:
        documents = self.manifest.split(self.split)
        short = [document for document in documents if document.num_tokens < self.quantum]
        if not short:
            return []
        return [
            f"{len(short)} of {len(documents)} documents are shorter than a block of {self.quantum} tokens and are "
            f"padded to it, e.g. {short[0].id} ({short[0].num_tokens} tokens)."
        ]

    def _starved_lanes(self, parts: list[Part]) -> list[str]:
        longest = max(parts, key=lambda part: part.num_tokens)
        share = longest.num_tokens * self.lanes / sum(part.num_tokens for part in parts)
        reasons = []
        if len(parts) < _FEWEST_DOCUMENTS_PER_LANE * self.lanes:
            reasons.append(f"{len(parts)} documents are fewer than {_FEWEST_DOCUMENTS_PER_LANE} a lane")
        if share > 1 / _LOWEST_LANE_RATIO:
            name = self.manifest.documents[longest.document].id
            reasons.append(
                f"the longest, {name} ({longest.num_tokens} tokens), is {share:.2f} of a lane's part of an epoch "
                f"(more than 1/{_LOWEST_LANE_RATIO})"
            )
        if not reasons:
            return []
        return [
            f"few long documents for {self.lanes} lanes: {'; '.join(reasons)}. Training goes on, but epochs overlap "
            f"and a batch shows few documents at a time; use fewer lanes, or set data.max_document_tokens."
        ]
