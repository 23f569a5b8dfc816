"""From a corpus recipe to a corpus on disk, stage by stage; nothing half-written ever stands under its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.data_pipeline import statistics
from longspan.data_pipeline.build.measuring import held_out_figures, similar_documents
from longspan.data_pipeline.build.packing import entries_of, move_shards, shard_pieces, tokenizer_piece
from longspan.data_pipeline.build.pieces import Workers, output_of
from longspan.data_pipeline.build.reading import Document, documents_of, reading_piece
from longspan.data_pipeline.build.splitting import Splitting, check_held_out, split_documents
from longspan.data_pipeline.build.workplace import (
    Workplace,
    check_target,
    is_corpus,
    publish,
    workplace,
    write_synced,
)
from longspan.data_pipeline.corpus_config import CorpusConfig
from longspan.data_pipeline.manifest import (
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    DocumentEntry,
    Manifest,
    SourceEntry,
    Split,
    vocabulary_entry,
)
from longspan.data_pipeline.regular_files import read_regular
from longspan.data_pipeline.tokenization import load_tokenizer
from longspan.data_pipeline.verify import verify_corpus
from longspan.errors import LongspanError


@dataclass(frozen=True)
class BuildResult:
    """What a build left in `folder`; `outcome` is built, reused or replaced, `statistics` is statistics.json."""

    folder: Path
    manifest: Manifest
    outcome: str
    statistics: dict[str, Any]
    notes: list[str]


def no_bar(stage: str, done: int, total: int) -> None:
    """Shows nothing; takes the name of a stage, and bytes done of bytes in all."""


def build_corpus(
    config: CorpusConfig,
    out: Path,
    progress: Callable[[str], None],
    bar: Callable[[str, int, int], None] = no_bar,
    processes: int = 1,
) -> BuildResult:
    """Write the corpus of `config` to `out`. A build that was killed goes on where it was; the result is the same.

    Args:
        config: the recipe; its own `out` is not looked at.
        out: folder to make. An identical corpus there is reused, another corpus replaced, anything else refused.
        progress: told of each part of the work, one line at a time.
        bar: told often of the stage, the bytes done and the bytes in all; the total of reading is a guess.
        processes: at most so many at once. Above 1, a script that calls this needs `if __name__ == "__main__":`.

    Raises:
        UsageError: an input is missing or does not fit; nothing was written.
        DataError: a source does not hold what its recipe says, or the disk refused the write.
    """
    out = out.resolve()
    check_target(out, config)
    with workplace(out) as place, Workers(place.spool, processes, bar, progress) as workers:
        documents, read = _read(config, place, workers, progress)
        check_held_out(config, documents)
        splitting = split_documents(
            config, documents, similar_documents(config.dedupe, documents, place.spool, workers)
        )
        manifest = _pack(config, documents, splitting, read, place, workers)
        notes = [note for result in read for note in result["notes"]] + splitting.notes
        existing = _identical(out, manifest)
        if existing is not None:
            return BuildResult(out, manifest, "reused", existing, notes)
        progress("measuring the held-out documents")
        held_out = [document for document, split in zip(documents, splitting.split, strict=True) if split == "held_out"]
        figures = _statistics(config, manifest, splitting, read, held_out_figures(held_out, workers))
        write_synced(place.building / statistics.STATISTICS_NAME, (json.dumps(figures, indent=2) + "\n").encode())
        write_synced(place.building / MANIFEST_NAME, manifest.to_json().encode())
        outcome = publish(place)
    return BuildResult(out, manifest, outcome, figures, notes)


def _read(
    config: CorpusConfig, place: Workplace, workers: Workers, progress: Callable[[str], None]
) -> tuple[list[Document], list[dict[str, Any]]]:
    for source in config.sources:
        progress(f"reading {source.name} ({source.kind})")
    pieces = [reading_piece(source) for source in config.sources]
    results = workers.run("reading sources", pieces)
    return list(documents_of(config.sources, pieces, results, place.spool)), results


def _pack(
    config: CorpusConfig,
    documents: list[Document],
    splitting: Splitting,
    read: list[dict[str, Any]],
    place: Workplace,
    workers: Workers,
) -> Manifest:
    """Make the tokenizer and all shards in the folder of the build; returns the manifest, which is not written yet."""
    kept: list[tuple[Document, Split, str]] = [
        (document, split, group)
        for document, split, group in zip(documents, splitting.split, splitting.group, strict=True)
        if split is not None
    ]
    training = [document for document, split, _ in kept if split == "train"]
    making = tokenizer_piece(config.tokenizer, training)
    workers.run("making the tokenizer", [making])
    tokenizer = output_of(place.spool, making)
    pieces, places = shard_pieces(
        config, [row[0] for row in kept], [row[1] for row in kept], [row[2] for row in kept], tokenizer
    )
    shards, entries = entries_of(workers.run("writing shards", pieces), places)
    move_shards(pieces, place.spool, place.building)
    vocabulary = vocabulary_entry(load_tokenizer(tokenizer))
    if vocabulary.kind != "bytes":
        shutil.copytree(tokenizer, place.building / TOKENIZER_FOLDER)
    sources = [
        SourceEntry(name=source.name, kind=source.kind, licence=source.licence, origin=result["origin"])
        for source, result in zip(config.sources, read, strict=True)
    ]
    return Manifest.create(place.out, config.name, sources, shards, entries, vocabulary)


def _statistics(
    config: CorpusConfig,
    manifest: Manifest,
    splitting: Splitting,
    read: list[dict[str, Any]],
    held_out: dict[str, Any] | None,
) -> dict[str, Any]:
    def row(entry: DocumentEntry) -> tuple[str, str, int, int]:
        return entry.source, entry.split, entry.num_bytes, entry.num_tokens

    counts = statistics.counts(row(entry) for entry in manifest.documents)
    left_out: dict[str, dict[str, Any]] = {}
    for source, result in zip(config.sources, read, strict=True):
        cells = {**result["left_out"], **splitting.left_out.get(source.name, {})}
        if cells:
            left_out[source.name] = {what: {"count": cell[0], "example": cell[1]} for what, cell in cells.items()}
    return {
        "counts": counts,
        "totals": statistics.totals(counts),
        "duplicates": splitting.duplicates,
        "left_out": left_out,
        "held_out": held_out,
    }


def _identical(out: Path, manifest: Manifest) -> dict[str, Any] | None:
    """The statistics of the corpus at `out` if it is whole and the same as `manifest`, else None."""
    if not is_corpus(out):
        return None
    try:
        if Manifest.load(out).digest != manifest.digest:
            return None
        verify_corpus(out)
        figures = json.loads(read_regular(out / statistics.STATISTICS_NAME))
    except (LongspanError, OSError, ValueError):
        return None
    return figures if isinstance(figures, dict) else None
