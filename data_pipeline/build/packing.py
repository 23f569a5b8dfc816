"""Documents into shards: the division is fixed by sizes alone, so that every shard is a piece of work of its own."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from longspan.data_pipeline.build.pieces import Piece, Tick, output_of
from longspan.data_pipeline.build.reading import Document, read_text
from longspan.data_pipeline.corpus_config import CorpusConfig
from longspan.data_pipeline.manifest import DocumentEntry, ShardEntry, Split
from longspan.data_pipeline.shards import PackedDocument, ShardWriter
from longspan.data_pipeline.tokenization import load_tokenizer, make_tokenizer
from longspan.data_pipeline.tokenization.base import Tokenizer
from longspan.data_pipeline.tokenization.config import BpeTokenizerConfig, TokenizerConfig

_TOKENIZER: TypeAdapter[Any] = TypeAdapter(TokenizerConfig)
_SAMPLE_BYTES = 2**16  # pieces of text that a trained tokenizer sees


def shard_pieces(
    config: CorpusConfig, documents: Sequence[Document], splits: Sequence[Split], groups: Sequence[str], tokenizer: Path
) -> tuple[list[Piece], list[list[int]]]:
    """One piece of work per shard, and the places of its documents.

    Args:
        documents, splits, groups: one entry a document, in the order of the manifest.
        tokenizer: folder of a saved tokenizer.
    """
    pieces, places = [], []
    for split in ("train", "held_out"):
        members = [place for place, value in enumerate(splits) if value == split]
        for number, shard in enumerate(_divided(members, documents, config.shard_bytes)):
            rows = [
                [
                    document.id,
                    config.sources[document.source].name,
                    group,
                    document.licence,
                    str(document.file),
                    document.offset,
                    document.size,
                    document.sha256,
                ]
                for document, group in ((documents[place], groups[place]) for place in shard)
            ]
            payload = {"split": split, "number": number, "tokenizer": str(tokenizer), "documents": rows}
            pieces.append(Piece(write_shard, payload, sum(documents[place].size for place in shard), _wrote))
            places.append(shard)
    return pieces, places


def _divided(members: list[int], documents: Sequence[Document], shard_bytes: int) -> Iterator[list[int]]:
    shard: list[int] = []
    used = 0
    for member in members:
        if shard and used + documents[member].size > shard_bytes:
            yield shard
            shard, used = [], 0
        shard.append(member)
        used += documents[member].size
    if shard:
        yield shard


def write_shard(payload: dict[str, Any], output: Path, tick: Tick) -> dict[str, Any]:
    """Write one shard into the folder `output`; returns its entry and those of its documents, in order."""
    output.mkdir(exist_ok=True)
    tokenizer = _loaded(payload["tokenizer"])
    # never closed by the writer: the division is done, whatever the tokens take
    writer = ShardWriter(output, payload["split"], sys.maxsize, tokenizer, first_shard=payload["number"])
    entries = []
    for document_id, source, group, licence, file, offset, size, sha256 in payload["documents"]:
        text = read_text(Path(file), offset, size, sha256)
        document = PackedDocument(document_id, source, group, payload["split"], licence, text)
        entries.append(writer.add(document).model_dump(mode="json"))
        tick(size)
    (shard,) = writer.close()
    return {"shard": shard.model_dump(mode="json"), "documents": entries}


def entries_of(
    results: Sequence[dict[str, Any]], places: Sequence[list[int]]
) -> tuple[list[ShardEntry], list[DocumentEntry]]:
    """All shards, and all documents in the order of the manifest."""
    shards = [ShardEntry.model_validate(result["shard"]) for result in results]
    numbered = [
        (place, entry)
        for result, shard in zip(results, places, strict=True)
        for place, entry in zip(shard, result["documents"], strict=True)
    ]
    numbered.sort(key=lambda pair: pair[0])
    return shards, [DocumentEntry.model_validate(entry) for _, entry in numbered]


def move_shards(pieces: Sequence[Piece], spool: Path, building: Path) -> None:
    """Move finished shards from their pieces into the corpus's folder."""
    for piece in pieces:
        for file in output_of(spool, piece).iterdir():
            file.rename(building / file.name)


@functools.lru_cache(maxsize=1)
def _loaded(folder: str) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    tokenizer.threads = 1  # each process writes a shard of its own
    return tokenizer


def _wrote(result: dict[str, Any]) -> str:
    shard = result["shard"]
    return f"wrote {shard['url']}: {len(result['documents']):,} documents, {shard['size']:,} bytes"


def tokenizer_piece(config: TokenizerConfig, training: Sequence[Document]) -> Piece:
    """The work of making the tokenizer; `training`: the documents that it may be trained on."""
    payload: dict[str, Any] = {"config": config.model_dump(mode="json")}
    size = 1
    if isinstance(config, BpeTokenizerConfig) and config.path is None:
        rows = [[str(document.file), document.offset, document.size, document.sha256] for document in training]
        payload["documents"] = rows
        size = min(config.train_bytes, sum(document.size for document in training))
    elif getattr(config, "path", None) is not None:
        payload["state"] = _state(Path(getattr(config, "path", "")).expanduser())
    return Piece(save_tokenizer, payload, size)


def save_tokenizer(payload: dict[str, Any], output: Path, tick: Tick) -> dict[str, Any]:
    """Make a tokenizer and save it to the folder `output`; returns its name, kind and digest.

    Raises:
        UsageError: as `make_tokenizer`.
    """
    config = _TOKENIZER.validate_python(payload["config"])
    texts = _sample(payload.get("documents", []), getattr(config, "train_bytes", 0), tick)
    tokenizer = make_tokenizer(config, texts)
    tokenizer.save(output)
    return {"name": tokenizer.name, "kind": tokenizer.kind, "digest": tokenizer.digest}


def _sample(documents: list[list[Any]], num_bytes: int, tick: Tick) -> Iterator[bytes]:
    """An even sample of all documents in pieces of 64 KiB, chosen by hash: the same one every time.

    Every document gives the same share of its pieces, so that the sample mixes sources as the corpus does.
    """
    share = min(1.0, num_bytes / max(1, sum(size for _, _, size, _ in documents)))
    left = num_bytes
    for file, offset, size, sha256 in documents:
        for start in range(0, size, _SAMPLE_BYTES):
            digest = hashlib.blake2b(f"{sha256}:{start}".encode(), digest_size=8).digest()
            if int.from_bytes(digest, "big") >= share * 2**64 or left <= 0:
                continue
            text = _between_words(read_text(Path(file), offset + start, min(_SAMPLE_BYTES, size - start, left)))
            left -= len(text)
            tick(len(text))
            yield text


def _between_words(text: bytes) -> bytes:
    """The text without the cut words, and so without cut characters, at its ends; as it is if there is no blank."""
    first, last = text.find(b" "), text.rfind(b" ")
    return text[first + 1 : last] if last > first >= 0 else text.decode("utf-8", errors="ignore").encode()


def _state(path: Path) -> str:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()
