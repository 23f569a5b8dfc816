"""Tar shards in the WebDataset layout, byte for byte the same whenever the documents are the same."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from longspan.data_pipeline.entries import DocumentEntry, ShardEntry, Split
from longspan.data_pipeline.shard_layout import archive_size, sample_members
from longspan.data_pipeline.tokenization.base import Encoded, Tokenizer

SHARD_NAME = re.compile(r"(train|held_out)-\d{5,}\.tar")


@dataclass(frozen=True)
class PackedDocument:
    """A document that is ready for a shard. `text` may be empty if its tokens are handed over beside it."""

    id: str
    source: str
    group: str
    split: Split
    licence: str
    text: bytes


class ShardWriter:
    """Writes documents of one split one by one; keeps none of them.

    Several writers may fill one folder at the same time if their shard numbers cannot meet.
    """

    def __init__(
        self,
        folder: Path,
        split: Split,
        shard_bytes: int,
        tokenizer: Tokenizer | None = None,
        *,
        first_shard: int = 0,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        """
        Args:
            folder: exists; shards are written straight into it as SPLIT-00000.tar.
            shard_bytes: a shard is closed before a document would take its text, or its tokens, above this.
            tokenizer: of the corpus; None: bytes.
            first_shard: number in the name of the first shard. progress: told of each shard.
        """
        self._folder, self._split, self._shard_bytes = folder, split, shard_bytes
        self._tokenizer = None if tokenizer is None or tokenizer.kind == "bytes" else tokenizer
        self._first, self._progress = first_shard, progress
        self._shards: list[ShardEntry] = []
        self._open: _OpenShard | None = None

    def add(self, document: PackedDocument, encoded: Encoded | None = None) -> DocumentEntry:
        """Write one document; returns its place and hash.

        Args:
            document: of this writer's split.
            encoded: its tokens if they are known already; encoded here if None. Of no use to a byte corpus.

        Raises:
            ValueError: the document is of another split.
        """
        if document.split != self._split:
            raise ValueError(f"document {document.id} is {document.split}, the shards are {self._split}")
        payload, num_tokens, num_bytes = self._payload(document, encoded)
        size = sum(len(content) for content in payload.values())
        if self._open is not None and self._open.used + size > self._shard_bytes:
            self._close_shard()
        if self._open is None:
            number = self._first + len(self._shards)
            self._open = _OpenShard(self._folder / f"{self._split}-{number:05d}.tar")
        offsets = self._open.write(document, payload)
        digest = hashlib.sha256()
        for content in payload.values():
            digest.update(content)
        main = "txt" if self._tokenizer is None else "ids"
        return DocumentEntry(
            id=document.id,
            source=document.source,
            group=document.group,
            split=document.split,
            licence=document.licence,
            num_tokens=num_tokens,
            num_bytes=num_bytes,
            shard=self._open.file.name,
            offset=offsets[main],
            lengths_offset=offsets.get("len", 0),
            size=len(payload[main]),
            sha256=digest.hexdigest(),
        )

    def close(self) -> list[ShardEntry]:
        """Finish the last shard; returns all of them."""
        if self._open is not None:
            self._close_shard()
        return self._shards

    def _payload(self, document: PackedDocument, encoded: Encoded | None) -> tuple[dict[str, bytes], int, int]:
        """{extension: content} of the members that hold the document, in their order; its tokens; its bytes."""
        if self._tokenizer is None:
            return {"txt": document.text}, len(document.text) + 2, len(document.text)
        encoded = encoded or self._tokenizer.encode(document.text)
        ids = encoded.ids.astype(self._tokenizer.token_dtype.newbyteorder("<"), casting="equiv", copy=False)
        lengths = encoded.num_bytes.astype("<u2", casting="equiv", copy=False)
        payload = {"ids": ids.tobytes(), "len": lengths.tobytes()}
        return payload, len(ids), int(lengths.sum(dtype=np.int64))

    def _close_shard(self) -> None:
        assert self._open is not None
        shard = self._open.close()
        self._shards.append(shard)
        self._progress(f"wrote {shard.url}: {self._open.count} documents, {shard.size:,} bytes")
        self._open = None


class _OpenShard:
    """A shard that is being written, hashed as it passes so that it is read only once."""

    def __init__(self, file: Path) -> None:
        self.file, self.used, self.count = file, 0, 0
        self._stream: BinaryIO = file.open("wb")
        self._sha256 = hashlib.sha256()
        self._end = 0

    def write(self, document: PackedDocument, payload: dict[str, bytes]) -> dict[str, int]:
        """Append one sample; returns the offset of each member's content by extension."""
        sizes = {extension: len(content) for extension, content in payload.items()}
        members = sample_members(self._end, self.count, document.id, document.source, document.licence, sizes)
        for member in members:
            content = payload[member.extension] if member.content is None else member.content
            self._write(member.header)
            self._write(content)
            self._write(bytes(member.end - member.offset - member.size))
        self.count += 1
        self.used += sum(sizes.values())
        return {member.extension: member.offset for member in members}

    def close(self) -> ShardEntry:
        self._write(bytes(archive_size(self._end) - self._end))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return ShardEntry(url=self.file.name, size=self._end, sha256=self._sha256.hexdigest())

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._sha256.update(data)
        self._end += len(data)


def write_shards(
    folder: Path,
    documents: Iterable[PackedDocument],
    shard_bytes: int,
    progress: Callable[[str], None],
    tokenizer: Tokenizer | None = None,
) -> tuple[list[ShardEntry], list[DocumentEntry]]:
    """Write all documents, each split into shards of its own; returns both lists in the order of `documents`.

    Args:
        documents: may come from an iterator; none is kept. The rest as `ShardWriter`.
    """
    writers = {
        split: ShardWriter(folder, split, shard_bytes, tokenizer, progress=progress) for split in ("train", "held_out")
    }
    entries = [writers[document.split].add(document) for document in documents]
    return [shard for writer in writers.values() for shard in writer.close()], entries
