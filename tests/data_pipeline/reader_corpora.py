"""Corpora of random token ids, written without tokenizing anything: their ids and lengths are known to the tests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from longspan.data_pipeline.manifest import Manifest, SourceEntry, vocabulary_entry
from longspan.data_pipeline.shards import PackedDocument, ShardWriter
from longspan.data_pipeline.tokenization.base import Encoded
from longspan.data_pipeline.tokenization.description import save_files

FILES = {"ids.txt": b"random ids stand for no text"}


@dataclass
class RandomIds:
    """A tokenizer in name only: documents are written with their ids."""

    size: int = 50_000
    kind: str = "bpe"
    name: str = "random"
    digest: str = hashlib.sha256(b"random ids").hexdigest()
    token_dtype: np.dtype = field(default_factory=lambda: np.dtype(np.uint16))

    @property
    def padded_size(self) -> int:
        """Rows of an embedding."""
        return -(-self.size // 128) * 128

    @property
    def bos(self) -> int:
        """First of the three last ids."""
        return self.size - 3

    @property
    def eos(self) -> int:
        """Second of the three last ids."""
        return self.size - 2

    @property
    def pad(self) -> int:
        """Last id."""
        return self.size - 1


def random_document(tokenizer: RandomIds, seed: int, num_tokens: int) -> Encoded:
    """Ids and lengths of a document of `num_tokens` tokens, bos and eos among them."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, tokenizer.size - 3, num_tokens).astype(tokenizer.token_dtype)
    lengths = rng.integers(1, 9, num_tokens).astype(np.uint16)
    ids[0], ids[-1] = tokenizer.bos, tokenizer.eos
    lengths[[0, -1]] = 0
    return Encoded(ids, lengths)


def write_corpus(
    folder: Path,
    num_tokens: Iterable[int],
    *,
    shard_bytes: int = 4000,
    tokenizer: RandomIds | None = None,
    num_sources: int = 2,
) -> Manifest:
    """A corpus of training documents of these lengths; document i is made from seed i and belongs to source i mod S."""
    tokenizer = tokenizer or RandomIds()
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, "train", shard_bytes, tokenizer)  # type: ignore[arg-type]
    entries = []
    for number, length in enumerate(num_tokens):
        source = f"source{number % num_sources}"
        name = f"{source}/{number}"
        document = PackedDocument(name, source, name, "train", "CC0-1.0", b"")
        entries.append(writer.add(document, random_document(tokenizer, number, length)))
    sources = [SourceEntry(name=f"source{i}", kind="folder", licence="CC0-1.0", origin="r") for i in range(num_sources)]
    save_files(folder / "tokenizer", tokenizer, FILES)  # type: ignore[arg-type]
    manifest = Manifest.create(
        folder,
        "random",
        sources,
        writer.close(),
        entries,
        vocabulary_entry(tokenizer),  # type: ignore[arg-type]
    )
    with (folder / "manifest.json").open("wb") as stream:
        manifest.write(stream)
    return Manifest.load(folder)
