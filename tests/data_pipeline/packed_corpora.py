"""Small corpora straight from texts, without a recipe: bytes or tokens, in a folder of their own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.data_pipeline.manifest import (
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    Manifest,
    SourceEntry,
    vocabulary_entry,
)
from longspan.data_pipeline.shards import PackedDocument, write_shards
from longspan.data_pipeline.tokenization import make_tokenizer
from longspan.data_pipeline.tokenization.base import Tokenizer
from longspan.data_pipeline.tokenization.config import BpeTokenizerConfig


def counting(start: int, size: int) -> bytes:
    """A text of `size` bytes in which no piece of a few bytes comes twice."""
    return b"".join(b"%03d," % number for number in range(start, start + size))[:size]


# Lengths around the edges that matter with quanta of 8 and segments of 32: a byte, a block, a segment, and beyond.
TEXTS = {
    "letters/a.txt": b"x",
    "letters/b.txt": "täglich Brot\n".encode() * 3,
    "letters/c.txt": counting(100, 130),
    "letters/d.txt": counting(200, 6),
    "letters/e.txt": counting(300, 30),
    "letters/f.txt": counting(400, 31),
    "poems/g.txt": counting(500, 441),
    "poems/h.txt": b"h" * 64,
    "poems/i.txt": counting(800, 200),
}
HELD_OUT = ("poems/h.txt",)


@dataclass(frozen=True)
class Packed:
    """A corpus on disk."""

    folder: Path
    manifest: Manifest


def pack(
    folder: Path,
    texts: dict[str, bytes] = TEXTS,
    held_out: tuple[str, ...] = HELD_OUT,
    groups: dict[str, str] | None = None,
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = 10_000,
) -> Packed:
    """Write `texts`, {source/name: text}, as a corpus."""
    folder.mkdir(parents=True)
    documents = [
        PackedDocument(
            id=name,
            source=name.split("/")[0],
            group=(groups or {}).get(name, name),
            split="held_out" if name in held_out else "train",
            licence="CC0-1.0",
            text=text,
        )
        for name, text in texts.items()
    ]
    shards, entries = write_shards(folder, documents, shard_bytes, lambda line: None, tokenizer)
    sources = [
        SourceEntry(name=name, kind="folder", licence="CC0-1.0", origin="here")
        for name in dict.fromkeys(document.source for document in documents)
    ]
    vocabulary = None
    if tokenizer is not None and tokenizer.kind != "bytes":
        tokenizer.save(folder / TOKENIZER_FOLDER)
        vocabulary = vocabulary_entry(tokenizer)
    manifest = Manifest.create(folder, "packed", sources, shards, entries, vocabulary)
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    return Packed(folder, manifest)


def small_bpe() -> Tokenizer:
    """A tokenizer of a few hundred tokens, trained on the spot."""
    return make_tokenizer(BpeTokenizerConfig(kind="bpe", vocab_size=290), TEXTS.values())


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Let `change` edit the manifest as a dictionary, and sign it anew, as someone with bad intentions would."""
    file = folder / MANIFEST_NAME
    raw = json.loads(file.read_text())
    change(raw)
    raw.pop("digest")
    lines = ["{"]
    for name, value in raw.items():
        if isinstance(value, list):
            lines += [f"  {json.dumps(name)}: [", *[f"    {json.dumps(item)}," for item in value]]
            if value:
                lines[-1] = lines[-1][:-1]
            lines.append("  ],")
        else:
            lines.append(f"  {json.dumps(name)}: {json.dumps(value)},")
    text = "\n".join(lines) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(f'{text}  "digest": "{digest}"\n}}\n')
