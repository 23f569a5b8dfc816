"""BPE encoding: the standard library's sources as one document, beside plain `tokenizers` with the same vocabulary."""

from __future__ import annotations

import itertools
import sysconfig
import tempfile
from functools import cached_property
from pathlib import Path

import numpy as np

from longspan.data_pipeline.tokenization.base import decode_utf8
from longspan.data_pipeline.tokenization.bpe import train_bpe
from longspan.data_pipeline.tokenization.chunks import BYTE_LEVEL, cut
from longspan.data_pipeline.tokenization.file_tokenizer import FileTokenizer
from longspan.errors import DataError
from longspan.trainer.bench.data.result import Bar, Row, row_of, timed
from longspan.trainer.bench.result import OURS

TEXT_BYTES = 8_000_000
TRAIN_BYTES = 4_000_000
VOCABULARY = 16_384
THREADS = (1, 2)
BAR = Bar(megabytes_per_second=8.0)


def standard_library_text(num_bytes: int) -> bytes:
    """The first `num_bytes`, about, of this Python's own sources, in order of their paths."""
    folder, text = Path(sysconfig.get_path("stdlib")), bytearray()
    for file in sorted(folder.rglob("*.py")):
        content = file.read_bytes() if "site-packages" not in file.parts else b""
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            continue  # test data in other encodings
        text += content
        if len(text) >= num_bytes:
            break
    return bytes(text[:num_bytes].decode("utf-8", errors="ignore").encode())


class Encoding:
    """The text, and a vocabulary that is trained on it when it is first needed."""

    def __init__(self, repeat: int) -> None:
        """Args: repeat: times that the text is encoded for a row."""
        self._repeat = repeat
        self._text = standard_library_text(TEXT_BYTES)

    @cached_property
    def _tokenizer(self) -> FileTokenizer:
        return train_bpe([self._text], VOCABULARY, TRAIN_BYTES)

    @cached_property
    def _ids(self) -> np.ndarray:
        return self._tokenizer.encode(self._text).ids[1:-1]

    def case(self, threads: int) -> str:
        """Of the row."""
        return f"BPE, {VOCABULARY:,} ids, {threads} thread{'s' if threads > 1 else ''}"

    def row(self, threads: int) -> Row:
        """Our own: ids and bytes of each token.

        Raises:
            DataError: the bytes of the tokens are not those of the text.
        """
        tokenizer, text = self._tokenizer, self._text

        def work() -> int:
            encoded = tokenizer.encode(text)
            if int(encoded.num_bytes.sum(dtype=np.int64)) != len(text):
                raise DataError(f"the tokens of {len(text):,} bytes stand for another number of bytes.")
            return len(encoded.ids)

        tokenizer.threads = threads
        passes = [timed(work, len(text)) for _ in range(self._repeat)]
        return row_of(OURS, self.case(threads), passes, BAR, f"one document of {len(text) / 1e6:.1f} MB")

    def peer_row(self, threads: int) -> Row:
        """Plain `tokenizers`: the same pieces of text, one after another or as a batch in its own threads.

        Raises:
            DataError: it gives other ids.
        """
        from tokenizers import Tokenizer

        with tempfile.TemporaryDirectory() as folder:
            self._tokenizer.save(Path(folder))
            plain = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        pieces = cut(decode_utf8(self._text), BYTE_LEVEL)
        found: list[list[int]] = []

        def work() -> int:
            encoded = map(plain.encode, pieces) if threads == 1 else plain.encode_batch(pieces)
            found[:] = [piece.ids for piece in encoded]
            return sum(map(len, found))

        passes = [timed(work, len(self._text)) for _ in range(self._repeat)]
        if not np.array_equal(np.fromiter(itertools.chain.from_iterable(found), np.int64), self._ids):
            raise DataError("tokenizers gives other ids for this text.")
        note = "encode" if threads == 1 else "encode_batch, in as many threads as there are cores"
        return row_of("tokenizers", self.case(threads), passes, note=note)
