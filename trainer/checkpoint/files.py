"""Durable writes that hash while they write, and reads that check what they read.

Everything goes through `os` calls on whole buffers: short writes and disk errors are seen where they happen, the
hash is of the bytes that were handed to the disk, and a test can stop the process at any single call.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import zlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from longspan.errors import CheckpointError
from longspan.trainer.checkpoint.crash_points import crash_point

CHUNK_BYTES = 256 * 1024


class FileEntry(BaseModel):
    """What the manifest says about one file.

    Attributes:
        size: bytes.
        sha256: of the whole file; this decides whether the file is right.
        chunk_crc32: 8 hexadecimal digits for each chunk of the manifest's `chunk_bytes`; says where it is wrong.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    chunk_crc32: str = Field(pattern="^([0-9a-f]{8})*$")


class WriteError(OSError):
    """A file could not be written; `strerror` names the file, the bytes wanted and the bytes free."""


def write_file(folder: Path, name: str, content: bytes) -> FileEntry:
    """Create `folder/name` with `content` and sync it to the disk.

    Args:
        folder: existing folder.
        name: relative path below it; its own folder must exist, the file must not.
        content: all of the file.

    Returns:
        The manifest's entry for it, hashed from the chunks as they were written.

    Raises:
        WriteError: the operating system refused; what was written stays for the caller to remove.
    """
    digest, checksums, written = hashlib.sha256(), [], 0
    view = memoryview(content)
    try:
        handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            for start in range(0, len(view), CHUNK_BYTES):
                chunk = view[start : start + CHUNK_BYTES]
                digest.update(chunk)
                checksums.append(f"{zlib.crc32(chunk):08x}")
                while written < start + len(chunk):
                    count = os.write(handle, view[written : start + len(chunk)])
                    if count == 0:
                        raise OSError(errno.EIO, "the disk took no bytes")
                    written += count
                crash_point("mid-payload")
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise _write_error(error, folder, name, len(view), written) from error
    return FileEntry(size=len(view), sha256=digest.hexdigest(), chunk_crc32="".join(checksums))


def _write_error(error: OSError, folder: Path, name: str, wanted: int, written: int) -> WriteError:
    cause = os.strerror(error.errno) if error.errno else str(error)
    text = f"{folder / name}: {cause} after {written:,} of {wanted:,} bytes ({_free_space(folder)})"
    return WriteError(error.errno, text)


def describe_disk_error(error: OSError) -> str:
    """What a message says about a disk error: file, cause, bytes free."""
    if isinstance(error, WriteError):
        return str(error.strerror)
    if error.filename is None:
        return str(error.strerror or error)
    return f"{error.filename}: {error.strerror} ({_free_space(Path(os.fsdecode(error.filename)))})"


def _free_space(path: Path) -> str:
    try:
        folder = next(place for place in (path, *path.parents) if place.exists())
        return f"{shutil.disk_usage(folder).free:,} bytes free there"
    except (OSError, StopIteration):
        return "free space unknown"


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power loss."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_checked(folder: Path, name: str, entry: FileEntry, chunk_bytes: int) -> bytes:
    """The bytes of `folder/name` if they are what the manifest says.

    Raises:
        CheckpointError: they are not; names the file and the byte ranges that differ.
    """
    content = _read(folder, name, entry)
    if len(content) == entry.size and hashlib.sha256(content).hexdigest() == entry.sha256:
        return content
    checksums = [
        zlib.crc32(memoryview(content)[start : start + chunk_bytes]) for start in range(0, len(content), chunk_bytes)
    ]
    raise _mismatch(name, entry, len(content), checksums, chunk_bytes)


def check_file(folder: Path, name: str, entry: FileEntry, chunk_bytes: int) -> None:
    """As `read_checked`, in constant memory and without returning the bytes."""
    digest, checksums, size = hashlib.sha256(), [], 0
    try:
        with open(folder / name, "rb") as file:
            while chunk := file.read(chunk_bytes):
                digest.update(chunk)
                checksums.append(zlib.crc32(chunk))
                size += len(chunk)
    except OSError as error:
        raise _unreadable(name, entry, size, error) from error
    if size != entry.size or digest.hexdigest() != entry.sha256:
        raise _mismatch(name, entry, size, checksums, chunk_bytes)


def _read(folder: Path, name: str, entry: FileEntry) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise _unreadable(name, entry, 0, error) from error


def _unreadable(name: str, entry: FileEntry, position: int, error: OSError) -> CheckpointError:
    what = "missing" if isinstance(error, FileNotFoundError) else f"unreadable ({os.strerror(error.errno or 0)})"
    return CheckpointError(f"{name}, {byte_range(position, entry.size)}: {what}")


def _mismatch(name: str, entry: FileEntry, size: int, checksums: list[int], chunk_bytes: int) -> CheckpointError:
    """Names the chunks that differ; of a cut or grown file, the bytes that only one of the two lengths has."""
    expected = [int(entry.chunk_crc32[place : place + 8], 16) for place in range(0, len(entry.chunk_crc32), 8)]
    wrong = [number for number, (left, right) in enumerate(zip(expected, checksums, strict=False)) if left != right]
    ranges = [byte_range(number * chunk_bytes, min((number + 1) * chunk_bytes, entry.size)) for number in wrong]
    if size != entry.size:
        ends = sorted((size, entry.size))
        length = "cut short" if size < entry.size else "too long"
        return CheckpointError(f"{name}, {byte_range(*ends)}: {length}, {size} bytes instead of {entry.size}")
    where = "; ".join(ranges[:4]) + (f"; and {len(ranges) - 4} more ranges" if len(ranges) > 4 else "")
    return CheckpointError(f"{name}, {where or byte_range(0, size)}: not the bytes that were saved")


def byte_range(start: int, stop: int) -> str:
    """Half-open [start, stop) as text, both ends included: `bytes 0-262143`."""
    return f"bytes {start}-{max(start, stop - 1)}"
