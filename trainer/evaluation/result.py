"""From sums to result.json: rates, paired differences, their intervals.

result.json, all rates in bits per byte with `ci_low` and `ci_high` (null where there are fewer than two documents):

    key, kind ("ppl_vs_length"), protocol, spec, spec_digest, seconds, environment
    checkpoint    path, run, step, fingerprint, committed (unix seconds)
    model         name, window_tokens, quantum, segment_tokens (trained on)
    data          shards, digest, tokenizer {name, digest}, split, documents [{id, source, num_bytes, spans}],
                  excluded [{id, num_bytes}], needed_bytes, mask_digest
    num_documents, target_tokens, target_bytes
    curve         [{mode, context_tokens, bits_per_byte, ci_low, ci_high, nats_per_token, perplexity_per_token,
                    context_min, context_max}]       modes truncated, reset, state_reset
    carried, swapped, local              the same without context_tokens; null when not asked for
    memory_gain   state_reset at W minus carried; null when state_reset was not asked for
    reset_gain, state_reset_gain         [{context_tokens, ...}]  reset (state_reset) at L minus carried
    position_effect                      [{context_tokens, ...}]  truncated at L minus reset at L
    context_gain                         [{context_tokens, ...}]  truncated at L minus truncated at the longest L
    content_gain  swapped minus carried; local_gain  local minus carried; null when not asked for
    useful_context_tokens                smallest L whose context_gain's interval lies within 0.5 % of the longest L's
    by_source     {source: the same measures from `num_documents` to `useful_context_tokens`}
    by_repeat     {ngram_tokens, beyond_tokens, repeat, other}   the same measures on tokens that complete an n-gram
                  last seen more than W tokens back, and on all others; null where there are none
    whole         every token of every document but eos, carried: num_documents, tokens, bytes, complete (to the end of
                  each document), words and perplexity_per_word (nats of all tokens over words of the text; null unless
                  complete), bits_per_byte, nats_per_token, perplexity_per_token
    position      {num_documents, buckets [{first, last, bits_per_byte, nats_per_token, ci_low, ci_high, tokens}]}
                  carried, by place in the document; the same documents in every bucket, mean over their means
    scores        [{document, span, mode, context_tokens, nats, tokens, bytes, repeat_nats, repeat_tokens,
                    repeat_bytes}]  the sums behind all of it; mode `position` has a bucket's number as span
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from longspan.errors import ShapeError
from longspan.trainer.evaluation.bootstrap import DocumentBootstrap
from longspan.trainer.evaluation.spec import EvaluationSpec
from longspan.trainer.evaluation.windows import POSITION, Score, ScoredDocument, bucket_edges

USEFUL_FRACTION = 0.005
LARGEST_EXPONENT = 700.0  # e^700 is still a float64

Variant = tuple[str, int]  # mode and context length; 0 for the whole document
Part = Literal["all", "repeat", "other"]
Measures = dict[str, Any]


class Sums:
    """Sums per document of each (mode, context length), and intervals of rates and differences."""

    def __init__(
        self, scores: Sequence[Score], spec: EvaluationSpec, part: Part = "all", only: set[int] | None = None
    ) -> None:
        """Add the spans of each document up.

        Args:
            scores: of all modes.
            spec: for the resamples.
            part: all targets, the repeats among them, or the others.
            only: documents that count; all of them if None. Those without bytes in this part never do.

        Raises:
            ShapeError: two modes scored different targets.
        """
        chosen = [s for s in scores if s.mode != POSITION and (only is None or s.document in only)]
        groups: dict[Variant, list[Score]] = defaultdict(list)
        for score in chosen:
            groups[score.mode, score.context_tokens].append(score)
        targets = {
            variant: [(s.document, s.span, s.tokens, s.bytes, s.repeat_bytes) for s in group]
            for variant, group in groups.items()
        }
        reference = next(iter(targets), None)
        for variant, scored in targets.items():
            if reference and scored != targets[reference]:
                raise ShapeError(f"mode {variant[0]} at {variant[1]} scored other targets than the first mode.")
        sized: dict[int, int] = defaultdict(int)
        for score in groups[reference] if reference else []:
            sized[score.document] += _part(score, part)[2]
        self.documents = sorted(document for document, size in sized.items() if size)
        num_bytes = [sized[document] for document in self.documents]
        self._scores = {v: [s for s in group if sized[s.document]] for v, group in groups.items()}
        self._nats = {variant: self._by_document(group, part) for variant, group in self._scores.items()}
        kept = self._scores[reference] if reference else []
        self.num_tokens = sum(_part(score, part)[1] for score in kept)
        self.num_bytes = sum(num_bytes)
        self._bootstrap = DocumentBootstrap(
            np.array(num_bytes), spec.bootstrap_samples, spec.seed, confidence=spec.confidence
        )

    def _by_document(self, group: list[Score], part: Part) -> np.ndarray:
        found: dict[int, list[float]] = {document: [] for document in self.documents}
        for score in group:
            found[score.document].append(_part(score, part)[0])
        return np.array([math.fsum(values) for values in found.values()])

    @property
    def num_documents(self) -> int:
        """Documents with targets in this part."""
        return len(self.documents)

    @property
    def variants(self) -> list[Variant]:
        """All (mode, context length) that were scored."""
        return sorted(self._scores)

    def lengths(self, mode: str) -> list[int]:
        """Context lengths of a mode, rising."""
        return [length for name, length in self.variants if name == mode]

    def rate(self, variant: Variant) -> dict[str, float | int | None]:
        """Bits per byte, nats and perplexity per token, and the true range of context lengths."""
        nats_per_token = math.fsum(self._nats[variant]) / self.num_tokens
        return {
            **self._bootstrap.rate(self._nats[variant]).as_dict(),
            "nats_per_token": nats_per_token,
            "perplexity_per_token": perplexity(nats_per_token),
            "context_min": min(score.context_min for score in self._scores[variant]),
            "context_max": max(score.context_max for score in self._scores[variant]),
        }

    def difference(self, variant: Variant, reference: Variant) -> dict[str, float | None] | None:
        """Paired difference in bits per byte; None when either was not scored."""
        if variant not in self._nats or reference not in self._nats:
            return None
        return self._bootstrap.difference(self._nats[variant], self._nats[reference]).as_dict()


def _part(score: Score, part: Part) -> tuple[float, int, int]:
    """Nats, tokens and bytes of the part of a score."""
    if part == "all":
        return score.nats, score.tokens, score.bytes
    if part == "repeat":
        return score.repeat_nats, score.repeat_tokens, score.repeat_bytes
    return score.nats - score.repeat_nats, score.tokens - score.repeat_tokens, score.bytes - score.repeat_bytes


def perplexity(nats: float) -> float:
    """exp(nats), kept finite."""
    return math.exp(min(nats, LARGEST_EXPONENT))


def summarise(
    scores: Sequence[Score], documents: Sequence[ScoredDocument], spec: EvaluationSpec, window_tokens: int
) -> Measures:
    """The measured part of result.json (see the module's text).

    Args:
        scores: one per (document, span, mode, context length), and one per place.
        documents: that the scores number.
        spec: for the resamples.
        window_tokens: W, the context length of the memory gain.
    """
    members: dict[str, set[int]] = defaultdict(set)
    for index, document in enumerate(documents):
        members[document.source].add(index)

    def part(name: Part) -> Measures | None:
        sums = Sums(scores, spec, name)
        return measures(sums, window_tokens) if sums.num_bytes else None

    return {
        **measures(Sums(scores, spec), window_tokens),
        "by_source": {
            source: measures(Sums(scores, spec, only=inside), window_tokens)
            for source, inside in sorted(members.items())
        },
        "by_repeat": {
            "ngram_tokens": spec.repeat_ngram_tokens,
            "beyond_tokens": window_tokens,
            "repeat": part("repeat"),
            "other": part("other"),
        },
        "whole": _whole(scores, documents, spec),
        "position": _position(scores, documents, spec),
    }


def measures(sums: Sums, window_tokens: int) -> Measures:
    """Curve, gains and numbers of targets of some documents or of some of their tokens."""
    carried, longest = ("carried", 0), ("truncated", max(sums.lengths("truncated"), default=0))

    def differences(mode: str, reference: str | Variant) -> list[Measures]:
        found = []
        for length in sums.lengths(mode):
            other = (reference, length) if isinstance(reference, str) else reference
            difference = sums.difference((mode, length), other)
            if difference is not None:
                found.append({"context_tokens": length, **difference})
        return found

    gain = sums.difference(("state_reset", window_tokens), carried)
    context_gain = differences("truncated", longest)
    return {
        "curve": [
            {"mode": mode, "context_tokens": length, **sums.rate((mode, length))}
            for mode in ("truncated", "reset", "state_reset")
            for length in sums.lengths(mode)
        ],
        **{
            mode: sums.rate((mode, 0)) if (mode, 0) in sums.variants else None
            for mode in ("carried", "swapped", "local")
        },
        "memory_gain": None if gain is None else {"context_tokens": window_tokens, **gain},
        "reset_gain": differences("reset", carried),
        "state_reset_gain": differences("state_reset", carried),
        "position_effect": differences("truncated", "reset"),
        "context_gain": context_gain,
        "content_gain": sums.difference(("swapped", 0), carried),
        "local_gain": sums.difference(("local", 0), carried),
        "useful_context_tokens": _useful(context_gain, sums, longest),
        "num_documents": sums.num_documents,
        "target_tokens": sums.num_tokens,
        "target_bytes": sums.num_bytes,
    }


def _useful(context_gain: list[Measures], sums: Sums, longest: Variant) -> int | None:
    """Smallest context length from which on the interval lies within 0.5 % of the longest one's rate."""
    if not context_gain or sums.num_documents < 2:
        return None
    rate = sums.rate(longest)["bits_per_byte"]
    assert rate is not None
    limit = USEFUL_FRACTION * rate
    return next(
        (entry["context_tokens"] for entry in context_gain if -limit <= entry["ci_low"] and entry["ci_high"] <= limit),
        None,
    )


def _whole(scores: Sequence[Score], documents: Sequence[ScoredDocument], spec: EvaluationSpec) -> Measures:
    """Every token of every document, carried from its start."""
    places = [score for score in scores if score.mode == POSITION]
    nats, sizes = np.zeros(len(documents)), np.zeros(len(documents))
    for d in range(len(documents)):
        mine = [score for score in places if score.document == d]
        nats[d], sizes[d] = math.fsum(score.nats for score in mine), sum(score.bytes for score in mine)
    tokens = sum(score.tokens for score in places)
    counted = [document.words for document in documents]
    words = None if any(count is None for count in counted) else sum(count or 0 for count in counted)
    total = math.fsum(nats)
    bootstrap = DocumentBootstrap(sizes, spec.bootstrap_samples, spec.seed, confidence=spec.confidence)
    return {
        "num_documents": len(documents),
        "tokens": tokens,
        "bytes": int(sizes.sum()),
        "complete": words is not None,
        "words": words,
        **bootstrap.rate(nats).as_dict(),
        "nats_per_token": total / tokens,
        "perplexity_per_token": perplexity(total / tokens),
        "perplexity_per_word": perplexity(total / words) if words else None,
    }


def _position(scores: Sequence[Score], documents: Sequence[ScoredDocument], spec: EvaluationSpec) -> Measures:
    """Loss by place in the document, on the documents that fill the last bucket: no change of documents on the way.

    The last bucket is the furthest that half of the documents fill, and two at least.
    """
    filled = [len(document.tokens).bit_length() - 1 for document in documents]
    enough = max(2, -(-len(documents) // 2))
    buckets = sorted(filled, reverse=True)[enough - 1] if len(filled) >= enough else min(filled)
    panel = [d for d, count in enumerate(filled) if count >= buckets]
    found = {(s.document, s.span): s for s in scores if s.mode == POSITION}
    ones = DocumentBootstrap(np.ones(len(panel)), spec.bootstrap_samples, spec.seed, confidence=spec.confidence)
    rows = []
    for bucket in range(buckets):
        mine = [found[d, bucket] for d in panel]
        first, stop = bucket_edges(len(documents[panel[0]].tokens))[bucket]
        if not all(score.bytes for score in mine):
            continue  # the first token of a text may have no bytes of its own
        # the mean over documents of each one's rate: every document counts alike in every bucket
        rate = ones.rate(np.array([score.nats / score.bytes for score in mine]))
        rows.append(
            {
                "first": first,
                "last": stop - 1,
                **rate.as_dict(),
                "nats_per_token": math.fsum(score.nats / score.tokens for score in mine) / len(mine),
                "tokens": sum(score.tokens for score in mine),
            }
        )
    return {"num_documents": len(panel), "buckets": rows}
