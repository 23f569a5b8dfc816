"""Documents out of shards by tar offset: ranged reads, each document's hash verified when it is first touched."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict

import numpy as np

from longspan.data_pipeline.manifest import DocumentEntry, Manifest
from longspan.data_pipeline.vocabulary import BOS, EOS
from longspan.errors import DataError

_CHUNK_BYTES = 2**20
Text = bytes  # inside the class below, `bytes` is its method
_MOST_OPEN_SHARDS = 64


class DocumentReader:
    """Reads text and tokens of single documents; safe to use from several threads.

    Reads go through `pread` and not through a memory map: a shard that shrinks under a map kills the process.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Args: manifest: of the corpus to read.

        Raises:
            DataError: a shard is missing.
        """
        self.manifest = manifest
        self._open: OrderedDict[str, int] = OrderedDict()
        self._verified: set[str] = set()
        self._lock = threading.Lock()
        missing = [shard.url for shard in manifest.shards if not (manifest.folder / shard.url).is_file()]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(manifest.shards)} shards are missing in {manifest.folder}, e.g. {missing[0]}. "
                f"See `longspan data verify {manifest.folder}`, or build the corpus again."
            )

    def bytes(self, entry: DocumentEntry) -> Text:
        """The document's UTF-8 text.

        Raises:
            DataError: it cannot be read or does not have its sha256; names shard and offset.
        """
        text = self._pread(entry, 0, entry.size)
        if entry.id not in self._verified:
            self._compare(entry, hashlib.sha256(text))
        return text

    def tokens(self, entry: DocumentEntry) -> np.ndarray:
        """All token ids of the document: int64 [entry.num_tokens], bos first, eos last.

        Raises:
            DataError: as `bytes`.
        """
        return self.token_range(entry, 0, entry.num_tokens)

    def token_range(self, entry: DocumentEntry, start: int, stop: int) -> np.ndarray:
        """Token ids `start` to `stop` of the document: int64 [stop - start]; reads no more than these.

        Raises:
            DataError: as `bytes`; the whole document is verified when it is first touched.
        """
        if entry.id not in self._verified:
            self._verify(entry)
        first, last = max(start, 1), min(stop, entry.num_tokens - 1)  # these are bytes, before them bos, after them eos
        ids = np.empty(stop - start, dtype=np.int64)
        if last > first:
            ids[first - start : last - start] = np.frombuffer(
                self._pread(entry, first - 1, last - first), dtype=np.uint8
            )
        if start == 0 < stop:
            ids[0] = BOS
        if stop == entry.num_tokens and start < stop:
            ids[-1] = EOS
        return ids

    def close(self) -> None:
        """Close all shards; a later read opens them again."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def _verify(self, entry: DocumentEntry) -> None:
        digest = hashlib.sha256()
        for start in range(0, entry.size, _CHUNK_BYTES):
            digest.update(self._pread(entry, start, min(_CHUNK_BYTES, entry.size - start)))
        self._compare(entry, digest)

    def _compare(self, entry: DocumentEntry, digest: hashlib._Hash) -> None:
        if digest.hexdigest() != entry.sha256:
            raise DataError(
                f"document {entry.id} does not match its sha256 {entry.sha256[:16]}: shard {entry.shard}, byte offset "
                f"{entry.offset} to {entry.offset + entry.size}. See `longspan data verify {self.manifest.folder}`."
            )
        self._verified.add(entry.id)

    def _pread(self, entry: DocumentEntry, start: int, size: int) -> Text:
        try:
            with self._lock:  # so that no other thread closes the file in between
                data = os.pread(self._descriptor(entry.shard), size, entry.offset + start)
        except OSError as error:
            raise DataError(
                f"document {entry.id} cannot be read: shard {entry.shard}, byte offset {entry.offset + start}: "
                f"{error.strerror}."
            ) from error
        if len(data) != size:
            raise DataError(
                f"document {entry.id} is cut off: shard {entry.shard} ends at byte offset "
                f"{entry.offset + start + len(data)}, {size - len(data)} bytes early. "
                f"See `longspan data verify {self.manifest.folder}`."
            )
        return data

    def _descriptor(self, shard: str) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= _MOST_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = os.open(self.manifest.folder / shard, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[shard]
