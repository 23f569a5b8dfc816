"""Which store an address means."""

from __future__ import annotations

from collections.abc import Sequence

from longspan.data_pipeline.storage.http import HttpStore
from longspan.data_pipeline.storage.objects import ObjectStore
from longspan.data_pipeline.storage.pipe import PipeStore
from longspan.data_pipeline.storage.retry import RetryPolicy
from longspan.data_pipeline.storage.store import Store


def is_url(address: str) -> bool:
    """Whether `address` is anything but a folder."""
    return "://" in address or address.startswith("pipe:")


def open_store(address: str, policy: RetryPolicy, allowed_pipes: Sequence[str] = ()) -> Store:
    """The store behind an address; nothing is asked of it yet.

    Args:
        address: `http(s)://...`, `s3://...` or another scheme of fsspec, or `pipe:PROGRAM ... {} ...`.
        policy: timeouts.
        allowed_pipes: programs that a `pipe:` address may run.

    Raises:
        UsageError: the scheme is not known. SecurityError: a program that is not allowed.
    """
    if address.startswith("pipe:"):
        return PipeStore(address, policy, allowed_pipes)
    if address.startswith(("http://", "https://")):
        return HttpStore(address, policy)
    return ObjectStore(address, policy)
