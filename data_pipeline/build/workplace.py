"""The folders of a build: what it may write over, where it works, and how the finished corpus appears at once.

Beside the corpus OUT lie `.OUT.spool`, the finished pieces of work that a build after a kill goes on from, and
`.OUT.building`, which becomes OUT by one rename.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from longspan.data_pipeline import statistics
from longspan.data_pipeline.corpus_config import CorpusConfig
from longspan.data_pipeline.manifest import MANIFEST_NAME, SCHEMA_NAME, TOKENIZER_FOLDER
from longspan.data_pipeline.regular_files import open_regular
from longspan.data_pipeline.shards import SHARD_NAME
from longspan.data_pipeline.source_config import FolderConfig
from longspan.data_pipeline.tokenization.description import DESCRIPTION_NAME, read_description
from longspan.errors import DataError, UsageError

_HEAD_BYTES = 4096  # the schema's name is at the start of a manifest, which may be large


class WorkerDied(DataError):
    """A process of the build ended before its work did; the finished pieces are kept."""


@dataclass(frozen=True)
class Workplace:
    """Where one build works. `out`: the corpus; `building`: what becomes it; `spool`: finished pieces of work."""

    out: Path

    @property
    def building(self) -> Path:
        """Empty when a build starts; renamed to `out` when it is complete."""
        return self.out.with_name(f".{self.out.name}.building")

    @property
    def spool(self) -> Path:
        """Stays when a build is killed; locked by the one that runs."""
        return self.out.with_name(f".{self.out.name}.spool")

    @property
    def aside(self) -> Path:
        """The corpus that is being replaced, for the moment between two renames."""
        return self.out.with_name(f".{self.out.name}.replaced")


def check_target(out: Path, config: CorpusConfig) -> None:
    """Refuse before anything is read: a target that is not ours, lies inside a source, or cannot be written.

    Raises:
        UsageError: says which of these.
    """
    for source in config.sources:
        if isinstance(source, FolderConfig) and out.is_relative_to(Path(source.path).expanduser().resolve()):
            raise UsageError(
                f"the shards would go to {out}, inside source {source.name} at {source.path}. Choose another --out."
            )
    if out.exists() and not is_corpus(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(
            f"{out} exists and is not just a corpus that Longspan wrote ({MANIFEST_NAME}, {statistics.STATISTICS_NAME} "
            f"and shards). It is left as it is; choose another --out."
        )
    parent = next(folder for folder in out.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(
            f"cannot write to {parent}, where the corpus folder {out.name} should go. Choose another --out."
        )


def is_corpus(folder: Path) -> bool:
    """Whether the folder holds our manifest, whole or damaged, and no file that a build does not write."""
    try:
        with open_regular(folder / MANIFEST_NAME) as stream:
            ours = f'"schema_name": "{SCHEMA_NAME}"'.encode() in stream.read(_HEAD_BYTES)
        names = {file.name for file in folder.iterdir()} - {MANIFEST_NAME, statistics.STATISTICS_NAME}
        if TOKENIZER_FOLDER in names:
            saved = folder / TOKENIZER_FOLDER
            known = {DESCRIPTION_NAME, *read_description(saved).files}
            ours = ours and {file.name for file in saved.iterdir()} <= known
            names.remove(TOKENIZER_FOLDER)
    except (OSError, UsageError):
        return False
    return ours and all(SHARD_NAME.fullmatch(name) for name in names)


@contextmanager
def workplace(out: Path) -> Iterator[Workplace]:
    """The folders of a build, held by it alone; gone afterwards, unless the build is interrupted or killed.

    What is finished stays in the spool folder then.

    Raises:
        UsageError: another build is writing the same corpus.
        DataError: the disk refused a write.
    """
    place = Workplace(out)
    created = [folder for folder in out.parents if not folder.exists()]
    descriptor = None
    keep = False
    try:
        place.spool.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(place)
        _clear_remains(place)
        place.building.mkdir()
        yield place
    except OSError as error:
        raise DataError(f"writing the corpus to {out.parent} failed: {error}. Nothing was left behind.") from error
    except (KeyboardInterrupt, WorkerDied):
        keep = True
        raise
    finally:
        if descriptor is not None:
            shutil.rmtree(place.building, ignore_errors=True)
            if not keep:
                shutil.rmtree(place.spool, ignore_errors=True)
            os.close(descriptor)
        for folder in created:  # innermost first; stays if the corpus is now in it
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


def _lock(place: Workplace) -> int:
    descriptor = os.open(place.spool, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise UsageError(
            f"another build is writing {place.out} right now. Wait for it, or choose another --out."
        ) from None
    return descriptor


def _clear_remains(place: Workplace) -> None:
    """Tidy up after a build that was killed: what it had not finished, and the corpus that it was about to replace."""
    shutil.rmtree(place.building, ignore_errors=True)
    for unfinished in place.spool.glob("*.unfinished"):
        shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
    if place.aside.exists():
        shutil.rmtree(place.aside) if place.out.exists() else place.aside.rename(place.out)


def publish(place: Workplace) -> str:
    """Rename the finished folder into place; a corpus that was there is moved aside first and then removed.

    Returns:
        `built`, or `replaced` if there was one.
    """
    sync_folder(place.building)
    outcome = "replaced" if is_corpus(place.out) else "built"
    if place.out.exists():
        place.out.rename(place.aside)
    try:
        place.building.rename(place.out)
    except OSError:
        if place.aside.exists():
            place.aside.rename(place.out)
        raise
    sync_folder(place.out.parent)
    if place.aside.exists():
        shutil.rmtree(place.aside)
    return outcome


def write_synced(file: Path, content: bytes) -> None:
    """Write a file whose bytes are on the disk when this returns."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Names in the folder are on the disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
