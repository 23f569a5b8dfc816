"""Files to documents: each by itself, or all files of a repository joined in a stable order."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath

from longspan.data_pipeline.sources.tally import Tally
from longspan.data_pipeline.sources.text import SourceDocument
from longspan.errors import DataError

_UNSEEN = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029]")  # control characters, and what ends a line elsewhere


@dataclass(frozen=True)
class SourceFile:
    """A file that belongs to a repository or book.

    Attributes:
        group: the repository's name, its document's id.
        path: in the repository; stands in the header.
        text: UTF-8 bytes after cleaning.
        licence: of the file, if its source says; several with a comma and a space between.
    """

    group: str
    path: str
    text: bytes
    licence: str | None = None


def natural(path: str) -> list[tuple[int, str]]:
    """Sort key of a path: chapter 2 before chapter 10. Only 0 to 9 count as digits, and there may be any number."""
    key = []
    for place, part in enumerate(re.split(r"([0-9]+)", path)):
        if place % 2:  # the split puts numbers at odd places; the one with more digits is the larger
            digits = part.lstrip("0")
            key.append((len(digits), digits))
        else:
            key.append((-1, part))
    return key


def file_header(path: str) -> bytes:
    """The line before a file's text, `# file: PATH`; what would end the line or is not seen is written as an escape.

    So that no name of a file can look like a line of text, or like the header of another file.
    """
    return b"# file: " + _UNSEEN.sub(_escaped, path).encode("utf-8") + b"\n"


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def join_files(files: Iterable[tuple[str, bytes]], headers: bool) -> bytes:
    """One document of path and UTF-8 text of files, in this order.

    With headers each file is `file_header`, its text and a line end; without, texts are parted by an empty line.
    """
    if headers:
        return b"\n".join(file_header(path) + text.rstrip() + b"\n" for path, text in files)
    return b"\n\n".join(text.strip() for _, text in files) + b"\n"


def group_of(path: str, depth: int, whole: str) -> tuple[str, str] | None:
    """Repository and path inside it, of a file whose first `depth` folders name its repository.

    Args:
        path: with `/`. depth: 0 means that everything is one repository, called `whole`.

    Returns:
        None if the file lies above all repositories.
    """
    if depth == 0:
        return whole, path
    parts = PurePosixPath(path).parts
    if len(parts) <= depth:
        return None
    return "/".join(parts[:depth]), "/".join(parts[depth:])


def sorted_groups(files: Iterable[SourceFile], headers: bool, tally: Tally) -> Iterator[SourceDocument]:
    """One document a group, from files in any order: by name of the group, and in it by natural order of the path.

    The files wait in a temporary database on disk, so that memory holds one repository at a time.

    Raises:
        DataError: the disk is full.
    """
    store = sqlite3.connect("", isolation_level=None, check_same_thread=False)  # "": a private file, gone when closed
    try:
        store.execute("PRAGMA journal_mode=OFF")
        store.execute("PRAGMA synchronous=OFF")
        store.execute("PRAGMA cache_size=-32768")
        store.execute("CREATE TABLE file (number INTEGER PRIMARY KEY, name TEXT, path TEXT, licence TEXT, body BLOB)")
        store.execute("BEGIN")
        store.executemany(
            "INSERT INTO file (name, path, licence, body) VALUES (?, ?, ?, ?)",
            ((file.group, file.path, file.licence, file.text) for file in files),
        )
        store.execute("CREATE INDEX by_name ON file (name, number)")
        rows = store.execute("SELECT name, path, body, licence FROM file ORDER BY name, number")
        yield from joined_groups((SourceFile(*row) for row in rows), headers, tally)
    except sqlite3.Error as error:
        raise DataError(
            f"source {tally.source}: grouping files on disk failed: {error}. Set SQLITE_TMPDIR to a folder with room."
        ) from error
    finally:
        store.close()


def joined_groups(files: Iterable[SourceFile], headers: bool, tally: Tally) -> Iterator[SourceDocument]:
    """One document a group, from files that come group by group; in a group by natural order of the path."""
    for name, members in groupby(files, key=lambda file: file.group):
        by_path: dict[str, SourceFile] = {}
        for file in members:
            if not file.text.strip():
                continue
            if file.path in by_path:
                tally.leave_out("files whose path occurred before in their repository", f"{name}/{file.path}")
            else:
                by_path[file.path] = file
        ordered = sorted(by_path.values(), key=lambda file: natural(file.path))
        licences = sorted({one for file in ordered for one in (file.licence or "").split(", ") if one})
        text = join_files(((file.path, file.text) for file in ordered), headers) if ordered else b""
        yield SourceDocument(name, text, ", ".join(licences) or None)
