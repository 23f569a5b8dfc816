"""The running Python's standard library, one document per top-level package or module, tests left out."""

from __future__ import annotations

import platform
import sysconfig
from fnmatch import fnmatchcase
from pathlib import Path

from longspan.data_pipeline.source_config import StandardLibraryConfig
from longspan.data_pipeline.sources.grouping import file_header
from longspan.data_pipeline.sources.tally import Tally
from longspan.data_pipeline.sources.text import SourceDocument, SourceText, read_utf8
from longspan.errors import UsageError

_SKIPPED_ENTRIES = (
    # installed packages and tests: not the library itself
    "site-packages",
    "dist-packages",
    "test",
    "idlelib",
    "lib-dynload",
    "__pycache__",
    # build settings of this machine, paths included
    "config-*",
    "_sysconfigdata_*",
    "__phello__*",
    # generated tables and help texts, and a file that belongs to the distribution
    "encodings",
    "pydoc_data",
    "sitecustomize",
)
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "__pycache__"}


def read_standard_library(config: StandardLibraryConfig, root: Path | None = None) -> SourceText:
    """All packages and modules in order of name.

    Args:
        config: the recipe's source.
        root: the library's folder; of the running Python if None.

    Raises:
        UsageError: the library has no .py files (a zipped or byte-compiled build), or one is not UTF-8.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for entry in sorted(root.iterdir(), key=lambda path: path.name) if root.is_dir() else []:
        files = _python_files(entry)
        text = _join(files, root)
        if text:
            documents.append(SourceDocument(entry.stem if entry.is_file() else entry.name, text))
    if not documents:
        raise UsageError(
            f"source {config.name}: no .py files in the standard library at {root}; this Python's library is zipped or "
            f"byte-compiled. Use a Python that has its sources (python.org, conda, apt), or drop the source."
        )
    return SourceText(documents, f"Python {platform.python_version()} standard library", Tally(config.name))


def _python_files(entry: Path) -> list[Path]:
    stem = entry.stem if entry.suffix == ".py" else entry.name
    if any(fnmatchcase(stem, pattern) for pattern in _SKIPPED_ENTRIES):
        return []
    if entry.is_file():
        return [entry] if entry.suffix == ".py" else []
    files = (file for file in entry.rglob("*.py") if file.is_file())
    return sorted(file for file in files if not _SKIPPED_FOLDERS & set(file.relative_to(entry).parts[:-1]))


def _join(files: list[Path], root: Path) -> bytes:
    texts = []
    for file, text in zip(files, read_utf8(files), strict=True):
        body = text.replace(b"\r\n", b"\n").rstrip(b"\n")
        if body:
            texts.append(file_header(file.relative_to(root).as_posix()) + body + b"\n")
    return b"\n".join(texts)
