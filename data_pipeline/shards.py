"""Tar shards in the WebDataset layout, byte for byte the same whenever the documents are the same.

Each document is one sample of two members: `KEY.json` (id, source, licence) and `KEY.txt` (the UTF-8 text).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.data_pipeline.manifest import DocumentEntry, ShardEntry, Split
from longspan.data_pipeline.vocabulary import ByteVocabulary

SHARD_NAME = re.compile(r"(train|held_out)-\d{5,}\.tar")
_TAR_BLOCK = 512


@dataclass(frozen=True)
class PackedDocument:
    """A document that is ready for a shard."""

    id: str
    source: str
    group: str
    split: Split
    licence: str
    text: bytes


class _HashingFile(io.RawIOBase):
    """Writes through to `file` and hashes what passes, so that a shard is read only once."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return int(self._file.write(data))


def write_shards(
    folder: Path, documents: Iterable[PackedDocument], shard_bytes: int, progress: Callable[[str], None]
) -> tuple[list[ShardEntry], list[DocumentEntry]]:
    """Write all documents, each split into shards of its own; returns both lists in the order of `documents`.

    Args:
        folder: exists; shards are written straight into it as SPLIT-00000.tar.
        shard_bytes: a shard is closed before a document would take its text above this.
        progress: told of each shard.
    """
    documents = list(documents)
    shards: list[ShardEntry] = []
    entries: dict[str, DocumentEntry] = {}
    for split in ("train", "held_out"):
        members = [(index, document) for index, document in enumerate(documents) if document.split == split]
        for number, members_of_shard in enumerate(_divide(members, shard_bytes)):
            shard, written = _write_shard(folder / f"{split}-{number:05d}.tar", members_of_shard)
            shards.append(shard)
            entries.update((entry.id, entry) for entry in written)
            progress(f"wrote {shard.url}: {len(written)} documents, {shard.size:,} bytes")
    return shards, [entries[document.id] for document in documents]


def _divide(members: list[tuple[int, PackedDocument]], shard_bytes: int) -> list[list[tuple[int, PackedDocument]]]:
    shards: list[list[tuple[int, PackedDocument]]] = []
    used = 0
    for member in members:
        size = len(member[1].text)
        if not shards or used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(member)
        used += size
    return shards


def _write_shard(file: Path, members: list[tuple[int, PackedDocument]]) -> tuple[ShardEntry, list[DocumentEntry]]:
    entries = []
    with file.open("wb") as raw:
        hashing = _HashingFile(raw)
        with _tar_writer(hashing) as writer:
            for index, document in members:
                writer.write(_sample(index, document.id, document.source, document.licence, document.text))
                size = len(document.text)
                entries.append(
                    DocumentEntry(
                        id=document.id,
                        source=document.source,
                        group=document.group,
                        split=document.split,
                        licence=document.licence,
                        num_tokens=len(ByteVocabulary.encode(document.text)),
                        num_bytes=size,
                        shard=file.name,
                        offset=writer.tarstream.offset - _padded(size),
                        size=size,
                        sha256=hashlib.sha256(document.text).hexdigest(),
                    )
                )
        raw.flush()
        os.fsync(raw.fileno())
    return ShardEntry(url=file.name, size=hashing.size, sha256=hashing.sha256.hexdigest()), entries


def render_sample(index: int, entry: DocumentEntry, text: bytes) -> bytes:
    """The exact bytes of a document's sample in its shard, from its first header to its padded text.

    Args:
        index: the document's place in the manifest.
        text: its text.
    """
    buffer = io.BytesIO()
    with _tar_writer(buffer) as writer:
        writer.write(_sample(index, entry.id, entry.source, entry.licence, text))
        length = writer.tarstream.offset
    return buffer.getvalue()[:length]


def _tar_writer(file: Any) -> Any:
    os.environ["WDS_SECURE"] = "1"  # read by webdataset when it is imported: no pickled fields, no `pipe:` addresses
    import webdataset  # brings torch, which `data verify` does without

    # fixed time, owner and mode: nothing of the machine or the moment gets into a shard
    return webdataset.TarWriter(file, encoder=False, mtime=0, user="longspan", group="longspan", mode=0o444)


def _sample(index: int, document_id: str, source: str, licence: str, text: bytes) -> dict[str, Any]:
    metadata = json.dumps({"id": document_id, "source": source, "licence": licence}, sort_keys=True)
    # a key without dots (WebDataset cuts names at the first one), short enough for a tar header
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", document_id)[:48]
    return {"__key__": f"{index:08d}-{slug}", "json": metadata.encode(), "txt": text}


def _padded(size: int) -> int:
    return -(-size // _TAR_BLOCK) * _TAR_BLOCK
