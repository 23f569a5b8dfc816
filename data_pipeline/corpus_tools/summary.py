"""What a corpus holds, from its manifest alone: sources, licences, counts, and how long its documents are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from longspan.data_pipeline.document_table import DocumentTable
from longspan.data_pipeline.manifest import SCHEMA_VERSION, Manifest

_SPLITS = ("train", "held_out")


def summarise(folder: str | Path) -> dict[str, Any]:
    """Counts per source, JSON-able.

    Lengths are counted in bins of powers of two: a bin `{"from_tokens": 1024, "documents": 3, "tokens": 5000}` holds
    documents of 1,024 to 2,047 tokens; bins between the shortest and the longest document are listed even if empty.

    Raises:
        UsageError, DataError, SecurityError: as `Manifest.load`.
    """
    manifest = Manifest.load(folder)
    table = manifest.documents
    everything = np.arange(len(table))
    return {
        "folder": str(folder),
        "name": manifest.name,
        "digest": manifest.digest,
        "schema_version": SCHEMA_VERSION,
        "vocabulary": manifest.vocabulary.model_dump(mode="json"),
        "shards": len(manifest.shards),
        "shard_bytes": sum(shard.size for shard in manifest.shards),
        **_counts(table, everything),
        "splits": _by_split(table, everything),
        "groups": _shared_groups(table),
        "sources": {source.name: _source(manifest, source.name) for source in manifest.sources},
    }


def _source(manifest: Manifest, name: str) -> dict[str, Any]:
    table = manifest.documents
    entry = next(source for source in manifest.sources if source.name == name)
    code = table.sources.index(name) if name in table.sources else -1
    places = np.flatnonzero(table.source_index == code)
    licences, values = table.codes("licence")
    return {
        "kind": entry.kind,
        "origin": entry.origin,
        "licences": {values[code]: int(count) for code, count in _tally(licences[places])},
        **_counts(table, places),
        "splits": _by_split(table, places),
        "lengths": _lengths(table.num_tokens[places]),
    }


def _counts(table: DocumentTable, places: np.ndarray) -> dict[str, Any]:
    num_tokens, num_bytes = table.num_tokens[places], table.num_bytes[places]
    content = int(num_tokens.sum()) - 2 * len(places)  # bos and eos stand for no text
    return {
        "documents": len(places),
        "bytes": int(num_bytes.sum()),
        "tokens": int(num_tokens.sum()),
        "bytes_per_token": float(num_bytes.sum() / content) if content else None,
        "shortest_tokens": int(num_tokens.min()) if len(places) else None,
        "median_tokens": float(np.median(num_tokens)) if len(places) else None,
        "longest_tokens": int(num_tokens.max()) if len(places) else None,
    }


def _by_split(table: DocumentTable, places: np.ndarray) -> dict[str, dict[str, int]]:
    counts = {}
    for split in _SPLITS:
        inside = places[table.is_train[places] == (split == "train")]
        counts[split] = {
            "documents": len(inside),
            "bytes": int(table.num_bytes[inside].sum()),
            "tokens": int(table.num_tokens[inside].sum()),
        }
    return counts


def _lengths(num_tokens: np.ndarray) -> list[dict[str, int]]:
    if not len(num_tokens):
        return []
    bins = np.frexp(num_tokens.astype(np.float64))[1] - 1  # floor of the logarithm to base 2, exact
    documents = np.bincount(bins)
    tokens = np.zeros(len(documents), dtype=np.int64)
    np.add.at(tokens, bins, num_tokens)
    return [
        {"from_tokens": 2**power, "documents": int(documents[power]), "tokens": int(tokens[power])}
        for power in range(int(bins.min()), len(documents))
    ]


def _shared_groups(table: DocumentTable) -> dict[str, int]:
    """Groups of more than one document, and the documents in them."""
    import pyarrow.compute as pc

    counts = pc.value_counts(table.rows.column("group")).field("counts").to_numpy()
    return {"shared": int((counts > 1).sum()), "documents": int(counts[counts > 1].sum())}


def _tally(codes: np.ndarray) -> list[tuple[int, int]]:
    values, counts = np.unique(codes, return_counts=True)
    return sorted(zip(values.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1])
