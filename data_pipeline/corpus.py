"""Open a corpus wherever it lies: its manifest, checked, and a reader of its documents."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.manifest import MANIFEST_NAME, TOKENIZER_FOLDER, Manifest
from longspan.data_pipeline.storage.addresses import is_url, open_store
from longspan.data_pipeline.storage.cache import ShardCache
from longspan.data_pipeline.storage.retry import RUN_POLICY, START_POLICY, Counters, RetryPolicy
from longspan.data_pipeline.storage.shards import RemoteShards
from longspan.data_pipeline.storage.store import StorageError
from longspan.data_pipeline.storage.transfer import Transfers
from longspan.data_pipeline.tokenization.description import DESCRIPTION_NAME, read_description
from longspan.errors import DataError, UsageError

_TRIES = 5  # of a manifest or tokenizer that arrives damaged
_GIB = 2**30
_LOGGER = logging.getLogger("longspan.data")


@dataclass(frozen=True)
class StorageSettings:
    """How a corpus behind a URL is read; a local folder needs none of it.

    Attributes:
        cache_dir: folder of the cache; None: `longspan` in the user's cache folder.
        cache_gib: most that its shards may take; 0: no cache.
        allowed_pipes: programs that a `pipe:` address may run.
        policy: of reading while the run goes on. start_policy: while it starts.
    """

    cache_dir: Path | None = None
    cache_gib: float = 64.0
    allowed_pipes: Sequence[str] = ()
    policy: RetryPolicy = RUN_POLICY
    start_policy: RetryPolicy = START_POLICY


def open_corpus(address: str, settings: StorageSettings | None = None) -> DocumentReader:
    """Manifest and documents of the corpus in a folder or behind a URL.

    A manifest behind a URL, and its tokenizer, are copied to the cache folder; `reader.manifest.folder` is that copy.

    Args:
        address: folder, or URL of one.
        settings: how to read from a URL.

    Raises:
        UsageError: there is no corpus, the address is not reachable, or the cache folder cannot be used.
        DataError: the manifest is damaged, or local shards are missing.
        SecurityError: a `pipe:` address whose program is not allowed.
    """
    if not is_url(address):
        return DocumentReader(Manifest.load(address))
    settings = settings or StorageSettings()
    counters = Counters()
    cache_dir = settings.cache_dir or default_cache_dir()
    start = Transfers(
        open_store(address, settings.start_policy, settings.allowed_pipes), settings.start_policy, counters
    )
    folder = cache_dir / "corpora" / hashlib.sha256(address.encode()).hexdigest()[:16]
    cache = ShardCache(cache_dir / "shards", int(settings.cache_gib * _GIB), counters) if settings.cache_gib else None
    try:
        manifest = _fetch_manifest(start, folder)
        if manifest.shards:
            start.read(manifest.shards[0].url, 0, 1)
    except StorageError as error:
        raise UsageError(f"data.shards = {address}: there is no corpus that can be read: {error}") from error
    except OSError as error:
        raise UsageError(
            f"data.cache_dir = {cache_dir}: {error.strerror}. Name a folder that can be written."
        ) from error
    store = open_store(address, settings.policy, settings.allowed_pipes)
    return DocumentReader(manifest, RemoteShards(manifest.shards, Transfers(store, settings.policy, counters), cache))


def default_cache_dir() -> Path:
    """`longspan` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longspan"


def _fetch_manifest(transfers: Transfers, folder: Path) -> Manifest:
    """The manifest and the tokenizer's files, verified, in `folder`."""
    manifest = _until_right(transfers, partial(_fetch_bare_manifest, transfers, folder))
    if manifest.vocabulary.kind == "bytes":
        return manifest
    return _until_right(transfers, partial(_fetch_tokenizer, transfers, folder))


def _until_right(transfers: Transfers, fetch: Callable[[], Manifest]) -> Manifest:
    """What `fetch` returns; it is called again if something arrives damaged."""
    for attempt in range(1, _TRIES + 1):
        try:
            return fetch()
        except StorageError:
            raise
        except (DataError, UsageError) as error:
            if attempt == _TRIES:
                raise
            transfers.counters.add("hash_mismatches")
            _LOGGER.warning("fetching it again: %s", error)
    raise AssertionError("unreachable")


def _fetch_bare_manifest(transfers: Transfers, folder: Path) -> Manifest:
    content = transfers.read(MANIFEST_NAME)
    manifest = Manifest.read(io.BytesIO(content), folder, f"{transfers.store.address}/{MANIFEST_NAME}")
    _write(folder / MANIFEST_NAME, content)
    return manifest


def _fetch_tokenizer(transfers: Transfers, folder: Path) -> Manifest:
    tokenizer = folder / TOKENIZER_FOLDER
    _write(tokenizer / DESCRIPTION_NAME, transfers.read(f"{TOKENIZER_FOLDER}/{DESCRIPTION_NAME}"))
    for name, sha256 in read_description(tokenizer).files.items():
        content = transfers.read(f"{TOKENIZER_FOLDER}/{name}")
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataError(f"{transfers.store.address}/{TOKENIZER_FOLDER}/{name} does not have sha256 {sha256[:16]}.")
        _write(tokenizer / name, content)
    return Manifest.load(folder)  # compares the tokenizer's description with the vocabulary


def _write(file: Path, content: bytes) -> None:
    """Write under a temporary name and rename: ranks write the same files at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
