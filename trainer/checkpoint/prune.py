"""Which checkpoints are removed: all but the newest, the milestones and the pinned; and what a crash left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longspan.trainer.checkpoint.files import TEMPORARY_PREFIX
from longspan.trainer.checkpoint.manifest import committed_folders, step_of
from longspan.trainer.checkpoint.places import Place
from longspan.trainer.checkpoint.verify import pinned


def remove_orphans(root: Path, warn: Callable[[str], None]) -> None:
    """Remove temporary folders that a crash left in `root`. Only the holder of the run directory's lock may."""
    for folder in sorted(root.glob(f"{TEMPORARY_PREFIX}*")):
        try:
            shutil.rmtree(folder)
        except OSError as error:
            warn(f"left-over {folder} could not be removed: {error}. The next save tries again.")


def prune(
    root: Place,
    published: Place,
    *,
    keep_last: int,
    milestone_interval_steps: int | None,
    remove: Callable[[Any], bool],
    warn: Callable[[str], None],
) -> list[Place]:
    """Remove old checkpoints after `published` was written.

    Kept are `published` itself (so that one that verifies always remains), the newest `keep_last`, multiples of
    `milestone_interval_steps`, and pinned ones. A disk error is reported through `warn`; the next prune tries again.

    Args:
        root: folder of the checkpoints. published: the one just written.
        keep_last, milestone_interval_steps: as in `CheckpointStore`.
        remove: takes one away; False if it was pinned meanwhile.
        warn: takes messages.

    Returns:
        The folders removed.
    """
    try:
        folders = committed_folders(root)
    except OSError as error:  # what was published is there all the same
        warn(f"{root} cannot be listed, so no old checkpoint was removed: {error}. The next save tries again.")
        return []
    kept = {published, *folders[-keep_last:]}
    removed = []
    for folder in folders:
        milestone = milestone_interval_steps is not None and (step_of(folder) or 0) % milestone_interval_steps == 0
        if folder in kept or milestone:
            continue
        try:
            if not pinned(folder) and remove(folder):
                removed.append(folder)
        except OSError as error:
            warn(f"old checkpoint {folder} could not be removed: {error}. The next save tries again.")
    return removed
