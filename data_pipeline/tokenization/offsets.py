"""Any tokenizer that tells where in the text its tokens end: bytes per token from those offsets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

import numpy as np

from longspan.data_pipeline.tokenization.chunks import WORDS, cut
from longspan.errors import UsageError

_GROUP_CHUNKS = 64  # a library's own form of a chunk's tokens is many times the text: only so many at once
_PROBES = (("the quick", "brown fox"), ("a", "b"), ("in 19", "45 days"), ("x1", "2y, z"), ("end", "of\nline"))


class Encoder(Protocol):
    """A library's tokenizer without special tokens."""

    unknown: int | None

    def encode_chunks(self, chunks: list[str], threads: int) -> list[tuple[list[int], np.ndarray]]:
        """Of each chunk its ids, and where in its UTF-8 bytes each token ends: int64 [n]."""

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, all of them below the library's own vocabulary size."""


class OffsetEngine:
    """Encodes with `Encoder`; every byte belongs to exactly one token, also where the text is normalised.

    Texts are cut by `chunks.WORDS`. A tokenizer that marks the start of a text as it marks a space (SentencePiece's
    dummy prefix) is given the later chunks without their first space, which changes nothing; the space's byte counts
    to the chunk's first token. Probes decide between the two when the engine is made. Where no such space is
    within reach, or neither form gives the ids of the whole text (pieces of several words), the ids are those of the
    chunks. So they are where a library rounds: SentencePiece adds up scores over all of a text in 32 bits, and over a
    long one takes a slightly worse split here and there.
    """

    def __init__(self, encoder: Encoder) -> None:
        """Args: encoder: a library's tokenizer."""
        self._encoder = encoder
        self.unknown = encoder.unknown
        self._drops_space = not self._joins(" ") and self._joins("")
        self.rule = replace(WORDS, name=f"{WORDS.name}-{'drop' if self._drops_space else 'keep'}").name

    def encode(self, text: str, threads: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids uint32 [n] and bytes per token uint16 [n] of `text`.

        Raises:
            UsageError: a whole chunk gives no token, and the tokenizer has no unknown token to stand for it.
        """
        chunks = cut(text, WORDS)
        ids: list[np.ndarray] = [np.empty(0, dtype=np.uint32)]
        lengths: list[np.ndarray] = [np.empty(0, dtype=np.uint16)]
        for first in range(0, len(chunks), _GROUP_CHUNKS):
            group = chunks[first : first + _GROUP_CHUNKS]
            shown = [self._shown(chunk, first + number) for number, chunk in enumerate(group)]
            for chunk, seen, (found, ends) in zip(
                group, shown, self._encoder.encode_chunks(shown, threads), strict=True
            ):
                if not found:
                    found, ends = [self._stand_in(chunk)], np.zeros(1, dtype=np.int64)
                ids.append(np.asarray(found, dtype=np.uint32))
                size = len(chunk.encode())
                lengths.append(_lengths(ends + (size - len(seen.encode())), size))
        return np.concatenate(ids), np.concatenate(lengths)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`."""
        return self._encoder.decode(list(ids))

    def _shown(self, chunk: str, number: int) -> str:
        return chunk[1:] if self._drops_space and number and chunk.startswith(" ") else chunk

    def _stand_in(self, chunk: str) -> int:
        if self.unknown is None:
            raise UsageError(
                f"the tokenizer makes nothing of {len(chunk):,} characters ({chunk[:20]!r}...) and has no unknown "
                f"token that could stand for them, so their bytes would be lost. Use another tokenizer."
            )
        return self.unknown

    def _joins(self, between: str) -> bool:
        for left, right in _PROBES:
            whole, *parts = (
                ids for ids, _ in self._encoder.encode_chunks([f"{left} {right}", left, between + right], threads=1)
            )
            if whole != [*parts[0], *parts[1]]:
                return False
        return True


def _lengths(ends: np.ndarray, size: int) -> np.ndarray:
    """Bytes of each token from where tokens end; skipped text counts to the next token, or to the last."""
    ends = np.maximum.accumulate(ends)
    ends[-1] = size
    return np.diff(ends, prepend=0).astype(np.uint16)
