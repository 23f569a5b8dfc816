"""From sums to result.json: rates, paired differences, their intervals.

result.json, all rates in bits per byte with `ci_low` and `ci_high`:

    key, protocol, spec, spec_digest, seconds, environment
    checkpoint    path, run, step, fingerprint, committed (unix seconds)
    model         name, window_tokens, quantum, segment_tokens (trained on)
    data          shards, digest, tokenizer {name, digest}, split, documents [{id, num_bytes, spans}],
                  excluded [{id, num_bytes}], needed_bytes, mask_digest
    num_documents, target_tokens, target_bytes
    curve         [{mode, context_tokens, bits_per_byte, ci_low, ci_high, nats_per_token, perplexity_per_token,
                    context_min, context_max}]       modes truncated, reset, state_reset
    carried, swapped                     the same without context_tokens; swapped is null when not asked for
    memory_gain   state_reset at W minus carried; null when state_reset was not asked for
    reset_gain, state_reset_gain         [{context_tokens, ...}]  reset (state_reset) at L minus carried
    position_effect                      [{context_tokens, ...}]  truncated at L minus reset at L
    context_gain                         [{context_tokens, ...}]  truncated at L minus truncated at the longest L
    content_gain  swapped minus carried; null when not asked for
    useful_context_tokens                smallest L whose context_gain's interval lies within 0.5 % of the longest L's
    scores        [{document, span, mode, context_tokens, nats, tokens, bytes}]  the sums behind all of it
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from longspan.errors import ShapeError
from longspan.trainer.evaluation.bootstrap import DocumentBootstrap
from longspan.trainer.evaluation.spec import EvaluationSpec
from longspan.trainer.evaluation.windows import Score

USEFUL_FRACTION = 0.005

Variant = tuple[str, int]  # mode and context length; 0 for the whole document


class Sums:
    """Sums per document of each (mode, context length), and intervals of rates and differences."""

    def __init__(self, scores: Sequence[Score], spec: EvaluationSpec) -> None:
        """Add the spans of each document up.

        Raises:
            ShapeError: two modes scored different targets.
        """
        self._scores: dict[Variant, list[Score]] = defaultdict(list)
        for score in scores:
            self._scores[score.mode, score.context_tokens].append(score)
        documents = sorted({score.document for score in scores})
        self._nats = {
            variant: np.array([math.fsum(s.nats for s in group if s.document == d) for d in documents])
            for variant, group in self._scores.items()
        }
        targets = {
            variant: [(s.document, s.span, s.tokens, s.bytes) for s in group] for variant, group in self._scores.items()
        }
        reference = next(iter(targets.values()))
        for variant, scored in targets.items():
            if scored != reference:
                raise ShapeError(f"mode {variant[0]} at {variant[1]} scored other targets than the first mode.")
        self.num_documents = len(documents)
        self.num_tokens = sum(tokens for _, _, tokens, _ in reference)
        self.num_bytes = sum(count for *_, count in reference)
        per_document = [sum(count for doc, _, _, count in reference if doc == d) for d in documents]
        self._bootstrap = DocumentBootstrap(
            np.array(per_document), spec.bootstrap_samples, spec.seed, confidence=spec.confidence
        )

    @property
    def variants(self) -> list[Variant]:
        """All (mode, context length) that were scored."""
        return sorted(self._scores)

    def lengths(self, mode: str) -> list[int]:
        """Context lengths of a mode, rising."""
        return [length for name, length in self.variants if name == mode]

    def rate(self, variant: Variant) -> dict[str, float | int]:
        """Bits per byte, nats and perplexity per token, and the true range of context lengths."""
        nats_per_token = math.fsum(self._nats[variant]) / self.num_tokens
        return {
            **self._bootstrap.rate(self._nats[variant]).as_dict(),
            "nats_per_token": nats_per_token,
            "perplexity_per_token": math.exp(min(nats_per_token, 700.0)),
            "context_min": min(score.context_min for score in self._scores[variant]),
            "context_max": max(score.context_max for score in self._scores[variant]),
        }

    def difference(self, variant: Variant, reference: Variant) -> dict[str, float] | None:
        """Paired difference in bits per byte; None when either was not scored."""
        if variant not in self._nats or reference not in self._nats:
            return None
        return self._bootstrap.difference(self._nats[variant], self._nats[reference]).as_dict()


def summarise(scores: Sequence[Score], spec: EvaluationSpec, window_tokens: int) -> dict[str, Any]:
    """The measured part of result.json (see the module's text).

    Args:
        scores: one per (document, span, mode, context length).
        spec: for the resamples.
        window_tokens: W, the context length of the memory gain.
    """
    sums = Sums(scores, spec)
    carried, longest = ("carried", 0), ("truncated", max(sums.lengths("truncated"), default=0))

    def differences(mode: str, reference: str | Variant) -> list[dict[str, Any]]:
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
        "carried": sums.rate(carried),
        "swapped": sums.rate(("swapped", 0)) if ("swapped", 0) in sums.variants else None,
        "memory_gain": None if gain is None else {"context_tokens": window_tokens, **gain},
        "reset_gain": differences("reset", carried),
        "state_reset_gain": differences("state_reset", carried),
        "position_effect": differences("truncated", "reset"),
        "context_gain": context_gain,
        "content_gain": sums.difference(("swapped", 0), carried),
        "useful_context_tokens": _useful(context_gain, sums, longest),
        "num_documents": sums.num_documents,
        "target_tokens": sums.num_tokens,
        "target_bytes": sums.num_bytes,
    }


def _useful(context_gain: list[dict[str, Any]], sums: Sums, longest: Variant) -> int | None:
    """Smallest context length from which on the interval lies within 0.5 % of the longest one's rate."""
    if not context_gain:
        return None
    limit = USEFUL_FRACTION * sums.rate(longest)["bits_per_byte"]
    return next(
        (entry["context_tokens"] for entry in context_gain if -limit <= entry["ci_low"] and entry["ci_high"] <= limit),
        None,
    )
