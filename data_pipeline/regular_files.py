"""Opening files that must be files: a named pipe in their place would be waited for, a device never ends."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_descriptor(path: Path) -> int:
    """A descriptor of the regular file at `path`, or at the end of a link, for reading; the caller closes it.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe, a socket or a device.
    """
    # without O_NONBLOCK, opening a pipe waits for a writer; a regular file is read as ever
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a regular file but a pipe, socket or device", str(path))


def open_regular(path: Path) -> BinaryIO:
    """As `open_descriptor`, as a stream of bytes that can seek."""
    return os.fdopen(open_descriptor(path), "rb")


def read_regular(path: Path) -> bytes:
    """All bytes of a regular file; OSError as `open_descriptor`."""
    with open_regular(path) as stream:
        return stream.read()
