"""Checking, naming and pinning checkpoints: what everybody but the trainer's own save and load needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from longspan.errors import CheckpointError, UsageError
from longspan.trainer.checkpoint.fetch import fetch
from longspan.trainer.checkpoint.files import UnreadableError, check_file
from longspan.trainer.checkpoint.manifest import COMMITTED, MANIFEST, Manifest, committed_folders, read_manifest
from longspan.trainer.checkpoint.places import Place, children, place_of

CHECKPOINTS = "checkpoints"
PINS = "pins"

_OWNER = re.compile(r"^[A-Za-z0-9._=-]{1,128}$")


def verify(path: Place) -> dict[str, Any]:
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


def checked_manifest(path: Place, skip: str | None = None) -> tuple[Manifest, str]:
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
        problems = [error]
    if problems:
        found = damaged(path, [str(problem) for problem in problems])
        # nobody may take a store that does not answer for damage
        raise UnreadableError(str(found)) if any(isinstance(p, UnreadableError) for p in problems) else found
    return manifest, fingerprint_


def _problems(path: Place, manifest: Manifest, skip: str | None) -> list[CheckpointError]:
    problems = []
    for name, entry in sorted(manifest.files.items()):
        if skip is None or not name.startswith(skip):
            try:
                check_file(path, name, entry, manifest.chunk_bytes)
            except CheckpointError as error:
                problems.append(error)
    return problems


def damaged(path: Place, problems: list[str]) -> CheckpointError:
    """The error for a checkpoint that somebody named and that does not verify."""
    return CheckpointError(
        f"checkpoint {path} does not verify:\n"
        + "\n".join(f"  {problem}" for problem in problems)
        + "\nName another checkpoint of the run; `longspan train --resume` falls back to the newest that verifies."
    )


def fingerprint(path: Place) -> str:
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

    One in a store (an address, or a run whose `checkpoint.folder` is one) is copied to this machine first.

    Raises:
        UsageError: there is no such path, or no published checkpoint there.
        CheckpointError: the one in a store cannot be read, or does not verify.
    """
    place = place_of(path)
    try:
        _must_exist(place)
        root = None if (place / COMMITTED).is_file() else checkpoints_of(place)
        folders = [place] if root is None else committed_folders(root)
    except OSError as error:
        raise CheckpointError(f"{place} cannot be read: {error.strerror or error}. Check the store.") from error
    if folders:
        found = folders[-1]
        return found if isinstance(found, Path) else fetch(found, place if isinstance(place, Path) else None)
    if (place / MANIFEST).exists():
        read_manifest(place)  # raises: no COMMITTED
    raise UsageError(
        f"{place} is neither a checkpoint (it holds no {COMMITTED} file) nor a run directory with a published one "
        f"(none in {root}). Name a run directory or a folder like RUN/{CHECKPOINTS}/step-00001000."
    )


def checkpoints_of(run: Place) -> Place:
    """Where the checkpoints of a run lie: RUN/checkpoints, or what its configuration names.

    An address that holds checkpoints itself, such as a run's `checkpoint.folder`, stands for its run.
    """
    config = run / "config.yaml"
    if isinstance(run, Path) and config.is_file():
        try:
            folder = yaml.safe_load(config.read_text(encoding="utf-8"))["checkpoint"]["folder"]
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            folder = None  # another version's, or damaged: the folder beside it is the best guess
        if isinstance(folder, str):
            return place_of(folder)
    if not (run / CHECKPOINTS).is_dir() and committed_folders(run):
        return run
    return run / CHECKPOINTS


def _must_exist(path: Place) -> None:
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise UsageError(f"checkpoint {path} {what}. Name a run directory or RUN/{CHECKPOINTS}/step-00001000.")


def pin(path: Place, owner: str) -> None:
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


def unpin(path: Place, owner: str) -> None:
    """Take back `pin`; nothing happens if this owner has not pinned it."""
    marker = _pin_marker(path, owner)
    marker.unlink(missing_ok=True)


def pinned(path: Place) -> list[str]:
    """Owners that pin a checkpoint."""
    return sorted(marker.name for marker in children(_pin_folder(path)))


def _pin_folder(path: Place) -> Place:
    path = path.absolute()
    return path.parent / PINS / path.name


def _pin_marker(path: Place, owner: str) -> Place:
    if not _OWNER.match(owner) or owner in (".", ".."):
        raise UsageError(f"pin owner {owner!r}: use 1 to 128 letters, digits and . _ = -")
    return _pin_folder(path) / owner
