"""What every tokenizer offers, and the pair of arrays that encoding a document gives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from longspan.errors import UsageError

TokenizerKind = Literal["bytes", "bpe", "sentencepiece", "hugging_face"]
_ROWS = 128  # tensor cores like embeddings whose rows are a multiple of this
_MOST_UINT16_IDS = 65_535


@dataclass(frozen=True)
class Encoded:
    """A document's tokens.

    Attributes:
        ids: token_dtype [n], bos first, eos last.
        num_bytes: uint16 [n], bytes of the text that each token stands for; 0 for bos and eos. Their sum is the
            number of bytes of the text, whatever the tokenizer does to it, so that bits per byte is exact.
    """

    ids: np.ndarray
    num_bytes: np.ndarray


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. Every document is bos, its tokens, eos; `bos`, `eos` and `pad` are three different ids.

    Attributes:
        name: for people, e.g. `bpe-32000`. kind: what `TokenizerConfig` calls it.
        bos, eos, pad: ids of the special tokens; no text is ever encoded to them.
        size: ids are below this.
        padded_size: rows of the embedding, `size` rounded up to a multiple of 128.
        digest: hex sha256 over everything that decides ids and byte lengths.
        token_dtype: uint16 if `size` is at most 65,535, else uint32.
        threads: how many threads encode one large document; set it to 1 where processes share the cores already.
    """

    name: str
    kind: TokenizerKind
    bos: int
    eos: int
    pad: int
    size: int
    padded_size: int
    digest: str
    token_dtype: np.dtype
    threads: int

    def encode(self, text: bytes) -> Encoded:
        """Tokens of one document.

        Raises:
            UsageError: `text` is not UTF-8 (except `bytes`, which takes any bytes).
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special, padding and unknown ids are left out, invalid UTF-8 becomes U+FFFD."""

    def save(self, folder: Path) -> None:
        """Write `description.json` and the files it names to `folder`, which is made if it is missing.

        Raises:
            UsageError: the folder holds something else, or cannot be written.
        """


def padded_size(size: int) -> int:
    """`size` rounded up to a multiple of 128."""
    return -(-size // _ROWS) * _ROWS


def token_dtype(size: int) -> np.dtype:
    """The dtype that ids below `size` are stored with."""
    return np.dtype(np.uint16 if size <= _MOST_UINT16_IDS else np.uint32)


def decode_utf8(text: bytes) -> str:
    """`text` as a string.

    Raises:
        UsageError: it is not UTF-8; names the byte and its offset.
    """
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"byte 0x{text[error.start]:02x} at offset {error.start} of a text of {len(text):,} bytes is not UTF-8. "
            f"Convert the text to UTF-8 first, or use the tokenizer `bytes`, which takes any bytes."
        ) from None


def with_specials(ids: np.ndarray, num_bytes: np.ndarray, bos: int, eos: int, dtype: np.dtype) -> Encoded:
    """A document of the tokens `ids` [n] with `num_bytes` [n] between bos and eos, in the dtypes of `Encoded`."""
    all_ids = np.empty(len(ids) + 2, dtype=dtype)
    all_ids[0], all_ids[-1], all_ids[1:-1] = bos, eos, ids
    all_bytes = np.zeros(len(ids) + 2, dtype=np.uint16)
    all_bytes[1:-1] = num_bytes
    return Encoded(all_ids, all_bytes)
