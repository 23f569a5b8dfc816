"""The statistics of a corpus that was made of others: counts, and what byte statistics reach on its held-out texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from longspan.data_pipeline import statistics
from longspan.data_pipeline.corpus_tools.contents import text_of
from longspan.data_pipeline.manifest import Manifest
from longspan.data_pipeline.tokenization.base import Tokenizer


def corpus_figures(manifest: Manifest, folder: Path, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """As the statistics of a build, without what only a build knows: what was left out, and duplicates.

    Args:
        manifest: of the corpus. folder: where its shards lie. tokenizer: of the corpus; None if it holds text.

    Raises:
        DataError: a held-out document does not have its hash.
    """
    table = manifest.documents
    columns = (table.strings("source"), table.strings("split"), table.num_bytes.tolist(), table.num_tokens.tolist())
    counts = statistics.counts(zip(*columns, strict=True))
    return {
        "counts": counts,
        "totals": statistics.totals(counts),
        "held_out": _held_out(manifest, folder, tokenizer),
    }


def _held_out(manifest: Manifest, folder: Path, tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    """None without held-out documents, or where tokens do not spell the text byte by byte."""
    histogram, compressed = np.zeros(256, dtype=np.int64), 0
    held_out = manifest.split("held_out")
    for entry in held_out:
        text = text_of(folder, entry, tokenizer)
        if len(text) != entry.num_bytes:
            return None
        histogram += statistics.byte_histogram(text)
        compressed += statistics.xz_bytes(text)
    return statistics.held_out_statistics(len(held_out), histogram, compressed) if histogram.any() else None
