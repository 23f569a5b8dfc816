"""A corpus of random token ids on disk, for measuring how fast it is read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from longspan.data_pipeline.manifest import (
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    DocumentEntry,
    Manifest,
    SourceEntry,
    vocabulary_entry,
)
from longspan.data_pipeline.shards import PackedDocument, ShardWriter
from longspan.data_pipeline.tokenization.base import Encoded, Tokenizer
from longspan.data_pipeline.tokenization.description import save_files

MEAN_DOCUMENT_TOKENS = 65_536
_SHARD_BYTES = 64 * 2**20
_LOWEST, _HIGHEST = 1 / 64, 8.0  # shortest and longest document, of the mean
_MOST_TOKEN_BYTES = 8
_FILES = {"ids.txt": b"random ids stand for no text"}


@dataclass(frozen=True)
class _RandomIds:
    """What the corpus's manifest says of a vocabulary; nothing is encoded with it."""

    size: int = 32_128
    padded_size: int = 32_128
    kind: str = "bpe"
    name: str = "random"
    digest: str = hashlib.sha256(b"random ids").hexdigest()
    bos: int = 0
    eos: int = 1
    pad: int = 2

    @property
    def token_dtype(self) -> np.dtype:
        """Of the ids in the shards."""
        return np.dtype(np.uint16)


def make_corpus(folder: Path, tokens: int) -> Manifest:
    """Write a corpus of at least `tokens` tokens, uint16 ids and uint16 bytes of each: the same one every time.

    Lengths of documents are log-normal with a mean of 65,536 tokens; less where the corpus is so small that lanes
    would have none.

    Args:
        folder: empty or not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, rng = cast(Tokenizer, _RandomIds()), np.random.default_rng(0)
    mean = min(MEAN_DOCUMENT_TOKENS, max(64, tokens // 64))
    writer = ShardWriter(folder, "train", max(1, min(_SHARD_BYTES, tokens // 2)), vocabulary)
    entries: list[DocumentEntry] = []
    written = 0
    while written < tokens:
        length = int(mean * np.clip(rng.lognormal(-0.5, 1.0), _LOWEST, _HIGHEST)) + 2
        name = f"random/{len(entries)}"
        document = PackedDocument(name, "random", name, "train", "CC0-1.0", b"")
        entries.append(writer.add(document, _random_document(rng, vocabulary, length)))
        written += length
    save_files(folder / TOKENIZER_FOLDER, vocabulary, _FILES)
    source = SourceEntry(name="random", kind="folder", licence="CC0-1.0", origin="random numbers")
    manifest = Manifest.create(folder, "random", [source], writer.close(), entries, vocabulary_entry(vocabulary))
    with (folder / MANIFEST_NAME).open("wb") as stream:
        manifest.write(stream)
    return Manifest.load(folder)


def _random_document(rng: np.random.Generator, vocabulary: Tokenizer, length: int) -> Encoded:
    """Ids and lengths of `length` tokens, bos and eos among them; no other special id in between."""
    ids = rng.integers(vocabulary.pad + 1, vocabulary.size, length, dtype=np.uint16)
    lengths = rng.integers(1, _MOST_TOKEN_BYTES + 1, length, dtype=np.uint16)
    ids[0], ids[-1] = vocabulary.bos, vocabulary.eos
    lengths[[0, -1]] = 0
    return Encoded(ids, lengths)
