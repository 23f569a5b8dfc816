"""A folder of UTF-8 text files: one document per file, or per folder of files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from longspan.data_pipeline.cleaning.registry import Cleaner
from longspan.data_pipeline.regular_files import read_regular
from longspan.data_pipeline.source_config import FolderConfig
from longspan.data_pipeline.sources.archives import Selection, matches
from longspan.data_pipeline.sources.grouping import SourceFile, group_of, joined_groups, natural
from longspan.data_pipeline.sources.tally import Tally
from longspan.data_pipeline.sources.text import SourceDocument, SourceText, UnreadableFiles, cleaned_text
from longspan.errors import UsageError


def read_folder(config: FolderConfig) -> SourceText:
    """All files that match the pattern, in order of their relative path; links and empty files are left out and noted.

    Raises:
        UsageError: the folder is missing, nothing in it matches, all is empty, or a file is not UTF-8.
    """
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise UsageError(
            f"source {config.name}: no folder at {config.path}. Set the source's `path` to a folder of text files."
        )
    tally = Tally(config.name)
    names = _matching(root, config, tally)
    if not names:
        raise UsageError(
            f"source {config.name}: no file in {config.path} matches {config.pattern}. "
            f"Set the source's `pattern`, e.g. **/*.md."
        )
    if not any((root / name).stat().st_size for name in names):
        raise UsageError(f"source {config.name}: all {len(names)} files in {config.path} are empty. Add some text.")
    if config.form == "files":
        documents: Iterator[SourceDocument] = (
            SourceDocument(name, text) for name, text in _texts(root, names, config, tally)
        )
    else:
        documents = joined_groups(_grouped(root, names, config, tally), config.form == "repository", tally)
    return SourceText(documents, "folder", tally)


def _matching(root: Path, config: FolderConfig, tally: Tally) -> list[str]:
    """Relative paths of the files that count, sorted; nothing that is a link or lies behind one."""
    linked: dict[Path, bool] = {root: False}

    def is_linked(path: Path) -> bool:
        if path not in linked:
            linked[path] = path.is_symlink() or is_linked(path.parent)
        return linked[path]

    selection = Selection(("*",), config.exclude, config.max_file_bytes, tally)
    names = []
    for file in root.glob(config.pattern):
        name = file.relative_to(root).as_posix()
        if is_linked(file.parent) or file.is_symlink():
            if not matches(name, config.exclude):
                tally.leave_out("links", ascii(name).strip("'"))
        elif file.is_file() and selection.takes(name, file.stat().st_size):
            names.append(name)
            _check_name(name, config)
    return sorted(names)


def _texts(root: Path, names: list[str], config: FolderConfig, tally: Tally) -> Iterator[tuple[str, bytes]]:
    """Name and cleaned text of each file. After a file that is not UTF-8 the rest is only looked through for others."""
    cleaner, unreadable = Cleaner(config.clean), UnreadableFiles()
    for name in names:
        try:
            data = read_regular(root / name)
            text = cleaned_text(cleaner, name, data, tally)
        except (UnicodeDecodeError, OSError) as error:
            unreadable.add(root / name, error)
            continue
        if not data:
            tally.leave_out("empty files", name)
        elif text is not None and not unreadable:
            yield name, text
    if unreadable:
        raise unreadable.error()


def _grouped(root: Path, names: list[str], config: FolderConfig, tally: Tally) -> Iterator[SourceFile]:
    places = {}
    for name in names:
        place = group_of(name, config.repository_depth, root.resolve().name)
        if place is None:
            tally.leave_out("files above the folders that are repositories", name)
        else:
            places[name] = place
    ordered = sorted(places, key=lambda name: (places[name][0], natural(places[name][1])))
    for name, text in _texts(root, ordered, config, tally):
        yield SourceFile(*places[name], text)


def _check_name(name: str, config: FolderConfig) -> None:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"source {config.name}: the file name {name!r} is not UTF-8. Rename the file.") from None
