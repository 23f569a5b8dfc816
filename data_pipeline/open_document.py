"""A verified document: its token ids and the bytes of each token, read straight into a batch's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from longspan.data_pipeline.entries import DocumentEntry, VocabularyEntry
from longspan.errors import DataError

LENGTH_BYTES = 2  # of the uint16 that says how many bytes a token stands for


class _Readable(Protocol):
    def read_into(self, offset: int, out: np.ndarray) -> int: ...


class MemoryFile:
    """Bytes in memory that read like a `ShardFile`."""

    def __init__(self, data: bytes) -> None:
        """Args: data: all of it."""
        self._data = np.frombuffer(data, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._data)

    def read_into(self, offset: int, out: np.ndarray) -> int:
        """Fill `out` (contiguous, any dtype) with bytes from `offset` on; returns how many there were."""
        target = out.view(np.uint8)
        part = self._data[offset : offset + len(target)]
        target[: len(part)] = part
        return len(part)


@dataclass(frozen=True)
class Coding:
    """How the documents of a corpus are stored.

    Attributes:
        dtype: of ids in memory, uint16 or uint32. is_text: shards hold bytes of text; bos and eos are added on reading.
        bos, eos, pad: ids of the specials.
    """

    dtype: np.dtype
    is_text: bool
    bos: int
    eos: int
    pad: int

    @classmethod
    def of(cls, vocabulary: VocabularyEntry) -> Coding:
        """The coding of a corpus with this vocabulary."""
        is_text = vocabulary.kind == "bytes"
        dtype = np.dtype("<u2") if is_text else np.dtype(vocabulary.token_dtype).newbyteorder("<")
        return cls(dtype, is_text, vocabulary.bos, vocabulary.eos, vocabulary.pad)

    def ranges(self, entry: DocumentEntry) -> list[tuple[int, int]]:
        """(offset, size) in the shard of what the document's sha256 covers, in order."""
        text_or_ids = (entry.offset, entry.size)
        return [text_or_ids] if self.is_text else [text_or_ids, (entry.lengths_offset, LENGTH_BYTES * entry.num_tokens)]


class OpenDocument:
    """One document that was verified when it was opened. Holds its shard open; safe to use from several threads."""

    def __init__(self, entry: DocumentEntry, coding: Coding, file: _Readable, offset: int, lengths_offset: int) -> None:
        """Args: file: where it lies; offset: of its text or ids there; lengths_offset: of the bytes of its tokens."""
        self.entry, self._coding, self._file = entry, coding, file
        self._offset, self._lengths_offset = offset, lengths_offset
        self._item_bytes = coding.dtype.itemsize

    def read_into(self, start: int, stop: int, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Put token ids `start` to `stop` into `ids`, and the bytes of all but the first of them into `lengths`.

        Args:
            ids: coding.dtype [stop - start]. lengths: uint16 [stop - start - 1].

        Raises:
            DataError: the shard ends early or cannot be read.
        """
        if self._coding.is_text:
            self.ids_into(start, stop, ids)
            self.lengths_into(start + 1, stop, lengths)
            return
        self._fill(self._offset + start * self._item_bytes, ids)
        self._fill(self._lengths_offset + (start + 1) * LENGTH_BYTES, lengths)

    def ids_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """Put token ids `start` to `stop` into `out`, coding.dtype [stop - start].

        Raises:
            DataError: the shard ends early or cannot be read.
        """
        if not self._coding.is_text:
            self._fill(self._offset + start * self._item_bytes, out)
            return
        count = self.entry.num_tokens
        first, last = max(start, 1), min(stop, count - 1)  # these are bytes, before them bos, after them eos
        if last > first:
            text = np.empty(last - first, dtype=np.uint8)
            self._fill(self._offset + first - 1, text)
            out[first - start : last - start] = text
        if start == 0 < stop:
            out[0] = self._coding.bos
        if stop == count and start < stop:
            out[-1] = self._coding.eos

    def lengths_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """Put the bytes that tokens `start` to `stop` stand for into `out`, uint16 [stop - start]; 0 for bos and eos.

        Raises:
            DataError: as `ids_into`.
        """
        if not self._coding.is_text:
            self._fill(self._lengths_offset + start * LENGTH_BYTES, out)
            return
        out[:] = 1
        if start == 0 < stop:
            out[0] = 0
        if stop == self.entry.num_tokens and start < stop:
            out[-1] = 0

    def _fill(self, offset: int, out: np.ndarray) -> None:
        try:
            read = self._file.read_into(offset, out) if out.size else 0
        except OSError as error:
            raise unreadable(self.entry, offset, error) from error
        if read != out.nbytes:
            raise cut_off(self.entry, offset + read, out.nbytes - read)


def unreadable(entry: DocumentEntry, offset: int, error: OSError) -> DataError:
    """The error for a document whose shard cannot be read."""
    return DataError(
        f"document {entry.id} cannot be read: shard {entry.shard}, byte offset {offset}: {error.strerror}."
    )


def cut_off(entry: DocumentEntry, end: int, missing: int) -> DataError:
    """The error for a document whose shard ends within it, `missing` bytes early."""
    return DataError(
        f"document {entry.id} is cut off: shard {entry.shard} ends at byte offset {end}, {missing} bytes early. "
        f"See `longspan data verify`."
    )
