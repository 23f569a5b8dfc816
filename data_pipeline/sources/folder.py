"""A folder of UTF-8 text files, one document per file."""

from __future__ import annotations

from pathlib import Path

from longspan.data_pipeline.corpus_config import FolderConfig
from longspan.data_pipeline.sources.text import SourceDocument, SourceText, read_utf8
from longspan.errors import UsageError


def read_folder(config: FolderConfig) -> SourceText:
    """All files that match the pattern, in order of their relative path; empty files are left out and noted.

    Raises:
        UsageError: the folder is missing, nothing in it matches, or a file is not UTF-8.
    """
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise UsageError(
            f"source {config.name}: no folder at {config.path}. Set the source's `path` to a folder of text files."
        )
    named = sorted((file.relative_to(root).as_posix(), file) for file in root.glob(config.pattern) if file.is_file())
    if not named:
        raise UsageError(
            f"source {config.name}: no file in {config.path} matches {config.pattern}. "
            f"Set the source's `pattern`, e.g. **/*.md."
        )
    for name, _ in named:
        _check_name(name, config)
    texts = read_utf8([file for _, file in named])
    documents = [SourceDocument(name, text) for (name, _), text in zip(named, texts, strict=True) if text]
    empty = [name for (name, _), text in zip(named, texts, strict=True) if not text]
    notes = (f"source {config.name}: left out {len(empty)} empty files, e.g. {empty[0]}",) if empty else ()
    if not documents:
        raise UsageError(f"source {config.name}: all {len(empty)} files in {config.path} are empty. Add some text.")
    return SourceText(documents, "folder", notes)


def _check_name(name: str, config: FolderConfig) -> None:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"source {config.name}: the file name {name!r} is not UTF-8. Rename the file.") from None
