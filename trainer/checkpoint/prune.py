"""Which checkpoints are removed: all but the newest, the milestones and the pinned; and what a crash left behind."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from longspan.trainer.checkpoint.crash_points import crash_point
from longspan.trainer.checkpoint.files import sync_folder
from longspan.trainer.checkpoint.manifest import committed_folders, step_of
from longspan.trainer.checkpoint.verify import pinned

TEMPORARY_PREFIX = ".tmp-"


def temporary_name(what: str) -> str:
    """A fresh folder name that is removed as an orphan if it survives a crash.

    The random part does not come from a generator whose state is part of the run.
    """
    return f"{TEMPORARY_PREFIX}{what}-{secrets.token_hex(4)}"


def remove_orphans(root: Path, warn: Callable[[str], None]) -> None:
    """Remove temporary folders that a crash left in `root`. Only the holder of the run directory's lock may."""
    for folder in sorted(root.glob(f"{TEMPORARY_PREFIX}*")):
        try:
            shutil.rmtree(folder)
        except OSError as error:
            warn(f"left-over {folder} could not be removed: {error}. The next save tries again.")


def prune(
    root: Path, published: Path, *, keep_last: int, milestone_interval_steps: int | None, warn: Callable[[str], None]
) -> list[Path]:
    """Remove old checkpoints after `published` was written.

    Kept are `published` itself (so that one that verifies always remains), the newest `keep_last`, multiples of
    `milestone_interval_steps`, and pinned ones. A disk error is reported through `warn`; the next prune tries again.

    Returns:
        The folders removed.
    """
    folders = committed_folders(root)
    kept = {published, *folders[-keep_last:]}
    removed = []
    for folder in folders:
        milestone = milestone_interval_steps is not None and (step_of(folder) or 0) % milestone_interval_steps == 0
        if folder in kept or milestone:
            continue
        try:
            if not pinned(folder) and _remove(root, folder):
                removed.append(folder)
        except OSError as error:
            warn(f"old checkpoint {folder} could not be removed: {error}. The next save tries again.")
    return removed


def _remove(root: Path, folder: Path) -> bool:
    """Take the folder away at once, then remove its files; False if it was pinned meanwhile."""
    away = root / temporary_name(f"prune-{folder.name}")
    os.rename(folder, away)
    crash_point("mid-prune")
    if pinned(folder):  # between our look and the rename: give it back
        os.rename(away, folder)
        sync_folder(root)
        return False
    shutil.rmtree(away)
    return True
