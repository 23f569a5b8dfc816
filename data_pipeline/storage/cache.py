"""Verified shards on local disk, shared by any number of processes, bounded in bytes, least recently used out first.

`<sha256>.tar` is a whole shard whose hash was checked; `<sha256>.<size>.part` is one that is being fetched, or was when
its process died: the next one goes on where it ends. All agreement is by `flock`, which ends with the process that
holds it. An exclusive lock on a part is the right to write it; a shared lock on a shard says that somebody reads it,
and keeps it from being evicted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from longspan.data_pipeline.entries import ShardEntry
from longspan.data_pipeline.storage.retry import Counters
from longspan.data_pipeline.storage.shard_file import ShardFile
from longspan.data_pipeline.storage.transfer import Sink
from longspan.errors import DataError, UsageError

_READ_BYTES = 2**20
_POLL_SECONDS = 0.02
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class CacheFullError(Exception):
    """No room for a shard; the message names folder, bytes needed and the remedy."""


class WrongHashError(DataError):
    """A shard arrived whole and is not the one of the manifest."""


class ShardCache:
    """A folder of shards."""

    def __init__(self, folder: Path, limit_bytes: int, counters: Counters) -> None:
        """
        Args:
            folder: made if need be. limit_bytes: of all shards and parts in it.
            counters: told of downloads, evictions and wrong hashes.

        Raises:
            UsageError: the folder cannot be made or written.
        """
        self.folder, self.limit_bytes, self._counters = folder, limit_bytes, counters
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.close(self._admission())
        except OSError as error:
            raise UsageError(
                f"data.cache_dir = {folder}: {error.strerror}. Name a folder that can be written, "
                f"or set data.cache_gib=0 to read without a cache."
            ) from error

    def open(self, shard: ShardEntry, fetch: Callable[[Sink], None]) -> ShardFile:
        """The shard, locked against eviction for as long as the returned file is open; fetched if it is not here.

        Args:
            shard: its hash names it. fetch: copies the shard into a sink, from the sink's position on.

        Raises:
            CacheFullError: there is no room for it.
            WrongHashError: what was fetched is not the shard.
            StorageError: of `fetch`.
        """
        while True:
            file = self._open_whole(shard)
            if file is not None:
                return file
            descriptor = self._lock_part(shard)
            if descriptor is None:  # another thread or process fetches it
                time.sleep(_POLL_SECONDS)
                continue
            with contextlib.closing(_PartSink(descriptor)) as sink:
                self._fetch(shard, sink, fetch)

    def discard(self, shard: ShardEntry) -> None:
        """Remove a shard that turned out to be damaged; whoever has it open keeps what was open."""
        self._whole(shard).unlink(missing_ok=True)

    def _whole(self, shard: ShardEntry) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _part(self, shard: ShardEntry) -> Path:
        return self.folder / f"{shard.sha256}.{shard.size}.part"

    def _open_whole(self, shard: ShardEntry) -> ShardFile | None:
        path = self._whole(shard)
        try:
            file = ShardFile(path)
        except FileNotFoundError:
            return None
        fcntl.flock(file.descriptor, fcntl.LOCK_SH)
        if not _is_at(file.descriptor, path):  # evicted between open and lock
            file.close()
            return None
        if os.fstat(file.descriptor).st_size != shard.size:
            path.unlink(missing_ok=True)
            file.close()
            return None
        with contextlib.suppress(OSError):  # a cache of another user serves as well
            os.utime(file.descriptor)
        return file

    def _lock_part(self, shard: ShardEntry) -> int | None:
        """Make room for the shard and take the right to write it; None if somebody else has it."""
        part = self._part(shard)
        admission = self._admission()
        try:
            if self._whole(shard).exists():
                return None
            if not part.exists():
                self._make_room(shard)
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None
            return descriptor
        except OSError as error:
            raise self._full(shard, error) from error
        finally:
            os.close(admission)

    def _fetch(self, shard: ShardEntry, sink: _PartSink, fetch: Callable[[Sink], None]) -> None:
        part = self._part(shard)
        if not _is_at(sink.descriptor, part):
            return  # it was finished, or given up, before we had the lock
        try:
            if sink.position > shard.size:
                sink.restart()
            fetch(sink)
        except OSError as error:
            part.unlink(missing_ok=True)
            if error.errno in _FULL:
                raise self._full(shard, error) from error
            raise
        if not self._is_right(shard, sink):
            part.unlink(missing_ok=True)
            self._counters.add("hash_mismatches")
            raise WrongHashError(
                f"shard {shard.url} arrived with sha256 {sink.sha256.hexdigest()[:16]}, "
                f"the manifest says {shard.sha256[:16]}."
            )
        # not synced: after a power cut the documents' own hashes find what is missing, and it is fetched again
        admission = self._admission()  # whoever adds up what is here must find it under one of its names
        try:
            os.rename(part, self._whole(shard))
        finally:
            os.close(admission)
        self._counters.add("downloads")

    def _is_right(self, shard: ShardEntry, sink: _PartSink) -> bool:
        return sink.position == shard.size and sink.sha256.hexdigest() == shard.sha256

    def _make_room(self, shard: ShardEntry) -> None:
        """Evict the least recently used shards that nobody reads until the new one fits."""
        entries = sorted(self._entries())
        used = sum(size for _, size, _ in entries)
        free = shutil.disk_usage(self.folder).free
        if shard.size > self.limit_bytes:
            raise CacheFullError(self._advice(shard, f"the limit is {self.limit_bytes:,} bytes"))
        for _, size, path in entries:
            if used + shard.size <= self.limit_bytes and free >= shard.size:
                return
            held = path.stat().st_blocks * 512
            if self._evict(path):
                used, free = used - size, free + held
        if used + shard.size > self.limit_bytes:
            raise CacheFullError(self._advice(shard, f"{used:,} of {self.limit_bytes:,} bytes are being read"))
        if free < shard.size:
            raise CacheFullError(self._advice(shard, f"{free:,} bytes are free on the disk"))

    def _evict(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            self._counters.add("evicted")
            return True
        except OSError:  # somebody reads or writes it, or it is not ours to delete
            return False
        finally:
            os.close(descriptor)

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of everything here."""
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.suffix == ".tar":
                    yield path.stat().st_mtime, path.stat().st_size, path
                elif path.suffix == ".part":
                    yield path.stat().st_mtime, int(path.name.split(".")[-2]), path

    def _admission(self) -> int:
        """A lock on who may be let in; close the descriptor to give it up."""
        descriptor = os.open(self.folder / "admission.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor

    def _full(self, shard: ShardEntry, error: OSError) -> CacheFullError:
        return CacheFullError(self._advice(shard, error.strerror or str(error)))

    def _advice(self, shard: ShardEntry, why: str) -> str:
        return (
            f"no room in the shard cache {self.folder} for {shard.url} ({shard.size:,} bytes): {why}. "
            f"Free disk space, raise data.cache_gib, or name another folder in data.cache_dir."
        )


class _PartSink:
    """A part with the hash of what it holds; what a dead process left in it is hashed first."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.position = 0
        self.sha256 = hashlib.sha256()
        while chunk := os.pread(descriptor, _READ_BYTES, self.position):
            self.sha256.update(chunk)
            self.position += len(chunk)

    def write(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        while view:
            written = os.pwrite(self.descriptor, view, self.position)
            self.sha256.update(view[:written])
            self.position += written
            view = view[written:]

    def restart(self) -> None:
        os.ftruncate(self.descriptor, 0)
        self.position = 0
        self.sha256 = hashlib.sha256()

    def close(self) -> None:
        os.close(self.descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` still is the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
