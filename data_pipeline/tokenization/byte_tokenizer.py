"""The byte-level vocabulary as a tokenizer: every byte is its own id."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from longspan.data_pipeline.tokenization.base import Encoded, TokenizerKind, token_dtype
from longspan.data_pipeline.tokenization.description import save_files
from longspan.data_pipeline.vocabulary import BOS, EOS, PAD, PADDED_SIZE, ByteVocabulary


class ByteTokenizer:
    """A `Tokenizer` of bytes; its digest is that of `ByteVocabulary`."""

    name = "bytes"
    kind: TokenizerKind = "bytes"
    bos, eos, pad = BOS, EOS, PAD
    size = PAD + 1
    padded_size = PADDED_SIZE
    token_dtype = token_dtype(PAD + 1)
    threads = 1

    def __init__(self) -> None:
        """Needs nothing."""
        self.digest = ByteVocabulary().digest

    def encode(self, text: bytes) -> Encoded:
        """See `Tokenizer.encode`; one token per byte."""
        ids = ByteVocabulary.encode(text)
        num_bytes = np.ones(len(ids), dtype=np.uint16)
        num_bytes[0] = num_bytes[-1] = 0
        return Encoded(ids, num_bytes)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return ByteVocabulary.decode(ids)

    def save(self, folder: Path) -> None:
        """See `Tokenizer.save`; writes the description alone."""
        save_files(folder, self, {})
