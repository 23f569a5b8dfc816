"""What a remote store does, and the faults it may meet. One attempt only: retries are in `transfer`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from longspan.errors import DataError


class StorageError(DataError):
    """A store does not answer, or a file is not there (exit 70).

    Never a reason to quarantine a document: the document may be whole, and a resumed run reads it.
    """


class TemporaryFaultError(Exception):
    """A fault that may be gone at the next attempt: refused connection, stall, cut body, status 5xx."""


class WrongSizeError(TemporaryFaultError):
    """The store has a file of another size than the manifest says. If that lasts, the file is damaged."""


class MissingFileError(Exception):
    """The store says for certain that it will not give the file: not found, or forbidden."""


@dataclass
class Transfer:
    """One answer of a store.

    Attributes:
        start: byte of the file that `chunks` begins with; 0 although more was asked for if the store cannot continue,
            or if the file is another one by now.
        size: bytes of the whole file; None if the store does not say.
        validator: what the store calls this version of the file (strong ETag); None if it has no name for it.
        chunks: the bytes. Raises TemporaryFaultError when they stop coming.
    """

    start: int
    size: int | None
    validator: str | None
    chunks: Iterator[bytes]


class Store(Protocol):
    """A folder of files behind an address.

    Attributes:
        address: as it was given; names the store in messages.
    """

    address: str

    def open(
        self, name: str, start: int = 0, stop: int | None = None, validator: str | None = None
    ) -> AbstractContextManager[Transfer]:
        """Begin to read bytes `start` to `stop` (the end if None) of the file `name`.

        Args:
            name: plain file name in the folder, or a path below it.
            start, stop: byte range.
            validator: go on only in this version of the file, else begin at 0.

        Raises:
            TemporaryFaultError: try again.
            MissingFileError: trying again does not help.
        """
        ...
