"""Figures about a corpus that a reader compares a model's bits per byte with."""

from __future__ import annotations

import lzma
from collections.abc import Iterable
from typing import Any

import numpy as np

STATISTICS_NAME = "statistics.json"
_SMALLEST_DICTIONARY = 2**16
_LARGEST_DICTIONARY = 2**26  # that of preset 9


def counts(rows: Iterable[tuple[str, str, int, int]]) -> dict[str, dict[str, dict[str, int]]]:
    """{source: {split: {documents, bytes, tokens}}} from (source, split, bytes, tokens) of each document."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for source, split, num_bytes, num_tokens in rows:
        cell = table.setdefault(source, {}).setdefault(split, {"documents": 0, "bytes": 0, "tokens": 0})
        cell["documents"] += 1
        cell["bytes"] += num_bytes
        cell["tokens"] += num_tokens
    return table


def totals(table: dict[str, dict[str, dict[str, int]]]) -> dict[str, dict[str, float]]:
    """{split: {documents, bytes, tokens, bytes_per_token}} of what `counts` gave; tokens include bos and eos."""
    sums: dict[str, dict[str, float]] = {}
    for splits in table.values():
        for split, cell in splits.items():
            row = sums.setdefault(split, dict.fromkeys(cell, 0))
            for name, value in cell.items():
                row[name] += value
    for row in sums.values():
        row["bytes_per_token"] = row["bytes"] / row["tokens"]
    return sums


def byte_histogram(text: bytes) -> np.ndarray:
    """How often each byte comes: int64 [256]."""
    return np.bincount(np.frombuffer(text, dtype=np.uint8), minlength=256).astype(np.int64)


def histogram_entropy(histogram: np.ndarray) -> float:
    """Bits per byte of a byte histogram, int64 [256]."""
    share = histogram[histogram > 0] / histogram.sum()
    return float((share * np.log2(1 / share)).sum())


def unigram_bits_per_byte(texts: list[bytes]) -> float:
    """Entropy of the byte histogram of all texts together: what a model without context can reach on them."""
    return histogram_entropy(np.sum([byte_histogram(text) for text in texts], axis=0))


def xz_bytes(text: bytes) -> int:
    """Bytes that `xz -9` makes of a text, headers included.

    The dictionary is only as large as the text, which gives the same size: clearing the 64 MiB that preset 9 asks for
    takes a tenth of a second for each text, however short.
    """
    size = max(_SMALLEST_DICTIONARY, 1 << max(0, len(text) - 1).bit_length())
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": min(size, _LARGEST_DICTIONARY)}]
    return len(lzma.compress(text, filters=filters))


def xz_bits_per_byte(texts: list[bytes]) -> float:
    """Bits per byte of `xz -9`, each text compressed by itself, headers included."""
    return 8.0 * sum(map(xz_bytes, texts)) / sum(len(text) for text in texts)


def held_out_statistics(documents: int, histogram: np.ndarray, compressed_bytes: int) -> dict[str, Any]:
    """Both figures of the held-out texts, with how they were taken.

    Args:
        documents: how many. histogram: of their bytes, int64 [256].
        compressed_bytes: of all of them, compressed by `xz -9`.
    """
    num_bytes = int(histogram.sum())
    return {
        "documents": documents,
        "bytes": num_bytes,
        "unigram_bits_per_byte": histogram_entropy(histogram),
        "unigram_method": "entropy of the byte histogram of all held-out documents together",
        "xz_bits_per_byte": 8.0 * compressed_bytes / num_bytes,
        "xz_method": "xz -9 (lzma preset 9), each held-out document compressed by itself, headers included",
    }
