"""Figures over documents on disk, in batches that several processes can share: signatures, and the held-out texts."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longspan.data_pipeline import statistics
from longspan.data_pipeline.build.pieces import Piece, Tick, Workers, output_of
from longspan.data_pipeline.build.reading import Document, read_text
from longspan.data_pipeline.corpus_config import DedupeConfig
from longspan.data_pipeline.dedupe import SIGNATURE_VERSION, near_duplicates, signature
from longspan.errors import DataError

_SIGNED_BYTES = 2**25
_COMPRESSED_BYTES = 2**22


def similar_documents(
    config: DedupeConfig, documents: Sequence[Document], folder: Path, workers: Workers
) -> list[list[int]]:
    """Places of near-duplicates in `documents`, a list for each group of them; none if the recipe does not look.

    Raises:
        DataError: signatures that were written before are damaged.
    """
    if not config.enabled:
        return []
    rule = {**config.model_dump(mode="json", include={"shingle_words", "num_perm"}), "version": SIGNATURE_VERSION}
    pieces = [Piece(sign, {"rule": rule, "documents": rows}, size) for rows, size in _batches(documents, _SIGNED_BYTES)]
    results = workers.run("comparing documents", pieces)
    parts = [np.load(output_of(folder, piece), allow_pickle=False) for piece in pieces]
    if [zlib.crc32(part.tobytes()) for part in parts] != [result["crc32"] for result in results]:
        raise DataError(f"the signatures in {folder} are damaged, perhaps by a crash. Start the build again.")
    return near_duplicates(np.concatenate(parts), config)


def sign(payload: dict[str, Any], output: Path, tick: Tick) -> dict[str, Any]:
    """Write the signatures of some documents to `output`: npy, uint32 [documents, num_perm]."""
    rule = {name: value for name, value in payload["rule"].items() if name != "version"}
    config = DedupeConfig.model_validate(rule)
    rows = np.empty((len(payload["documents"]), config.num_perm), dtype=np.uint32)
    for place, (file, offset, size, sha256) in enumerate(payload["documents"]):
        rows[place] = signature(read_text(Path(file), offset, size, sha256), config)
        tick(size)
    with output.open("wb") as stream:
        np.save(stream, rows, allow_pickle=False)
    return {"crc32": zlib.crc32(rows.tobytes())}


def held_out_figures(documents: Sequence[Document], workers: Workers) -> dict[str, Any] | None:
    """Entropy and compressed size of the held-out documents (`statistics.held_out_statistics`); None without any."""
    batches = _batches(documents, _COMPRESSED_BYTES)
    results = workers.run(
        "measuring the held-out documents", [Piece(compress, {"documents": rows}, size) for rows, size in batches]
    )
    if not results:
        return None
    histogram = np.sum([result["histogram"] for result in results], axis=0)
    return statistics.held_out_statistics(len(documents), histogram, sum(result["xz_bytes"] for result in results))


def compress(payload: dict[str, Any], output: Path, tick: Tick) -> dict[str, Any]:
    """Byte histogram of some documents, and what `xz -9` makes of each; writes nothing to `output`."""
    histogram = np.zeros(256, dtype=np.int64)
    xz_bytes = 0
    for file, offset, size, _ in payload["documents"]:
        text = read_text(Path(file), offset, size)
        histogram += statistics.byte_histogram(text)
        xz_bytes += statistics.xz_bytes(text)
        tick(size)
    return {"histogram": histogram.tolist(), "xz_bytes": xz_bytes}


def _batches(documents: Sequence[Document], most_bytes: int) -> Iterator[tuple[list[list[Any]], int]]:
    """(rows, bytes) of runs of documents up to `most_bytes`."""
    rows: list[list[Any]] = []
    used = 0
    for document in documents:
        if rows and used + document.size > most_bytes:
            yield rows, used
            rows, used = [], 0
        rows.append([str(document.file), document.offset, document.size, document.sha256])
        used += document.size
    if rows:
        yield rows, used
