"""Checkpoints that are pinned as they are published, because an evaluation is going to want them.

RUN/checkpoints/pins/every/OWNER      OWNER pins each new checkpoint; touched whenever OWNER looks for new ones
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from longspan.trainer.checkpoint.places import Place
from longspan.trainer.checkpoint.verify import PINS

EVERY = "every"
FORGOTTEN_SECONDS = 7 * 86400.0  # a schedule that was given up must not fill the disk


def await_new_ones(root: Path, owner: str) -> None:
    """Pin every checkpoint that is published below `root` (RUN/checkpoints) within the next week, for `owner`."""
    folder = root / PINS / EVERY
    folder.mkdir(parents=True, exist_ok=True)
    (folder / owner).touch()


def pin_awaited(root: Place, name: str) -> None:
    """Pin a checkpoint that is about to be published, for all who wait; a disk error is no reason to lose the save.

    Args:
        root: RUN/checkpoints; nobody waits for those in an object store.
        name: of the folder, not there yet: whoever sees it published may evaluate and unpin it at once.
    """
    if not isinstance(root, Path):
        return
    with suppress(OSError):
        for waiting in (root / PINS / EVERY).iterdir():
            if time.time() - waiting.stat().st_mtime < FORGOTTEN_SECONDS:
                marker = root / PINS / name / waiting.name
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
