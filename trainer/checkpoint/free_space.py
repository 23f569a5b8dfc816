"""Room for checkpoints, asked for before it is used up. Stores have no such number; quotas show only in writes."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from longspan.trainer.checkpoint.places import Place


def free_bytes(root: Place) -> int | None:
    """Bytes that an ordinary user can still write where `root` is or will be; None where nobody can say."""
    if not isinstance(root, Path):
        return None
    try:
        existing = next(place for place in (root, *root.absolute().parents) if place.exists())
        return shutil.disk_usage(existing).free
    except (OSError, StopIteration):
        return None


def check_space(root: Place, needed_bytes: int) -> None:
    """See whether a checkpoint fits before a byte of it is written.

    Raises:
        OSError: ENOSPC, with the numbers.
    """
    free = free_bytes(root)
    if free is not None and free < needed_bytes:
        raise OSError(errno.ENOSPC, f"No space left for a checkpoint of {needed_bytes:,} bytes", str(root))


def shortage(root: Place, checkpoint_bytes: int, keep_last: int, num_there: int) -> str | None:
    """What a run should hear at its start if its checkpoints will not fit; None if they will, or nobody can say.

    Args:
        root: where they go.
        checkpoint_bytes: of one, as the model and optimizer are.
        keep_last: how many are kept; one more is there while it is written.
        num_there: how many are there already.
    """
    free = free_bytes(root)
    needed = max(1, keep_last + 1 - num_there) * checkpoint_bytes
    if free is None or free >= needed:
        return None
    return (
        f"{root}: {free:,} bytes free, but checkpoint.keep_last = {keep_last} and the one being written take "
        f"{needed:,} more ({checkpoint_bytes:,} each). Saves will fail when it is full, and training will go on "
        f"without them. Free space, lower checkpoint.keep_last, or set checkpoint.folder to another disk or a store."
    )
