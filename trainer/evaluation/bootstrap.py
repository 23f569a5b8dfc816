"""Intervals by resampling documents: the same resamples for every mode and length, so differences are paired."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LN2 = math.log(2.0)
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Interval:
    """An estimate with the bootstrap interval around it, in bits per byte; None: too few documents for one."""

    bits_per_byte: float
    ci_low: float | None
    ci_high: float | None

    def as_dict(self) -> dict[str, float | None]:
        """The three numbers by name."""
        return {"bits_per_byte": self.bits_per_byte, "ci_low": self.ci_low, "ci_high": self.ci_high}


class DocumentBootstrap:
    """Resamples of documents, drawn with replacement."""

    def __init__(self, num_bytes: np.ndarray, samples: int, seed: int, confidence: float = 0.95) -> None:
        """Draw the resamples.

        Args:
            num_bytes: [documents], bytes of the scored tokens of each document; the same in every mode. With fewer
                than two documents there are estimates, but no intervals.
            samples: number of resamples.
            seed: of the draws.
            confidence: probability inside the interval.
        """
        self._bytes = np.asarray(num_bytes, dtype=np.float64)
        documents = len(self._bytes)
        self._tail = 100 * (1 - confidence) / 2
        if documents < 2:
            return
        rng = np.random.default_rng(seed)
        self._counts = np.empty((samples, documents), dtype=np.float64)
        for start in range(0, samples, _ROWS_AT_ONCE):
            rows = min(_ROWS_AT_ONCE, samples - start)
            drawn = rng.integers(0, documents, size=(rows, documents))
            offsets = drawn + documents * np.arange(rows)[:, None]
            counted = np.bincount(offsets.ravel(), minlength=rows * documents)
            self._counts[start : start + rows] = counted.reshape(rows, documents)

    def rate(self, nats: np.ndarray) -> Interval:
        """Bits per byte of one mode: sum of nats / (ln 2 * sum of bytes). nats: [documents]."""
        nats = np.asarray(nats, dtype=np.float64)
        estimate = math.fsum(nats) / (LN2 * math.fsum(self._bytes))
        if len(self._bytes) < 2:
            return Interval(estimate, None, None)
        resampled = (self._counts @ nats) / (LN2 * (self._counts @ self._bytes))
        low, high = np.percentile(resampled, [self._tail, 100 - self._tail])
        return Interval(estimate, float(low), float(high))

    def difference(self, nats: np.ndarray, reference: np.ndarray) -> Interval:
        """Bits per byte of `nats` minus `reference`, both [documents], on the same resamples.

        The documents' differences are resampled, so equal inputs give exactly zero with a zero interval.
        """
        return self.rate(np.asarray(nats, dtype=np.float64) - np.asarray(reference, dtype=np.float64))

    def difference_of_rates(self, nats: np.ndarray, reference: np.ndarray, reference_bytes: np.ndarray) -> Interval:
        """Bits per byte of `nats` minus those of `reference`, whose tokens hold other bytes of the same documents.

        Args:
            nats: [documents], over this bootstrap's bytes.
            reference: [documents], over `reference_bytes` [documents].
        """
        reference, reference_bytes = np.asarray(reference, np.float64), np.asarray(reference_bytes, np.float64)
        if np.array_equal(reference_bytes, self._bytes):
            return self.difference(nats, reference)
        nats = np.asarray(nats, dtype=np.float64)
        estimate = math.fsum(nats) / math.fsum(self._bytes) - math.fsum(reference) / math.fsum(reference_bytes)
        if len(self._bytes) < 2:
            return Interval(estimate / LN2, None, None)
        counts = self._counts
        resampled = (counts @ nats) / (counts @ self._bytes) - (counts @ reference) / (counts @ reference_bytes)
        low, high = np.percentile(resampled / LN2, [self._tail, 100 - self._tail])
        return Interval(estimate / LN2, float(low), float(high))
