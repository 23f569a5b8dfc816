"""Documents out of shards by tar offset: ranged reads, each document's hash verified when it is first touched."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial

import numpy as np

from longspan.data_pipeline.manifest import DocumentEntry, Manifest
from longspan.data_pipeline.open_document import Coding, MemoryFile, OpenDocument, cut_off, unreadable
from longspan.data_pipeline.storage.prefetch import Workers
from longspan.data_pipeline.storage.retry import Counters
from longspan.data_pipeline.storage.shard_file import ShardFile
from longspan.data_pipeline.storage.shards import LocalShards, Shards, missing_shards
from longspan.data_pipeline.storage.store import StorageError
from longspan.errors import DataError, UsageError

_CHUNK_BYTES = 2**18  # hashed at once: what was just read is still in the core's own cache
_CHECKERS = 2  # threads that hash ahead of use
_FETCHERS = 4  # threads that wait for a store
_TRIES = 3  # of a document that arrives damaged, each from a new copy
_MEMORY_BYTES = 256 * 2**20  # of documents that no lane holds and no cache has
_LOGGER = logging.getLogger("longspan.data")


class _Scratch(threading.local):
    """Memory of each thread that hashes; new memory for every document would cost page faults."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(_CHUNK_BYTES))


class DocumentReader:
    """Reads tokens of single documents; safe to use from several threads.

    Attributes:
        manifest: of the corpus. counters: what happened between the store and the reader.
        coding: how its documents are stored.
    """

    def __init__(self, manifest: Manifest, shards: Shards | None = None) -> None:
        """
        Args:
            manifest: of the corpus to read.
            shards: where they come from; the manifest's folder if None.

        Raises:
            DataError: a shard is missing in the manifest's folder.
        """
        if shards is None:
            missing = missing_shards(manifest.folder, manifest.shards)
            if missing:
                raise DataError(
                    f"{len(missing)} of {len(manifest.shards)} shards are missing in {manifest.folder}, e.g. "
                    f"{missing[0]}. See `longspan data verify {manifest.folder}`, or build the corpus again."
                )
            shards = LocalShards(manifest.folder)
        self.manifest, self.shards = manifest, shards
        self.coding = Coding.of(manifest.vocabulary)
        self.counters: Counters = shards.counters
        self._scratch = _Scratch()
        self._verified: set[str] = set()
        self._expected: dict[str, Future[OpenDocument]] = {}
        self._in_memory: OrderedDict[str, MemoryFile] = OrderedDict()
        self._waiting: dict[str, list[Callable[[], None]]] = {}  # checks by the shard that is being fetched for them
        self._checkers = Workers(_CHECKERS, "longspan-check")
        self._fetchers = Workers(_FETCHERS, "longspan-fetch")
        self._lock = threading.Lock()

    def bytes(self, entry: DocumentEntry) -> bytes:  # type: ignore[valid-type]  # inside the class this is a method
        """The document's UTF-8 text, of a byte corpus.

        Raises:
            DataError: it cannot be read or does not have its sha256; names shard and offset.
            UsageError: the corpus holds token ids.
        """
        if not self.coding.is_text:
            raise UsageError(f"{entry.id} is stored as token ids; decode them with the corpus's tokenizer.")
        return self.tokens(entry)[1:-1].astype(np.uint8).tobytes()

    def tokens(self, entry: DocumentEntry) -> np.ndarray:
        """All token ids of the document: int64 [entry.num_tokens], bos first, eos last.

        Raises:
            DataError: it cannot be read or does not have its sha256; names shard and offset.
        """
        return self.token_range(entry, 0, entry.num_tokens)

    def token_range(self, entry: DocumentEntry, start: int, stop: int) -> np.ndarray:
        """Token ids `start` to `stop` of the document: int64 [stop - start].

        Raises:
            DataError: as `tokens`; the whole document is verified when it is first touched.
        """
        ids = np.empty(stop - start, dtype=self.coding.dtype)
        self.open(entry).ids_into(start, stop, ids)
        return ids.astype(np.int64)

    def target_bytes_range(self, entry: DocumentEntry, start: int, stop: int) -> np.ndarray:
        """Bytes that tokens `start` to `stop` stand for: int32 [stop - start]; 0 for bos and eos.

        Raises:
            DataError: as `token_range`.
        """
        lengths = np.empty(stop - start, dtype=np.uint16)
        self.open(entry).lengths_into(start, stop, lengths)
        return lengths.astype(np.int32)

    def begin(self, step: int) -> None:
        """Any document may be opened at any time: nothing depends on the step."""

    def open(self, entry: DocumentEntry) -> OpenDocument:
        """The document, verified.

        Raises:
            DataError: it cannot be read, or does not have its sha256 after it was fetched anew.
            StorageError: the store does not answer; the document may be whole.
        """
        future = self._expected.get(entry.id)
        if future is not None and not future.cancel():  # a thread is at it, or was
            try:
                return future.result()
            except StorageError:
                pass  # was long ago, perhaps; try again
        return self._open(entry)

    def reopen(self, entry: DocumentEntry) -> OpenDocument:
        """The document from a new copy of its shard, after reading from `open`'s failed.

        Raises:
            DataError: there is no other copy, or as `open`.
        """
        self._verified.discard(entry.id)
        self._expected.pop(entry.id, None)
        if not self.shards.renew(entry.shard):
            raise DataError(f"document {entry.id}: shard {entry.shard} cannot be had anew.")
        return self._open(entry)

    def expect(self, entries: Iterable[DocumentEntry]) -> None:
        """Fetch and verify these in threads, in this order; `open` waits for them. Errors appear in `open`."""
        for entry in entries:
            if entry.id in self._expected or (entry.id in self._verified and not self.shards.is_remote):
                continue
            future: Future[OpenDocument] = Future()
            self._expected[entry.id] = future
            if self.shards.is_remote:
                self._fetch_then_check(entry, future)
            else:
                self._checkers.submit(future, partial(self._open, entry))

    def hold(self, entries: Iterable[DocumentEntry]) -> None:
        """Keep the shards of these; let go of every other shard and of what was read ahead for other documents."""
        entries = list(entries)
        wanted = {entry.id for entry in entries}
        for name in self._expected.keys() - wanted:
            self._expected.pop(name).cancel()
        self.shards.hold({entry.shard for entry in entries})

    def close(self) -> None:
        """End threads and close all shards; a later read of a local corpus opens them again."""
        self._fetchers.close()
        self._checkers.close()
        with self._lock:
            self._waiting.clear()
        self._expected.clear()
        self._in_memory.clear()
        self.shards.close()

    def _fetch_then_check(self, entry: DocumentEntry, future: Future[OpenDocument]) -> None:
        check = partial(self._checkers.submit, future, partial(self._open, entry))
        with self._lock:
            if entry.shard in self._waiting:
                self._waiting[entry.shard].append(check)
                return
            self._waiting[entry.shard] = [check]
        self._fetchers.submit(Future(), partial(self._fetch, entry.shard))

    def _fetch(self, shard: str) -> None:
        try:
            self.shards.open(shard)
        except (DataError, OSError) as error:  # comes up again, with the document's name, if it lasts
            _LOGGER.info("reading ahead: %s", error)
        with self._lock:
            checks = self._waiting.pop(shard, [])
        for check in checks:
            check()

    def _open(self, entry: DocumentEntry) -> OpenDocument:
        """Open the shard, hash the document unless that was done, fetch anew what is damaged."""
        for attempt in range(1, _TRIES + 1):
            try:
                return self._open_once(entry)
            except StorageError:
                raise
            except DataError as error:
                # checked before it was evicted or damaged: what is here now must be checked again
                self._verified.discard(entry.id)
                if attempt == _TRIES or not self.shards.renew(entry.shard):
                    raise
                _LOGGER.warning("fetching %s again: %s", entry.shard, error)
        raise AssertionError("unreachable")

    def _open_once(self, entry: DocumentEntry) -> OpenDocument:
        try:
            file = self.shards.open(entry.shard)
        except OSError as error:
            raise unreadable(entry, entry.offset, error) from error
        if file is None:
            return self._from_memory(entry)
        if entry.id not in self._verified:
            self._compare(entry, self._hash(entry, file))
        return OpenDocument(entry, self.coding, file, entry.offset, entry.lengths_offset)

    def _hash(self, entry: DocumentEntry, file: ShardFile) -> hashlib._Hash:
        digest = hashlib.sha256()
        for offset, size in self.coding.ranges(entry):
            for start in range(offset, offset + size, _CHUNK_BYTES):
                view = self._scratch.view[: min(_CHUNK_BYTES, offset + size - start)]
                try:
                    read = file.read_into(start, view)
                except OSError as error:
                    raise unreadable(entry, start, error) from error
                if read != len(view):
                    raise cut_off(entry, start + read, len(view) - read)
                digest.update(view)
        return digest

    def _from_memory(self, entry: DocumentEntry) -> OpenDocument:
        """The document by its byte ranges, where there is no room for its shard."""
        with self._lock:
            file = self._in_memory.pop(entry.id, None)  # verified when it was put there
        if file is None:
            parts = [self.shards.read(entry.shard, at, at + size) for at, size in self.coding.ranges(entry)]
            self._compare(entry, hashlib.sha256(b"".join(parts)))
            file = MemoryFile(b"".join(parts))
        with self._lock:
            self._in_memory[entry.id] = file  # the newest
            while len(self._in_memory) > 1 and sum(map(len, self._in_memory.values())) > _MEMORY_BYTES:
                self._in_memory.popitem(last=False)
        return OpenDocument(entry, self.coding, file, 0, entry.size)

    def _compare(self, entry: DocumentEntry, digest: hashlib._Hash) -> None:
        if digest.hexdigest() != entry.sha256:
            raise DataError(
                f"document {entry.id} does not match its sha256 {entry.sha256[:16]}: shard {entry.shard}, byte offset "
                f"{entry.offset} to {entry.offset + entry.size}. See `longspan data verify {self.manifest.folder}`."
            )
        self._verified.add(entry.id)
