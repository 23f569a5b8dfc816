"""Folders that appear whole or not at all: written beside their place, synced, then put there in one step.

Beside `out`, while it is written and after a kill, there may be

    .NAME.partial-PROCESS   what is being written; after the exchange, the earlier folder until it is removed
    .NAME.replaced-PROCESS  the earlier folder between the two renames, where a file system cannot exchange names

The next `published` of the same place removes those of processes that ended, or puts the earlier folder back if
nothing stands in its place.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from longspan.errors import CheckpointError, UsageError
from longspan.trainer.checkpoint.crash_points import crash_point
from longspan.trainer.checkpoint.files import sync_folder

POINTS = (
    "export-before-swap",  # everything written and synced under the temporary name
    "export-mid-swap",  # without an exchange of names: the earlier folder renamed away, nothing in its place yet
    "export-after-swap",  # in place; the earlier folder not removed yet
)
"""Where fault tests end the process (`checkpoint/crash_points.py`)."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_NOT_KNOWN = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)  # kernel or file system without an exchange
_OCCUPIED = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


def check_target(out: Path, overwrite: bool, marker: str) -> None:
    """See that a folder may be written at `out`.

    Args:
        out: where; a link to a folder means that folder.
        overwrite: an earlier one of its kind, or an empty folder, may be there.
        marker: a file by which its kind is known.

    Raises:
        UsageError: something is there that must not be replaced.
    """
    place = real_place(out)
    if not os.path.lexists(place):
        return
    if not overwrite:
        raise UsageError(f"{out} exists. Choose another folder, or pass --overwrite to replace an earlier one.")
    if not _may_be_replaced(place, marker):
        raise UsageError(
            f"{out} is not an earlier export (it holds no {marker}), so --overwrite does not replace it. "
            "Choose another folder."
        )


def real_place(out: Path) -> Path:
    """`out` as an absolute path without links. Raises UsageError if its links lead in a circle."""
    try:
        return out.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links, before Python 3.13
        raise UsageError(f"{out} cannot be followed: {error}. Choose another folder.") from error


@contextlib.contextmanager
def published(out: Path, overwrite: bool, marker: str) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place at the end, or vanishes with all it held.

    Where the system can exchange two names (`renameat2`), there is no moment without the earlier or the new folder,
    whatever happens. Elsewhere there is one between two renames, and the next call mends what a kill left there.

    Args:
        out, overwrite, marker: as of `check_target`, which is asked again before anything is replaced.

    Raises:
        UsageError: no folder can be made there, or something came there meanwhile that must not be replaced.
        CheckpointError: the disk is full or refuses a write; what stood at `out` before still stands there.
    """
    place = real_place(out)
    folder = _beside(place, "partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _mend(place)
        check_target(out, overwrite, marker)
        folder.mkdir()
        own = folder.stat().st_ino
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror or error}. Choose another folder.") from error
    try:
        yield folder
        _sync(folder)
        crash_point("export-before-swap")
        check_target(out, overwrite, marker)
        _put(folder, place, marker, out)
    except OSError as error:
        raise CheckpointError(
            f"{out} could not be written: {error.strerror or error}. Nothing was left behind, and what was there "
            "before is untouched. Free space on that disk, or choose another folder."
        ) from error
    finally:
        if folder.exists() and folder.stat().st_ino == own:  # never what somebody else put at `out`
            shutil.rmtree(folder, ignore_errors=True)
    try:
        sync_folder(place.parent)
    except OSError as error:
        raise CheckpointError(
            f"{out} is written, but the disk does not say that it would outlive a power loss: "
            f"{error.strerror or error}. Look after that disk, then write it again with --overwrite."
        ) from error


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two folders of one file system in one step; False where the system cannot.

    Raises:
        OSError: it can, but not these two.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if not rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in _NOT_KNOWN:
        return False
    raise OSError(number, os.strerror(number), str(second))


def _put(folder: Path, place: Path, marker: str, out: Path) -> None:
    """Give `folder` the name `place`, and remove what stood there."""
    if not os.path.lexists(place):
        _rename_into(folder, place, out)
        crash_point("export-after-swap")
        return
    if exchange(folder, place):
        earlier = folder
        if not _may_be_replaced(earlier, marker):  # it came between our look and the exchange: give it back
            exchange(folder, place)
            raise _occupied(out)
    else:
        earlier = _beside(place, "replaced")
        os.rename(place, earlier)
        try:
            crash_point("export-mid-swap")
            if not _may_be_replaced(earlier, marker):
                raise _occupied(out)
            _rename_into(folder, place, out)
        except BaseException:
            if not os.path.lexists(place):
                os.rename(earlier, place)
            raise
    crash_point("export-after-swap")
    shutil.rmtree(earlier, ignore_errors=True)


def _rename_into(folder: Path, place: Path, out: Path) -> None:
    try:
        os.rename(folder, place)
    except OSError as error:
        if error.errno in _OCCUPIED:
            raise _occupied(out) from error
        raise


def _occupied(out: Path) -> UsageError:
    return UsageError(
        f"{out} was written by somebody else meanwhile, and is untouched. Choose another folder, or look at what is "
        "there and pass --overwrite."
    )


def _may_be_replaced(place: Path, marker: str) -> bool:
    return place.is_dir() and not place.is_symlink() and ((place / marker).is_file() or not any(place.iterdir()))


def _beside(place: Path, what: str) -> Path:
    return place.with_name(f".{place.name}.{what}-{os.getpid()}")


def _mend(place: Path) -> None:
    """Remove what killed processes left beside `place`; put back what they took away, if nothing stands there."""
    for what in ("replaced", "partial"):
        prefix = f".{place.name}.{what}-"
        for stale in place.parent.glob(f"{glob.escape(prefix)}*"):
            if _is_running(stale.name.removeprefix(prefix)):
                continue
            if what == "replaced" and not os.path.lexists(place):
                os.rename(stale, place)
            else:
                shutil.rmtree(stale)


def _is_running(process: str) -> bool:
    """Whether another process of this number runs on this machine."""
    return process.isdigit() and int(process) != os.getpid() and Path("/proc", process).exists()


def _sync(folder: Path) -> None:
    """Force files and folder entries to the disk, so that a name never outlives its contents."""
    for path in [*(file for file in folder.rglob("*")), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
