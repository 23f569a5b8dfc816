"""Where the files of a source lie: local paths, patterns and URLs, opened as local files one after another."""

from __future__ import annotations

import glob
import lzma
import os
import re
import tarfile
import tempfile
import threading
import urllib.parse
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import zstandard

from longspan.data_pipeline.sources.compressed import WrongSuffixError
from longspan.data_pipeline.storage.http import HttpStore
from longspan.data_pipeline.storage.objects import ObjectStore
from longspan.data_pipeline.storage.retry import START_POLICY
from longspan.data_pipeline.storage.store import StorageError, Store
from longspan.data_pipeline.storage.transfer import Transfers
from longspan.errors import DataError, UsageError

FETCH_POLICY = START_POLICY  # a person waits for the build; a wrong address is told soon
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_RUNS_OR_CHAINS = re.compile(r"pipe:|\w+::|.*::\w+://", re.IGNORECASE)
_NOT_LOCAL = re.compile(f"{_URL.pattern}|{_RUNS_OR_CHAINS.pattern}", re.IGNORECASE)
_WEB = ("http", "https")
_PATTERN = re.compile(r"[*?\[]")
# what readers of archives, compressed files and tables raise for a damaged or wrong file
_READ_ERRORS = (
    OSError,
    EOFError,
    WrongSuffixError,
    tarfile.TarError,
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
    zstandard.ZstdError,
    NotImplementedError,  # of zipfile: a compression that it does not know
)


@dataclass(frozen=True)
class Place:
    """One file of a source.

    Attributes:
        address: as messages name it: path or URL.
        name: its file name, from which ids are made.
    """

    address: str
    name: str

    @property
    def is_url(self) -> bool:
        """Whether it has to be fetched."""
        return bool(_URL.match(self.address))


def find_places(source: str, paths: Iterable[str]) -> list[Place]:
    """The files that `paths` name, in this order; matches of a pattern by name.

    Args:
        source: name of the source, for messages.
        paths: local files, URLs (http, https, s3, memory, ...), and patterns with `*` of both; folders stand for all
            files in them. Web servers know no patterns.

    Raises:
        UsageError: there is no such file, nothing matches, or the scheme is not allowed.
    """
    places: list[Place] = []
    for path in paths:
        found = _urls(source, path) if _NOT_LOCAL.match(path) else _files(source, path)
        places += [Place(address, _file_name(address)) for address in found]
    repeated = [address for address, count in Counter(place.address for place in places).items() if count > 1]
    if repeated:
        raise UsageError(f"source {source}: {repeated[0]} is listed twice. Name each file once.")
    return places


@contextmanager
def local_file(source: str, place: Place) -> Iterator[Path]:
    """The place as a local file; a URL is fetched to a temporary one, so that what is read is whole.

    Raises:
        UsageError: the URL does not answer, or what is done with the file shows that it is damaged.
    """
    if not place.is_url:
        with reading(source, place.address):
            yield Path(place.address)
        return
    with tempfile.TemporaryDirectory(prefix="longspan-") as folder:
        path = Path(folder) / place.name
        try:
            _fetch(source, place.address, path)
        except StorageError as error:
            raise UsageError(f"source {source}: {place.address} cannot be fetched: {error}") from error
        except OSError as error:
            raise UsageError(
                f"source {source}: {place.address} cannot be kept in {folder}: {error.strerror}. "
                f"Set TMPDIR to a folder with more room."
            ) from error
        with reading(source, place.address):
            yield path


@contextmanager
def reading(source: str, address: str) -> Iterator[None]:
    """Turn what readers raise for a damaged or wrong file into an error that names source and file.

    Raises:
        UsageError: instead of them.
    """
    try:
        yield
    except _READ_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(
            f"source {source}: {address} cannot be read: {reason or type(error).__name__}. Is it whole, and what its "
            f"name says? Fetch it again, or take it off the source."
        ) from error


