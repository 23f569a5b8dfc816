"""Documents from a stream of shards: each is read once, front to back, through WebDataset's pipeline into memory."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.entries import DocumentEntry
from longspan.data_pipeline.open_document import MemoryFile, OpenDocument
from longspan.data_pipeline.storage.prefetch import Workers
from longspan.data_pipeline.storage.shard_file import ShardFile
from longspan.data_pipeline.streaming_plan import Pass, StreamPlan

_BUFFER_BYTES = 2**20
_SHARDS_AHEAD = 2
_LOGGER = logging.getLogger("longspan.data")


class StreamedDocuments:
    """Serves the documents of a `StreamPlan` in its order; only those of the reader's window are in memory.

    One thread reads the stream, as far as the last document that was asked for. What the pipeline does not deliver (a
    damaged archive, a document with a wrong hash) is read by its byte range, and judged there.

    Attributes:
        coding, counters: as of `DocumentReader`; `passes` counts readings of shards.
    """

    def __init__(self, plan: StreamPlan, documents: DocumentReader, lane_start: int, lane_stop: int) -> None:
        """Args: plan: of the run; documents: of its manifest; lane_start, lane_stop: lanes that are read."""
        self.coding, self.counters = documents.coding, documents.counters
        self._plan, self._documents, self._lanes = plan, documents, (lane_start, lane_stop)
        self._ready: dict[str, OpenDocument] = {}
        self._wanted: dict[str, DocumentEntry] = {}
        self._later: set[str] = set()  # of these: those that the current reading of their shard has passed by
        self._changed = threading.Condition()  # guards all of the above and below
        self._thread: threading.Thread | None = None
        self._at: tuple[str, int] = ("", -1)  # shard that is being read, and the offset that was reached
        self._fetcher = Workers(1, "longspan-fetch")

    def begin(self, step: int) -> None:
        """Go on at this step, wherever reading was."""
        self._stop()
        passes = self._plan.passes(step, *self._lanes)
        self._thread = threading.Thread(target=self._run, args=(passes,), name="longspan-stream", daemon=True)

    def expect(self, entries: Iterable[DocumentEntry]) -> None:
        """These are needed next; after `begin`, first all those that lanes are in the middle of."""
        with self._changed:
            shard, reached = self._at
            for entry in entries:
                if entry.id in self._ready:
                    continue
                if entry.shard == shard and entry.offset <= reached:
                    if self._plan.max_document_tokens is not None:
                        continue  # perhaps one more part of a document that was dropped: `open` reads its range
                    self._later.add(entry.id)
                self._wanted[entry.id] = entry
            self._changed.notify_all()
        if self._thread is not None and self._thread.ident is None:
            self._thread.start()

    def hold(self, entries: Iterable[DocumentEntry]) -> None:
        """These are needed still; all others are dropped."""
        kept = {entry.id for entry in entries}
        with self._changed:
            self._ready = {name: document for name, document in self._ready.items() if name in kept}
            self._wanted = {name: entry for name, entry in self._wanted.items() if name in kept}
            self._later &= self._wanted.keys()

    def open(self, entry: DocumentEntry) -> OpenDocument:
        """The document, verified; waits for the stream to come to it.

        Raises:
            DataError: it does not have its sha256. StorageError: the store does not answer.
        """
        with self._changed:
            while entry.id in self._wanted and self._thread is not None:
                self._changed.wait()
            if entry.id in self._ready:
                return self._ready[entry.id]
        self.counters.add("undelivered_documents")
        return self._documents.open(entry)

    def reopen(self, entry: DocumentEntry) -> OpenDocument:
        """The document from a new copy; see `DocumentReader.reopen`."""
        return self._documents.reopen(entry)

    def close(self) -> None:
        """Stop reading and let go of everything."""
        self._stop()
        self._fetcher.close()
        self._documents.close()

    def _stop(self) -> None:
        with self._changed:
            self._thread = None  # the thread ends when it sees this
            self._ready, self._wanted, self._later, self._at = {}, {}, set(), ("", -1)
            self._changed.notify_all()

    def _is_current(self) -> bool:
        return self._thread is threading.current_thread()

    def _run(self, passes: Iterator[Pass]) -> None:
        try:
            self._read_all(passes)
        finally:
            with self._changed:
                if self._is_current():  # it failed: everything is read by its range from now on
                    self._thread = None
                self._changed.notify_all()

    def _read_all(self, passes: Iterator[Pass]) -> None:
        ahead: deque[str] = deque()
        while True:
            while len(ahead) <= _SHARDS_AHEAD:
                ahead.append(next(passes).shard)
            with self._changed:
                while not self._wanted and self._is_current():
                    self._changed.wait()
                if not self._is_current():
                    return
                coming = [shard for shard in ahead if self._is_due(shard)]
                self._at = (ahead[0], -1)
            shard = ahead.popleft()
            is_through = False
            if shard in coming:
                self._prepare(coming)
                is_through = self._read(shard)
            with self._changed:
                if self._is_current():
                    self._end(shard, is_through)

    def _is_due(self, shard: str) -> bool:
        """Whether a wanted document is still to come in this reading of a shard."""
        return any(entry.shard == shard and name not in self._later for name, entry in self._wanted.items())

    def _prepare(self, shards: list[str]) -> None:
        """Fetch the next shards in the background."""
        self._documents.shards.hold(shards)
        if self._documents.shards.is_remote:
            for shard in shards[1:]:
                self._fetcher.submit(Future(), partial(self._documents.shards.open, shard))

    def _end(self, shard: str, is_through: bool) -> None:
        """What a reading to the end should have brought and did not, `open` reads by its range."""
        self._at = ("", -1)
        for name in [name for name, entry in self._wanted.items() if entry.shard == shard]:
            if is_through and name not in self._later:
                del self._wanted[name]
        self._later = {name for name in self._later if self._wanted[name].shard != shard}
        self._changed.notify_all()

    def _read(self, shard: str) -> bool:
        """Read a shard; False if it was left because nothing more of it is wanted, True at its end or at a fault."""
        self.counters.add("passes")
        try:
            file = self._documents.shards.open(shard)
            if file is None:  # no room for it
                return True
            for sample in _samples(shard, file):
                if not self._take(shard, sample):
                    return False
        except Exception as error:  # whatever a damaged archive makes of the pipeline: ranges will tell what is wrong
            _LOGGER.warning("shard %s cannot be streamed: %s: %s", shard, type(error).__name__, error)
        return True

    def _take(self, shard: str, sample: dict[str, Any]) -> bool:
        """Keep a sample that is wanted; whether more of this reading is."""
        name = _document_id(sample)
        with self._changed:
            entry = None if name in self._later else self._wanted.get(name)
        document = None if entry is None else self._verified(entry, sample)
        with self._changed:
            if not self._is_current():
                return False
            if entry is not None and document is not None and name in self._wanted:
                self._ready[entry.id] = document
                del self._wanted[name]
            if entry is not None:
                self._at = (shard, entry.offset)
            self._changed.notify_all()
            while not self._wanted and self._is_current():
                self._changed.wait()
            if self._is_current() and self._is_due(shard):
                return True
            self._at = ("", -1)  # what is asked for from now on is of a later reading
            return False

    def _verified(self, entry: DocumentEntry, sample: dict[str, Any]) -> OpenDocument | None:
        parts = [sample.get("txt")] if self.coding.is_text else [sample.get("ids"), sample.get("len")]
        sizes = [size for _, size in self.coding.ranges(entry)]
        if any(part is None or len(part) != size for part, size in zip(parts, sizes, strict=True)):
            return None
        data = b"".join(part for part in parts if part is not None)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            return None
        return OpenDocument(entry, self.coding, MemoryFile(data), 0, entry.size)


def _samples(shard: str, file: ShardFile) -> Iterator[dict[str, Any]]:
    """The samples of a shard, through WebDataset's stages; it opens nothing itself."""
    os.environ["WDS_SECURE"] = "1"  # read by webdataset when it is imported: no pickled fields, no `pipe:` addresses
    import webdataset
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with open(file.path, "rb", buffering=_BUFFER_BYTES) as stream:
        yield from webdataset.DataPipeline(
            lambda: iter([{"url": shard, "stream": stream}]), tar_file_expander, group_by_keys
        )


def _document_id(sample: dict[str, Any]) -> str:
    try:
        return str(json.loads(sample["json"])["id"])
    except (KeyError, TypeError, ValueError):
        return ""
