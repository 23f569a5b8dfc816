"""Where a reader gets its shards: a local folder, or a store with the cache before it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from longspan.data_pipeline.entries import ShardEntry
from longspan.data_pipeline.storage.cache import CacheFullError, ShardCache, WrongHashError
from longspan.data_pipeline.storage.retry import Counters
from longspan.data_pipeline.storage.shard_file import ShardFile
from longspan.data_pipeline.storage.store import StorageError
from longspan.data_pipeline.storage.transfer import Transfers
from longspan.errors import DataError

_LOGGER = logging.getLogger("longspan.data")
_MOST_OPEN_SHARDS = 64
_FULL_SECONDS = 30.0  # how long a full cache is not asked again for the same shard
_FETCHES = 2  # of a shard that arrives with a wrong hash, before its documents are read one by one


class Shards(Protocol):
    """Shards by name. All methods may be called from any thread.

    Attributes:
        counters: of what happened. is_remote: whether opening may take long.
    """

    counters: Counters
    is_remote: bool

    def open(self, name: str) -> ShardFile | None:
        """The shard as a file; None if there is no place to keep it, and `read` has to serve.

        Raises:
            OSError: a local file cannot be opened. StorageError: the store does not answer.
        """
        ...

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` straight from the store.

        Raises:
            StorageError: the store does not answer. DataError: the shard ends before `stop`.
        """
        ...

    def renew(self, name: str) -> bool:
        """Throw away a copy that is damaged; whether another one can be had."""
        ...

    def hold(self, names: Iterable[str]) -> None:
        """Keep these open, and let go of all others."""
        ...

    def close(self) -> None:
        """Let go of everything and end all waiting."""
        ...


class LocalShards:
    """Shards in a folder."""

    is_remote = False

    def __init__(self, folder: Path) -> None:
        """Args: folder: where they lie."""
        self.counters = Counters()
        self._folder = folder
        self._open: OrderedDict[str, ShardFile] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, name: str) -> ShardFile:
        """See `Shards.open`."""
        with self._lock:
            file = self._open.get(name)
            if file is None:
                file = self._open[name] = ShardFile(self._folder / name)
                if len(self._open) > _MOST_OPEN_SHARDS:
                    self._open.popitem(last=False)  # closed when its last reader is done with it
            else:
                self._open.move_to_end(name)
            return file

    def read(self, name: str, start: int, stop: int) -> bytes:
        """See `Shards.read`."""
        return self.open(name).read(start, stop - start)

    def renew(self, name: str) -> bool:
        """See `Shards.renew`: what is on disk is all there is."""
        return False

    def hold(self, names: Iterable[str]) -> None:
        """See `Shards.hold`: nobody evicts files here."""

    def close(self) -> None:
        """See `Shards.close`; a later `open` opens again."""
        with self._lock:
            self._open.clear()


class RemoteShards:
    """Shards of a store, through a cache on disk.

    A shard that keeps arriving with a wrong hash is damaged in the store. It is not cached; its documents are read
    one by one by their byte ranges and checked by their own hashes, so that only the damaged ones are lost.
    """

    is_remote = True

    def __init__(self, shards: Iterable[ShardEntry], transfers: Transfers, cache: ShardCache | None) -> None:
        """Args: shards: of the manifest; transfers: from the store; cache: None to read everything by byte ranges."""
        self.counters = transfers.counters
        self._shards = {shard.url: shard for shard in shards}
        self._transfers = transfers
        self._cache = cache
        self._open: dict[str, ShardFile] = {}
        self._damaged: set[str] = set()
        self._no_room_until: dict[str, float] = {}
        self._lock = threading.Lock()

    def open(self, name: str) -> ShardFile | None:
        """See `Shards.open`."""
        with self._lock:
            if name in self._open:
                return self._open[name]
        if self._cache is None or name in self._damaged or time.monotonic() < self._no_room_until.get(name, 0.0):
            return None
        file = self._fetch(self._shards[name], self._cache)
        if file is None:
            return None
        with self._lock:
            return self._open.setdefault(name, file)

    def _fetch(self, shard: ShardEntry, cache: ShardCache) -> ShardFile | None:
        for _ in range(_FETCHES):
            try:
                return cache.open(shard, lambda sink: self._transfers.copy(shard.url, sink, 0, shard.size))
            except CacheFullError as error:
                self._no_room_until[shard.url] = time.monotonic() + _FULL_SECONDS
                self.counters.add("uncached_shards")
                _LOGGER.warning("%s Reading its documents by byte ranges meanwhile.", error)
                return None
            except WrongHashError as error:
                _LOGGER.warning("%s: %s", self._transfers.store.address, error)
            except StorageError:
                raise
            except DataError as error:  # not as long as the manifest says
                _LOGGER.warning("%s", error)
                break
        self._damaged.add(shard.url)
        _LOGGER.warning(
            "%s: shard %s is damaged; reading its documents one by one", self._transfers.store.address, shard.url
        )
        return None

    def read(self, name: str, start: int, stop: int) -> bytes:
        """See `Shards.read`."""
        self.counters.add("ranged_reads")
        return self._transfers.read(name, start, stop)

    def renew(self, name: str) -> bool:
        """See `Shards.renew`."""
        with self._lock:
            file = self._open.pop(name, None)
        if file is not None and self._cache is not None:
            self._cache.discard(self._shards[name])
        self.counters.add("refetched_documents")
        return True

    def hold(self, names: Iterable[str]) -> None:
        """See `Shards.hold`. The lock of a shard goes when the last document that reads it is closed."""
        wanted = set(names)
        with self._lock:
            for name in self._open.keys() - wanted:
                del self._open[name]

    def close(self) -> None:
        """See `Shards.close`."""
        self._transfers.stopped.set()
        self.hold(())


def missing_shards(folder: Path, shards: Iterable[ShardEntry]) -> list[str]:
    """Names of shards that are not in `folder`."""
    return [shard.url for shard in shards if not os.path.isfile(folder / shard.url)]
