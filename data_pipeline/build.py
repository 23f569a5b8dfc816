"""Corpora to shards: read every source, check, write to a temporary folder, rename.

Nothing is written before all inputs are known to be good, and nothing half-written stays behind.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.data_pipeline import statistics
from longspan.data_pipeline.corpus_config import CorpusConfig, FolderConfig, PackagesConfig, PibleConfig, SourceConfig
from longspan.data_pipeline.manifest import MANIFEST_NAME, SCHEMA_NAME, Manifest, SourceEntry, Split, did_you_mean
from longspan.data_pipeline.shards import SHARD_NAME, PackedDocument, write_shards
from longspan.data_pipeline.sources.books import read_books
from longspan.data_pipeline.sources.folder import read_folder
from longspan.data_pipeline.sources.packages import read_packages
from longspan.data_pipeline.sources.standard_library import read_standard_library
from longspan.data_pipeline.sources.text import SourceText
from longspan.data_pipeline.verify import verify_corpus
from longspan.errors import DataError, LongspanError, UsageError


@dataclass(frozen=True)
class BuildResult:
    """What a build left in `folder`; `outcome` is built, reused or replaced, `statistics` is statistics.json."""

    folder: Path
    manifest: Manifest
    outcome: str
    statistics: dict[str, Any]
    notes: list[str]


def build_corpus(config: CorpusConfig, out: Path, progress: Callable[[str], None]) -> BuildResult:
    """Write the corpus of `config` to `out`.

    Args:
        config: the recipe; its own `out` is not looked at.
        out: folder to make. An identical corpus there is reused, another corpus replaced, anything else refused.
        progress: told of each part of the work, one line at a time.

    Raises:
        UsageError: an input is missing or does not fit; nothing was written.
        DataError: a source does not hold what its recipe says, or the disk refused the write.
    """
    out = out.resolve()
    _check_target(out, config)
    sources = [(source, _read(source, progress)) for source in config.sources]
    documents = _documents(config, sources)
    entries = [
        SourceEntry(name=source.name, kind=source.kind, licence=source.licence, origin=text.origin)
        for source, text in sources
    ]
    notes = [note for _, text in sources for note in text.notes] + _notes(config, documents)
    with _working_folder(out) as work:
        shards, written = write_shards(work, documents, config.shard_bytes, progress)
        manifest = Manifest.create(out, config.name, entries, shards, written)
        existing = _identical(out, manifest)
        if existing is not None:
            return BuildResult(out, manifest, "reused", existing, notes)
        progress("measuring the held-out documents")
        figures = _statistics(documents)
        _write_json(work / statistics.STATISTICS_NAME, json.dumps(figures, indent=2) + "\n")
        _write_json(work / MANIFEST_NAME, manifest.to_json())
        outcome = _publish(work, out)
    return BuildResult(out, manifest, outcome, figures, notes)


def _read(source: SourceConfig, progress: Callable[[str], None]) -> SourceText:
    progress(f"reading {source.name} ({source.kind})")
    if isinstance(source, PibleConfig):
        return read_books(source)
    if isinstance(source, FolderConfig):
        return read_folder(source)
    if isinstance(source, PackagesConfig):
        return read_packages(source)
    return read_standard_library(source)


def _documents(config: CorpusConfig, sources: list[tuple[SourceConfig, SourceText]]) -> list[PackedDocument]:
    held_out = set(config.held_out)
    group_of = {member: name for name, members in config.groups.items() for member in members}
    documents = []
    for source, text in sources:
        for document in text.documents:
            name = f"{source.name}/{document.name}"
            split: Split = "held_out" if name in held_out else "train"
            group = group_of.get(name, name)
            documents.append(PackedDocument(name, source.name, group, split, source.licence, document.text))
    known = [document.id for document in documents]
    unknown = [name for name in config.held_out if name not in set(known)]
    if unknown:
        listed = "\n".join(f"  held_out: no document {name}{did_you_mean(name, known)}" for name in unknown)
        raise UsageError(f"the recipe holds out documents that do not exist:\n{listed}\nIds are SOURCE/NAME.")
    if all(document.split == "held_out" for document in documents):
        raise UsageError(
            f"zero training documents: all {len(documents)} documents are held out. "
            f"Take some off `held_out`, or add text."
        )
    return documents


def _notes(config: CorpusConfig, documents: list[PackedDocument]) -> list[str]:
    known = {document.id for document in documents}
    missing = [(name, member) for name, members in config.groups.items() for member in members if member not in known]
    notes = [f"group {name}: this corpus has no document {member}" for name, member in missing]
    if not config.held_out:
        notes.append("no document is held out: validation and evaluation will have nothing to score")
    return notes


def _statistics(documents: list[PackedDocument]) -> dict[str, Any]:
    held_out = [document.text for document in documents if document.split == "held_out"]
    return {
        "counts": statistics.counts((document.source, document.split, len(document.text)) for document in documents),
        "held_out": statistics.held_out_statistics(held_out),
    }


def _check_target(out: Path, config: CorpusConfig) -> None:
    """Refuse before anything is read: a target that is not ours, lies inside a source, or cannot be written."""
    for source in config.sources:
        if isinstance(source, FolderConfig) and out.is_relative_to(Path(source.path).expanduser().resolve()):
            raise UsageError(
                f"the shards would go to {out}, inside source {source.name} at {source.path}. Choose another --out."
            )
    if out.exists() and not _is_corpus(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(
            f"{out} exists and is not just a corpus that Longspan wrote ({MANIFEST_NAME}, {statistics.STATISTICS_NAME} "
            f"and shards). It is left as it is; choose another --out."
        )
    parent = next(folder for folder in out.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(
            f"cannot write to {parent}, where the corpus folder {out.name} should go. Choose another --out."
        )


def _is_corpus(folder: Path) -> bool:
    """Whether the folder holds our manifest, whole or damaged, and no file that a build does not write."""
    try:
        ours = f'"schema_name": "{SCHEMA_NAME}"'.encode() in (folder / MANIFEST_NAME).read_bytes()
        names = {file.name for file in folder.iterdir()} - {MANIFEST_NAME, statistics.STATISTICS_NAME}
    except OSError:
        return False
    return ours and all(SHARD_NAME.fullmatch(name) for name in names)


def _identical(out: Path, manifest: Manifest) -> dict[str, Any] | None:
    """The statistics of the corpus at `out` if it is whole and the same as `manifest`, else None."""
    if not _is_corpus(out):
        return None
    try:
        if Manifest.load(out).digest != manifest.digest:
            return None
        verify_corpus(out)
        figures = json.loads((out / statistics.STATISTICS_NAME).read_bytes())
    except (LongspanError, OSError, ValueError):
        return None
    return figures if isinstance(figures, dict) else None


@contextmanager
def _working_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, gone afterwards whatever happens; one build at a time may hold it."""
    work = _work_path(out)
    created = [folder for folder in out.parents if not folder.exists()]
    descriptor = None
    try:
        work.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(work, out)
        _clear_remains(work, out)
        yield work
    except OSError as error:
        raise DataError(f"writing the corpus to {out.parent} failed: {error}. Nothing was left behind.") from error
    finally:
        if descriptor is not None:
            shutil.rmtree(work, ignore_errors=True)
            os.close(descriptor)
        for folder in created:  # innermost first; stays if the corpus is now in it
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


def _lock(work: Path, out: Path) -> int:
    descriptor = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise UsageError(f"another build is writing {out} right now. Wait for it, or choose another --out.") from None
    return descriptor


def _clear_remains(work: Path, out: Path) -> None:
    """Tidy up after a build that was killed: its files, and the corpus that it was about to replace."""
    for file in work.iterdir():
        file.unlink()
    aside = _aside_path(out)
    if aside.exists():
        shutil.rmtree(aside) if out.exists() else aside.rename(out)


def _work_path(out: Path) -> Path:
    return out.with_name(f".{out.name}.building")


def _aside_path(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def _publish(work: Path, out: Path) -> str:
    """Rename the finished folder into place; a corpus that was there is moved aside first and then removed."""
    _sync_folder(work)
    outcome = "replaced" if _is_corpus(out) else "built"
    aside = _aside_path(out)
    if out.exists():
        out.rename(aside)
    try:
        work.rename(out)
    except OSError:
        if aside.exists():
            aside.rename(out)
        raise
    _sync_folder(out.parent)
    if aside.exists():
        shutil.rmtree(aside)
    return outcome


def _write_json(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