def without_suffix(name: str, suffixes: Iterable[str]) -> str:
    """`name` without the first of `suffixes` that it ends with."""
    return next((name[: -len(suffix)] for suffix in suffixes if name.lower().endswith(suffix)), name)


def _file_name(address: str) -> str:
    if not _URL.match(address):
        return Path(address).name
    path = urllib.parse.unquote(urllib.parse.urlsplit(address).path)
    return PurePosixPath(path).name or "file"


def _files(source: str, path: str) -> list[str]:
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        found = [entry.path for entry in os.scandir(expanded) if entry.is_file(follow_symlinks=False)]
    elif os.path.isfile(expanded):
        found = [expanded]
    elif os.path.lexists(expanded):  # opening a pipe or a device would wait for ever
        raise UsageError(f"source {source}: {path} is no file. Set the source's `paths` to files that exist.")
    elif _PATTERN.search(expanded):
        found = [file for file in glob.glob(expanded, recursive=True) if os.path.isfile(file)]
    else:
        raise UsageError(f"source {source}: no file at {path}. Set the source's `paths` to files that exist.")
    if not found:
        raise UsageError(f"source {source}: nothing matches {path}. Set the source's `paths` to files that exist.")
    return sorted(found)


def _urls(source: str, url: str) -> list[str]:
    scheme = _scheme(source, url)
    if scheme == "file":
        return _files(source, urllib.parse.unquote(urllib.parse.urlsplit(url).path))
    if "*" not in url:
        return [url]
    if scheme in _WEB:
        raise UsageError(f"source {source}: {url}: a web server lists no files. Name each file.")
    import fsspec  # only patterns on object stores need it here

    def listed() -> list[str]:
        files, path = fsspec.core.url_to_fs(url)
        return sorted(files.unstrip_protocol(match) for match in files.glob(path))

    try:
        found = _within(FETCH_POLICY.timeout_seconds, listed)
    except Exception as error:  # each store has errors of its own, of no common root
        raise UsageError(f"source {source}: {url} cannot be listed: {error}. Check address and network.") from error
    if not found:
        raise UsageError(f"source {source}: nothing matches {url}. Set the source's `paths` to files that exist.")
    return found


def _within(seconds: float, call: Callable[[], list[str]]) -> list[str]:
    """The result of `call`; TimeoutError after `seconds`, for stores that have no limit of their own."""
    answer: Future[list[str]] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer in {seconds:g} s") from None


def _scheme(source: str, url: str) -> str:
    """The URL's scheme.

    Raises:
        UsageError: it runs commands, joins several stores, or nothing installed knows it.
    """
    if _RUNS_OR_CHAINS.match(url):
        raise UsageError(f"source {source}: {url}: sources run no commands and chain no stores. Use a path or a URL.")
    scheme = url.partition("://")[0].lower()
    if scheme in (*_WEB, "file"):
        return scheme
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"source {source}: {url}: {error}. Known are local paths, http, https, and the stores of fsspec."
        ) from error
    return scheme


def _fetch(source: str, url: str, path: Path) -> None:
    base, mark, query = url.partition("?")  # a query may hold slashes
    folder, _, name = base.rpartition("/")
    scheme = _scheme(source, url)
    store: Store = HttpStore(folder, FETCH_POLICY) if scheme in _WEB else ObjectStore(folder, FETCH_POLICY)
    sink = _FileSink(path)
    try:
        Transfers(store, FETCH_POLICY).copy(f"{name}{mark}{query}", sink)
    except DataError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(str(error)) from error
    finally:
        sink.close()


class _FileSink:
    """Bytes into a file; `position` counts those that it has."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb")
        self.position = 0

    def write(self, chunk: bytes) -> None:
        self._stream.write(chunk)
        self.position += len(chunk)

    def restart(self) -> None:
        self._stream.seek(0)
        self._stream.truncate()
        self.position = 0

    def close(self) -> None:
        self._stream.close()
