"""What the shards of a corpus hold of a document: its bytes as they are stored, and its text."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from longspan.data_pipeline.entries import DocumentEntry
from longspan.data_pipeline.shard_scan import ShardFile
from longspan.data_pipeline.tokenization.base import Tokenizer
from longspan.errors import DataError

_LENGTH_BYTES = 2


def stored(folder: Path, entry: DocumentEntry, is_text: bool) -> tuple[bytes, bytes]:
    """The document's text, or its token ids, and in that case the bytes of each token (uint16); else nothing.

    Args:
        folder: where the shards lie. is_text: whether the corpus holds text.

    Raises:
        DataError: it cannot be read or does not have its hash.
    """
    try:
        file = ShardFile.open(folder / entry.shard)
    except OSError as error:
        raise DataError(
            f"shard {entry.shard} of {folder}, with document {entry.id}, cannot be read: {error.strerror}. "
            f"See `longspan data verify {folder}`."
        ) from None
    try:
        content = file.read(entry.offset, entry.size)
        lengths = b"" if is_text else file.read(entry.lengths_offset, _LENGTH_BYTES * entry.num_tokens)
    finally:
        file.close()
    if hashlib.sha256(content + lengths).hexdigest() != entry.sha256:
        raise DataError(
            f"document {entry.id} does not match its sha256 {entry.sha256[:16]}: shard {entry.shard}, byte offset "
            f"{entry.offset} to {entry.offset + entry.size}. See `longspan data verify {folder}`."
        )
    return content, lengths


def text_of(folder: Path, entry: DocumentEntry, tokenizer: Tokenizer | None) -> bytes:
    """The document's text in UTF-8; what its tokens spell, where these are stored.

    Args:
        folder: where the shards lie. tokenizer: of the corpus; None if it holds text.

    Raises:
        DataError: as `stored`.
    """
    content, _ = stored(folder, entry, tokenizer is None)
    if tokenizer is None:
        return content
    return tokenizer.decode(np.frombuffer(content, dtype=tokenizer.token_dtype.newbyteorder("<"))).encode("utf-8")
