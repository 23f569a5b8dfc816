"""Files in object stores (s3, gs, memory, ...) by range, through fsspec."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from longspan.data_pipeline.storage.retry import RetryPolicy
from longspan.data_pipeline.storage.store import MissingFileError, TemporaryFaultError, Transfer
from longspan.errors import UsageError

_CHUNK_BYTES = 8 * 2**20


class ObjectStore:
    """A folder in any store that fsspec knows."""

    def __init__(self, address: str, policy: RetryPolicy) -> None:
        """
        Args:
            address: e.g. `s3://bucket/folder`.
            policy: its timeout is used for each request.

        Raises:
            UsageError: fsspec does not know the scheme, or what it needs is not installed.
        """
        import fsspec  # only addresses of this kind need it

        self.address = address.rstrip("/")
        self._timeout_seconds = policy.timeout_seconds
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.address)
        except ImportError as error:
            raise UsageError(f"data.shards = {address}: {error}.") from error
        except ValueError as error:
            known = "http, https, s3, gs, memory and other schemes of fsspec"
            raise UsageError(f"data.shards = {address}: {error}. Allowed are folders, {known}.") from error

    @contextmanager
    def open(
        self, name: str, start: int = 0, stop: int | None = None, validator: str | None = None
    ) -> Iterator[Transfer]:
        """Begin to read; see `Store.open`. Versions have no names here: the hash of the whole decides."""
        path = f"{self._root.rstrip('/')}/{name}"
        size = int(self._ask(self._files.size, path) or 0)
        end = size if stop is None else min(stop, size)
        yield Transfer(start, size, None, self._chunks(path, start, end))

    def _chunks(self, path: str, start: int, stop: int) -> Iterator[bytes]:
        for first in range(start, stop, _CHUNK_BYTES):
            yield self._ask(self._files.cat_file, path, start=first, end=min(first + _CHUNK_BYTES, stop))

    def _ask(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one request in a thread of its own, so that a store without a timeout of its own cannot hang us."""
        answer: Future[Any] = Future()

        def run() -> None:
            try:
                answer.set_result(call(*args, **kwargs))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        try:
            return answer.result(self._timeout_seconds)
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise MissingFileError(f"{type(error).__name__}: {error}") from error
        except TimeoutError as error:
            raise TemporaryFaultError(f"no answer in {self._timeout_seconds:g} s") from error
        except Exception as error:  # each store has errors of its own, of no common root
            raise TemporaryFaultError(f"{type(error).__name__}: {error}") from error
