"""A tokenizer that consists of files: own BPE, SentencePiece or Hugging Face."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from longspan.data_pipeline.tokenization.base import (
    Encoded,
    TokenizerKind,
    decode_utf8,
    padded_size,
    token_dtype,
    with_specials,
)
from longspan.data_pipeline.tokenization.description import digest_of, save_files
from longspan.errors import UsageError


class Engine(Protocol):
    """Text to ids and back, without special tokens.

    Attributes:
        rule: name of the rule by which it cuts long texts. unknown: id that stands for text it cannot encode.
    """

    rule: str
    unknown: int | None

    def encode(self, text: str, threads: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids uint32 [n] and bytes per token uint16 [n], whose sum is the number of UTF-8 bytes of `text`."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`."""


class FileTokenizer:
    """A `Tokenizer` around an engine.

    The ids of bos, eos and pad are those that the files name. One that they do not name, or that has the id of another
    (GPT-2's end of text is its start of text too) or of the unknown token, gets an id of its own behind the files'
    vocabulary, in the order bos, eos, pad. The files themselves are kept as they are.
    """

    def __init__(
        self,
        name: str,
        kind: TokenizerKind,
        engine: Engine,
        named: tuple[int | None, int | None, int | None],
        num_ids: int,
        files: dict[str, bytes],
    ) -> None:
        """Wrap an engine.

        Args:
            name: for people. kind: what `TokenizerConfig` calls it.
            engine: made from `files`.
            named: ids of bos, eos and pad, None where the files name none.
            num_ids: ids of the files' vocabulary are below it.
            files: content by file name.
        """
        self.name = name
        self.kind: TokenizerKind = kind
        self.bos, self.eos, self.pad = _specials(named, engine.unknown, num_ids)
        self.size = max(num_ids, 1 + max(self.bos, self.eos, self.pad))
        self.padded_size = padded_size(self.size)
        self.token_dtype = token_dtype(self.size)
        self.threads = len(os.sched_getaffinity(0))
        self.digest = digest_of(kind, (self.bos, self.eos, self.pad), self.size, engine.rule, files)
        self.engine = engine
        self._files = files
        self._num_ids = num_ids

    def encode(self, text: bytes) -> Encoded:
        """See `Tokenizer.encode`; text that spells a special token is encoded as any other text."""
        ids, num_bytes = self.engine.encode(decode_utf8(text), self.threads)
        spelt = (ids == self.bos) | (ids == self.eos) | (ids == self.pad)
        if spelt.any():  # some vocabularies hold the words of a special token among their pieces of text
            ids[spelt] = self._unknown()
        return with_specials(ids, num_bytes, self.bos, self.eos, self.token_dtype)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        specials = (self.bos, self.eos, self.pad)
        return self.engine.decode(i for i in map(int, ids) if 0 <= i < self._num_ids and i not in specials)

    def save(self, folder: Path) -> None:
        """See `Tokenizer.save`."""
        save_files(folder, self, self._files)

    def _unknown(self) -> int:
        if self.engine.unknown is None:
            raise UsageError(
                f"the tokenizer {self.name} encodes text to its special tokens {self.bos}, {self.eos} or {self.pad}, "
                f"and has no unknown token to use instead. Use another tokenizer."
            )
        return self.engine.unknown


def _specials(
    named: tuple[int | None, int | None, int | None], unknown: int | None, num_ids: int
) -> tuple[int, int, int]:
    """Three different ids for bos, eos and pad: the named ones, then `num_ids` and up."""
    used = {unknown} if unknown is not None else set()
    chosen: dict[int, int] = {}
    for place in (1, 0, 2):  # where bos and eos share an id, eos keeps it
        special = named[place]
        if special is not None and special not in used:
            chosen[place] = special
            used.add(special)
    for place in range(3):
        if place not in chosen:
            chosen[place] = num_ids
            num_ids += 1
    return chosen[0], chosen[1], chosen[2]
