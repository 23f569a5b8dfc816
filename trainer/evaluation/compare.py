"""Two or more results on the same targets: differences paired by document, from the sums that each result keeps.

Numbers alone, no torch: a report is made where the results are, not where the models ran.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from longspan.trainer.evaluation.bootstrap import DocumentBootstrap, Interval

Result = dict[str, Any]
Variant = tuple[str, int]  # mode and context length; 0 for the whole document


def targets_of(result: Result) -> list[tuple[str, list[list[int]]]]:
    """Documents and byte spans that a result is about; equal lists compare, whatever the tokenizers were."""
    documents = (result.get("data") or {}).get("documents") or []
    return sorted((str(document.get("id")), document.get("spans") or []) for document in documents)


class PairedResults:
    """Results on the same targets, resampled together: each resample takes the same documents of all of them."""

    def __init__(self, results: Sequence[Result], source: str | None = None) -> None:
        """Add the sums of each document up.

        Args:
            results: result.json of each, with equal `targets_of`.
            source: documents of this source alone; all if None.
        """
        spec = results[0].get("spec") or {}
        documents = (results[0].get("data") or {}).get("documents") or []
        self.names = [str(d["id"]) for d in documents if source is None or d.get("source") == source]
        self._nats = [self._sums(result, "nats") for result in results]
        self._bytes = [self._sums(result, "bytes") for result in results]
        self._bootstraps = [
            DocumentBootstrap(
                sizes.get(("carried", 0), np.zeros(0)),
                int(spec.get("bootstrap_samples", 10000)),
                int(spec.get("seed", 0)),
                float(spec.get("confidence", 0.95)),
            )
            for sizes in self._bytes
        ]

    def _sums(self, result: Result, field: str) -> dict[Variant, np.ndarray]:
        values: dict[Variant, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for score in result.get("scores") or []:
            values[score["mode"], score["context_tokens"]][score["document"]].append(score[field])
        return {
            variant: np.array([math.fsum(by_document.get(name, ())) for name in self.names])
            for variant, by_document in values.items()
            if variant[0] != "position"
        }

    def variants(self) -> list[Variant]:
        """(mode, context length) that all results have."""
        return sorted(set.intersection(*(set(nats) for nats in self._nats)))

    def rate(self, index: int, variant: Variant) -> Interval | None:
        """Bits per byte of one result; None where it was not measured."""
        if not self.names or variant not in self._nats[index]:
            return None
        return self._bootstraps[index].rate(self._nats[index][variant])

    def difference(self, index: int, variant: Variant, reference: int = 0) -> Interval | None:
        """Bits per byte of one result minus another one's in the same mode; None where one has not measured it."""
        if not self.names or variant not in self._nats[index] or variant not in self._nats[reference]:
            return None
        return self._bootstraps[index].difference_of_rates(
            self._nats[index][variant], self._nats[reference][variant], self._bytes[reference][variant]
        )

    def gain(self, index: int, variant: Variant) -> Interval | None:
        """Bits per byte of a mode minus those of `carried`, within one result."""
        nats = self._nats[index]
        if not self.names or variant not in nats or ("carried", 0) not in nats:
            return None
        return self._bootstraps[index].difference(nats[variant], nats["carried", 0])
