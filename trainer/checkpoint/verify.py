"""Checking, naming and pinning checkpoints: what everybody but the trainer's own save and load needs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from longspan.errors import CheckpointError, UsageError
from longspan.trainer.checkpoint.files import check_file
from longspan.trainer.checkpoint.manifest import COMMITTED, MANIFEST, Manifest, committed_folders, read_manifest

CHECKPOINTS = "checkpoints"
PINS = "pins"

_OWNER = re.compile(r"^[A-Za-z0-9._=-]{1,128}$")


def verify(path: Path) -> dict[str, Any]:
    """Check every file of one checkpoint against its manifest, and the manifest against COMMITTED.

    Args:
        path: checkpoint folder.

    Returns:
        The manifest: step, world_size, files with size and sha256, ... (see `Manifest`).

    Raises:
        UsageError: not a checkpoint folder.
        CheckpointError: names each damaged file and the byte range in it.
    """
    return checked_manifest(path)[0].model_dump()


def checked_manifest(path: Path, skip: str | None = None) -> tuple[Manifest, str]:
    """As `verify`, returning the manifest object and the fingerprint.

    Args:
        path: checkpoint folder.
        skip: files whose path starts with this are left to the caller, who reads them with `read_checked` anyway.
    """
    _must_exist(path)
    try:
        manifest, fingerprint_ = read_manifest(path)
        problems = _problems(path, manifest, skip)
    except CheckpointError as error:
        problems = [str(error)]
    if problems:
        raise damaged(path, problems)
    return manifest, fingerprint_


def _problems(path: Path, manifest: Manifest, skip: str | None) -> list[str]:
    problems = []
    for name, entry in sorted(manifest.files.items()):
        if skip is None or not name.startswith(skip):
            try:
                check_file(path, name, entry, manifest.chunk_bytes)
            except CheckpointError as error:
                problems.append(str(error))
    return problems


def damaged(path: Path, problems: list[str]) -> CheckpointError:
    """The error for a checkpoint that somebody named and that does not verify."""
    return CheckpointError(
        f"checkpoint {path} does not verify:\n"
        + "\n".join(f"  {problem}" for problem in problems)
        + "\nName another checkpoint of the run; `longspan train --resume` falls back to the newest that verifies."
    )


def fingerprint(path: Path) -> str:
    """Hex sha256 of the manifest, which holds the sha256 of everything else: equal contents, equal fingerprint.

    Raises:
        UsageError, CheckpointError: as `verify`, for the manifest and COMMITTED alone.
    """
    _must_exist(path)
    try:
        return read_manifest(path)[1]
    except CheckpointError as error:
        raise damaged(path, [str(error)]) from error


def newest(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest published one of a run directory.

    Raises:
        UsageError: there is no such path, or no published checkpoint there.
    """
    _must_exist(path)
    if (path / COMMITTED).is_file():
        return path
    folders = committed_folders(path / CHECKPOINTS)
    if folders:
        return folders[-1]
    if (path / MANIFEST).exists():
        read_manifest(path)  # raises: no COMMITTED
    raise UsageError(
        f"{path} is neither a checkpoint (it holds no {COMMITTED} file) nor a run directory with a published one "
        f"(none in {path / CHECKPOINTS}). Name a run directory or a folder like RUN/{CHECKPOINTS}/step-00001000."
    )


def _must_exist(path: Path) -> None:
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise UsageError(f"checkpoint {path} {what}. Name a run directory or RUN/{CHECKPOINTS}/step-00001000.")


def pin(path: Path, owner: str) -> None:
    """Keep a checkpoint from being pruned until `unpin`; lasts over restarts, several owners may pin one.

    Args:
        path: checkpoint folder.
        owner: letters, digits and `. _ = -`; the same owner may pin again.

    Raises:
        UsageError: the owner's name cannot be a file's, or the checkpoint is gone (pruned just before).
    """
    marker = _pin_marker(path, owner)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()
    # the pruner looks for pins again after it has taken a folder away, so a pin before this look holds
    if not (path / COMMITTED).is_file():
        unpin(path, owner)
        raise UsageError(f"checkpoint {path} cannot be pinned: it is not there (pruned, or never published).")


def unpin(path: Path, owner: str) -> None:
    """Take back `pin`; nothing happens if this owner has not pinned it."""
    marker = _pin_marker(path, owner)
    marker.unlink(missing_ok=True)


def pinned(path: Path) -> list[str]:
    """Owners that pin a checkpoint."""
    folder = _pin_folder(path)
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def _pin_folder(path: Path) -> Path:
    path = path.absolute()
    return path.parent / PINS / path.name


def _pin_marker(path: Path, owner: str) -> Path:
    if not _OWNER.match(owner) or owner in (".", ".."):
        raise UsageError(f"pin owner {owner!r}: use 1 to 128 letters, digits and . _ = -")
    return _pin_folder(path) / owner
