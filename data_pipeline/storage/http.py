"""Files over http(s), by range, through urllib3.

urllib3 because it is synchronous and thread-safe (readers are threads), keeps connections, and has a timeout for every
single wait. fsspec's http file system reads through one event loop, has no If-Range, and times whole requests.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

import urllib3

from longspan.data_pipeline.storage.retry import RetryPolicy
from longspan.data_pipeline.storage.store import MissingFileError, TemporaryFaultError, Transfer, WrongSizeError

_CHUNK_BYTES = 2**20
_MOST_REDIRECTS = 5
_AS_GIVEN = "/%?&=+:,;@~"  # a signed address carries a query and is quoted already
_CONNECTIONS = 8
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
# 408 and 429 ask to come again, 425 is a proxy's way of saying so; every other 4xx stays as it is
_COME_AGAIN = {408, 425, 429}
_RANGE_NOT_SATISFIABLE = 416


class HttpStore:
    """A folder on a web server."""

    def __init__(self, address: str, policy: RetryPolicy) -> None:
        """Args: address: http(s) URL of the folder; policy: its timeout and least speed are used."""
        self.address = address.rstrip("/")
        self._policy = policy
        timeout = urllib3.Timeout(connect=policy.timeout_seconds, read=policy.timeout_seconds)
        retries = urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=_MOST_REDIRECTS)
        self._pool = urllib3.PoolManager(maxsize=_CONNECTIONS, timeout=timeout, retries=retries)

    @contextmanager
    def open(
        self, name: str, start: int = 0, stop: int | None = None, validator: str | None = None
    ) -> Iterator[Transfer]:
        """Begin to read; see `Store.open`."""
        headers = {"Accept-Encoding": "identity"}  # offsets count the bytes of the file itself
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
            if validator is not None and start:
                headers["If-Range"] = validator
        try:
            response = self._pool.request(
                "GET", f"{self.address}/{quote(name, safe=_AS_GIVEN)}", headers=headers, preload_content=False
            )
        except urllib3.exceptions.HTTPError as error:
            raise TemporaryFaultError(_reason(error)) from error
        whole = False
        try:
            transfer = self._transfer(response, start)
            yield transfer
            whole = True
        except urllib3.exceptions.HTTPError as error:
            raise TemporaryFaultError(_reason(error)) from error
        finally:
            # only a connection whose body was read to the end can be used again
            if whole and response.length_remaining == 0:
                response.release_conn()
            else:
                response.close()

    def _transfer(self, response: urllib3.BaseHTTPResponse, start: int) -> Transfer:
        status = response.status
        if status == _RANGE_NOT_SATISFIABLE:
            raise WrongSizeError(f"status 416: the file ends before byte {start}")
        if 400 <= status < 500 and status not in _COME_AGAIN:
            raise MissingFileError(f"status {status} {response.reason or ''}".rstrip())
        if status not in (200, 206):
            raise TemporaryFaultError(f"status {status} {response.reason or ''}".rstrip())
        etag = response.headers.get("ETag")
        strong = etag if etag and not etag.startswith("W/") else None  # If-Range allows no weak ones
        chunks = self._chunks(response)
        if status == 200:
            length = response.headers.get("Content-Length")
            return Transfer(0, int(length) if length and length.isdigit() else None, strong, chunks)
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            raise TemporaryFaultError(
                f"asked for byte {start}, Content-Range says {response.headers.get('Content-Range')}"
            )
        return Transfer(start, None if match[2] == "*" else int(match[2]), strong, chunks)

    def _chunks(self, response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
        """The body as it comes. A server that sends a byte now and then is a stalled one too."""
        seconds, received, since = self._policy.timeout_seconds, 0, time.monotonic()
        while chunk := response.read1(_CHUNK_BYTES):
            received += len(chunk)
            yield chunk
            now = time.monotonic()
            if now - since > seconds:
                if received < self._policy.min_bytes_per_second * seconds:
                    raise TemporaryFaultError(f"stalled: {received} bytes in {now - since:.1f} s")
                received, since = 0, now


def _reason(error: urllib3.exceptions.HTTPError) -> str:
    """One line without the object addresses that urllib3 prints."""
    cause = error.reason if isinstance(error, urllib3.exceptions.MaxRetryError) and error.reason else error
    text = re.sub(r"<[^>]*>:? ?|\w+\((host|target)=[^)]*\):? ?", "", str(cause)).strip(" .")
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__
