"""The corpus that a configuration names, wherever it lies. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from longspan.data_pipeline.config import DataConfig
from longspan.data_pipeline.corpus import StorageSettings, open_corpus
from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.manifest import Manifest
from longspan.data_pipeline.storage.addresses import is_url


def open_shards(address: str, data: DataConfig) -> DocumentReader:
    """A reader of the corpus at `address`; what lies behind a URL is read as `data` says.

    Raises:
        As `open_corpus`.
    """
    return open_corpus(address, storage_settings(data))


def read_manifest(address: str, data: DataConfig) -> Manifest:
    """The manifest of the corpus at `address`; its shards need not be there.

    Raises:
        As `open_corpus`.
    """
    if not is_url(address):
        return Manifest.load(address)
    reader = open_shards(address, data)
    reader.close()
    return reader.manifest


def storage_settings(data: DataConfig) -> StorageSettings:
    """How `data` wants a corpus behind a URL to be read."""
    return StorageSettings(
        cache_dir=None if data.cache_dir is None else Path(data.cache_dir),
        cache_gib=data.cache_gib,
        allowed_pipes=tuple(data.allowed_pipes),
    )
