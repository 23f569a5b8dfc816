"""Check a corpus on disk against its manifest, and find the document and byte where it differs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longspan.data_pipeline.entries import DocumentEntry, ShardEntry
from longspan.data_pipeline.manifest import TOKENIZER_FOLDER, Manifest
from longspan.data_pipeline.regular_files import read_regular
from longspan.data_pipeline.shard_check import shard_problems
from longspan.data_pipeline.tokenization import load_tokenizer
from longspan.data_pipeline.tokenization.description import DESCRIPTION_NAME, read_description
from longspan.errors import DataError, LongspanError

_MOST_PROBLEMS_NAMED = 20
_MOST_THREADS = 8  # hashing leaves the interpreter's lock, reading does too


@dataclass(frozen=True)
class VerifyResult:
    """What was checked: shards, documents and bytes on disk."""

    manifest: Manifest
    num_bytes: int


def verify_corpus(folder: str | Path) -> VerifyResult:
    """Check every byte of every shard, the tokenizer, and that no shard is there that the manifest does not name.

    Raises:
        UsageError: there is no corpus at `folder`, of a schema that this version reads.
        DataError: something differs; names shard, document and byte offset of everything that does.
    """
    manifest = Manifest.load(folder)
    problems = _tokenizer_problems(manifest) + _unnamed_shards(manifest)
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        for found in pool.map(lambda job: shard_problems(manifest, *job), _documents_by_shard(manifest)):
            problems += found
    if problems:
        shown = problems[:_MOST_PROBLEMS_NAMED]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        lines = "\n".join(f"  {problem}" for problem in shown)
        raise DataError(
            f"the corpus at {folder} does not match its manifest:\n{lines}\n"
            f"Build it again with `longspan data build RECIPE --out {folder}`, or copy it anew."
        )
    return VerifyResult(manifest, sum(shard.size for shard in manifest.shards))


def _documents_by_shard(manifest: Manifest) -> Iterator[tuple[ShardEntry, list[DocumentEntry]]]:
    """Each shard with its documents by offset."""
    codes, urls = manifest.documents.codes("shard")
    order = np.lexsort((manifest.documents.integers("offset"), codes))
    edges = np.searchsorted(codes[order], np.arange(len(urls) + 1))
    place = {url: code for code, url in enumerate(urls)}
    for shard in manifest.shards:
        code = place.get(shard.url)
        inside = order[:0] if code is None else order[edges[code] : edges[code + 1]]
        yield shard, list(manifest.documents.take(inside))


def _unnamed_shards(manifest: Manifest) -> list[str]:
    named = {shard.url for shard in manifest.shards}
    there = sorted(file.name for file in manifest.folder.glob("*.tar"))
    return [f"shard {name}: there, but not in the manifest" for name in there if name not in named]


def _tokenizer_problems(manifest: Manifest) -> list[str]:
    """The files of the tokenizer's folder, each by name."""
    if manifest.vocabulary.kind == "bytes":
        return []
    folder = manifest.folder / TOKENIZER_FOLDER
    try:
        description = read_description(folder)
        problems = [
            f"{TOKENIZER_FOLDER}/{name}: there, but the tokenizer does not name it"
            for name in sorted(file.name for file in folder.iterdir())
            if name != DESCRIPTION_NAME and name not in description.files
        ]
        if read_regular(folder / DESCRIPTION_NAME) != description.model_dump_json(indent=2).encode() + b"\n":
            problems.append(f"{TOKENIZER_FOLDER}/{DESCRIPTION_NAME}: not as Longspan writes it; it was changed")
        digest = load_tokenizer(folder).digest
    except (LongspanError, OSError) as error:
        return [f"{TOKENIZER_FOLDER}: {error}"]
    if digest != manifest.vocabulary.digest:
        problems.append(
            f"{TOKENIZER_FOLDER}: its files make a tokenizer of digest {digest[:16]}, "
            f"the manifest says {manifest.vocabulary.digest[:16]}"
        )
    return problems
