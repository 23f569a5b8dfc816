"""Bugs that a life of a reader can be given; each changes the forked child alone.

They prove that the comparison of what was delivered sees a reader that trusts, forgets or gives up.
"""

from __future__ import annotations

from typing import Any

from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.reader import LaneReader
from longspan.data_pipeline.storage.cache import ShardCache
from longspan.data_pipeline.storage.transfer import Transfers
from longspan.errors import DataError


def trust_what_arrives() -> None:
    """Bug: neither shards nor documents are hashed."""
    ShardCache._is_right = lambda self, shard, sink: True  # type: ignore[method-assign]

    def compare(self: DocumentReader, entry: Any, digest: Any) -> None:
        self._verified.add(entry.id)

    DocumentReader._compare = compare  # type: ignore[method-assign]


def skip_a_step_on_resume() -> None:
    """Bug: a resumed reader goes on one step too far."""
    check, batch = LaneReader.check_state, LaneReader.batch

    def check_state(self: LaneReader, state: dict[str, Any]) -> None:
        check(self, state)
        LaneReader.batch = lambda self, step: batch(self, step + 1)  # type: ignore[method-assign]

    LaneReader.check_state = check_state  # type: ignore[method-assign]


def quarantine_what_the_store_withholds() -> None:
    """Bug: a fault of the store counts as a bad document, at its first occurrence."""

    def wait(self: Transfers, name: str, failures: int, error: Exception) -> None:
        if name.endswith(".tar"):
            raise DataError(str(error))

    Transfers._wait = wait  # type: ignore[method-assign]


def forget_to_shorten_the_log() -> None:
    """Bug of the life, not of the reader: what was delivered after the last state is delivered again."""
    import data_life

    data_life.shorten = lambda log, size: None
