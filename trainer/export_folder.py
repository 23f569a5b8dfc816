"""Folders that appear whole or not at all: written beside their place, synced, renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from longspan.errors import CheckpointError, UsageError


def check_target(out: Path, overwrite: bool, marker: str) -> None:
    """See that a folder may be written at `out`.

    Args:
        out: where. overwrite: an earlier one of its kind, or an empty folder, may be there.
        marker: a file by which its kind is known.

    Raises:
        UsageError: something is there that must not be replaced.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise UsageError(f"{out} exists. Choose another folder, or pass --overwrite to replace an earlier one.")
    if not out.is_dir() or (any(out.iterdir()) and not (out / marker).is_file()):
        raise UsageError(
            f"{out} is not an earlier export (it holds no {marker}), so --overwrite does not replace it. "
            "Choose another folder."
        )


@contextlib.contextmanager
def published(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place at the end, or vanishes with all it held.

    Raises:
        UsageError: no folder can be made there.
        CheckpointError: the disk is full or refuses a write; what stood at `out` before still stands there.
    """
    out = out.absolute()
    prefix = f".{out.name}.partial-"
    folder = out.parent / f"{prefix}{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for stale in out.parent.glob(f"{prefix}*"):
            if not _is_running(stale.name.removeprefix(prefix)):  # one that was killed left it
                shutil.rmtree(stale)
        folder.mkdir()
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}. Choose another folder.") from error
    try:
        yield folder
        _sync(folder)
        replaced = folder.with_name(f"{prefix}replaced")
        if out.exists():
            out.rename(replaced)
        folder.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{out} could not be written: {error.strerror or error}. Nothing was left behind, and what was there "
            "before is untouched. Free space on that disk, or choose another folder."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_running(process: str) -> bool:
    """Whether another process of this number runs on this machine."""
    return process.isdigit() and int(process) != os.getpid() and Path("/proc", process).exists()


def _sync(folder: Path) -> None:
    """Force files and folder entries to the disk, so that a name never outlives its contents."""
    for path in [*(file for file in folder.rglob("*")), folder, folder.parent]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
