"""Durable writes that hash while they write, and reads that check what they read.

Everything goes through `os` calls on whole buffers: short writes and disk errors are seen where they happen, the
hash is of the bytes that were handed to the disk, and a test can stop the process at any single call.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from longspan.errors import CheckpointError
from longspan.trainer.checkpoint.crash_points import crash_point
from longspan.trainer.checkpoint.places import Place
from longspan.trainer.checkpoint.tensor_file import Pieces

CHUNK_BYTES = 256 * 1024
TEMPORARY_PREFIX = ".tmp-"


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


class UnreadableError(CheckpointError):
    """A file could not be read, which does not say that it is damaged: a store may answer again."""


class WriteError(OSError):
    """A file could not be written; `strerror` names the file, the bytes wanted and the bytes free."""


class Digest:
    """The manifest's entry for a file, from its chunks in order; all but the last are of `CHUNK_BYTES`."""

    def __init__(self) -> None:
        self._digest, self._checksums, self._size = hashlib.sha256(), list[str](), 0

    def add(self, chunk: memoryview) -> None:
        """Take the next chunk."""
        self._digest.update(chunk)
        self._checksums.append(f"{zlib.crc32(chunk):08x}")
        self._size += len(chunk)

    def entry(self) -> FileEntry:
        """What the manifest says about a file of the chunks taken."""
        return FileEntry(size=self._size, sha256=self._digest.hexdigest(), chunk_crc32="".join(self._checksums))


def chunks(pieces: Pieces) -> Iterator[memoryview]:
    """The bytes of all pieces in chunks of `CHUNK_BYTES`, the last one shorter; copied only where pieces meet."""
    rest = bytearray()
    for piece in pieces:
        view = memoryview(piece)
        start = 0
        if rest:
            start = min(len(view), CHUNK_BYTES - len(rest))
            rest += view[:start]
            if len(rest) < CHUNK_BYTES:
                continue
            yield memoryview(rest)
            rest = bytearray()
        whole = start + (len(view) - start) // CHUNK_BYTES * CHUNK_BYTES
        for place in range(start, whole, CHUNK_BYTES):
            yield view[place : place + CHUNK_BYTES]
        rest += view[whole:]
    if rest:
        yield memoryview(rest)


def write_file(folder: Path, name: str, pieces: Pieces) -> FileEntry:
    """Create `folder/name` and sync it to the disk.

    Args:
        folder: existing folder.
        name: relative path below it; its own folder must exist, the file must not.
        pieces: all of the file, in order.

    Returns:
        The manifest's entry for it, hashed from the chunks as they were written.

    Raises:
        WriteError: the operating system refused; what was written stays for the caller to remove.
    """
    digest, wanted, written = Digest(), sum(map(len, pieces)), 0
    try:
        handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            for chunk in chunks(pieces):
                digest.add(chunk)
                done = 0
                while done < len(chunk):
                    count = os.write(handle, chunk[done:])
                    if count == 0:
                        raise OSError(errno.EIO, "the disk took no bytes")
                    done += count
                    written += count
                crash_point("mid-payload")
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise _write_error(error, folder, name, wanted, written) from error
    return digest.entry()


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


def temporary_name(what: str) -> str:
    """A fresh folder name that is removed as an orphan if it survives a crash.

    The random part does not come from a generator whose state is part of the run.
    """
    return f"{TEMPORARY_PREFIX}{what}-{secrets.token_hex(4)}"


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power loss."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_checked(folder: Place, name: str, entry: FileEntry, chunk_bytes: int) -> bytes:
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


def check_file(folder: Place, name: str, entry: FileEntry, chunk_bytes: int) -> None:
    """As `read_checked`, in constant memory and without returning the bytes."""
    digest, checksums, size = hashlib.sha256(), [], 0
    try:
        with (folder / name).open("rb") as file:
            while chunk := file.read(chunk_bytes):
                digest.update(chunk)
                checksums.append(zlib.crc32(chunk))
                size += len(chunk)
    except OSError as error:
        raise _unreadable(name, entry, size, error) from error
    if size != entry.size or digest.hexdigest() != entry.sha256:
        raise _mismatch(name, entry, size, checksums, chunk_bytes)


def _read(folder: Place, name: str, entry: FileEntry) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise _unreadable(name, entry, 0, error) from error


def _unreadable(name: str, entry: FileEntry, position: int, error: OSError) -> CheckpointError:
    cause = os.strerror(error.errno) if error.errno else str(error)
    where = f"{name}, {byte_range(position, entry.size)}"
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{where}: missing")
    return UnreadableError(f"{where}: unreadable ({cause})")


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
