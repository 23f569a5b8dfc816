"""Figures about a corpus that a reader compares a model's bits per byte with."""

from __future__ import annotations

import lzma
from collections.abc import Iterable
from typing import Any

import numpy as np

STATISTICS_NAME = "statistics.json"


def counts(rows: Iterable[tuple[str, str, int]]) -> dict[str, dict[str, dict[str, int]]]:
    """{source: {split: {documents, bytes}}} from (source, split, bytes) of each document."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for source, split, num_bytes in rows:
        cell = table.setdefault(source, {}).setdefault(split, {"documents": 0, "bytes": 0})
        cell["documents"] += 1
        cell["bytes"] += num_bytes
    return table


def unigram_bits_per_byte(texts: list[bytes]) -> float:
    """Entropy of the byte histogram of all texts together: what a model without context can reach on them."""
    histogram = np.zeros(256, dtype=np.int64)
    for text in texts:
        histogram += np.bincount(np.frombuffer(text, dtype=np.uint8), minlength=256)
    share = histogram[histogram > 0] / histogram.sum()
    return float((share * np.log2(1 / share)).sum())


def xz_bits_per_byte(texts: list[bytes]) -> float:
    """Bits per byte of `xz -9`, each text compressed by itself, headers included."""
    compressed = sum(len(lzma.compress(text, preset=9)) for text in texts)
    return 8.0 * compressed / sum(len(text) for text in texts)


def held_out_statistics(texts: list[bytes]) -> dict[str, Any] | None:
    """Both figures of the held-out texts, with how they were taken; None if there are no such texts."""
    if not texts:
        return None
    return {
        "documents": len(texts),
        "bytes": sum(len(text) for text in texts),
        "unigram_bits_per_byte": unigram_bits_per_byte(texts),
        "unigram_method": "entropy of the byte histogram of all held-out documents together",
        "xz_bits_per_byte": xz_bits_per_byte(texts),
        "xz_method": "xz -9 (lzma preset 9), each held-out document compressed by itself, headers included",
    }
