"""The files inside an archive, read in memory one after another: zip, wheel, tar in any compression, Debian package.

Nothing is unpacked to disk, links are not followed, and a path that leaves the archive is left out.
"""

from __future__ import annotations

import gzip
import io
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import zstandard

from longspan.data_pipeline.regular_files import open_regular
from longspan.data_pipeline.sources.compressed import WrongSuffixError, decompressed
from longspan.data_pipeline.sources.tally import Tally
from longspan.errors import DataError

_ZIP_SUFFIXES = (".whl", ".zip")
_ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60
_TAR_BLOCK = 512
_ENCRYPTED = 1
_GZIP_MAGIC = b"\x1f\x8b"
Takes = Callable[[str, int], bool]


@dataclass(frozen=True)
class Selection:
    """Which files of an archive or folder count.

    Attributes:
        include, exclude: patterns on the path; `*` also matches `/`.
        max_file_bytes: longer files are left out and counted.
        tally: what is left out goes there.
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    max_file_bytes: int
    tally: Tally

    def takes(self, path: str, size: int) -> bool:
        """Whether the file `path` of `size` bytes counts."""
        if not matches(path, self.include) or matches(path, self.exclude):
            return False
        return self.takes_size(path, size)

    def takes_size(self, path: str, size: int) -> bool:
        """Whether a file that counts is short enough."""
        if size > self.max_file_bytes:
            self.tally.leave_out(f"files of more than {self.max_file_bytes:,} bytes", path)
            return False
        return True


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the patterns matches the path; `*` also matches `/`."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def archive_files(file: Path, takes: Takes, tally: Tally) -> Iterator[tuple[str, bytes]]:
    """Path and bytes of the regular files for which `takes(path, size)` holds, in the archive's own order.

    Args:
        file: zip or wheel, Debian package, or tar: plain or compressed with gzip, bzip2, xz or zstd.
        takes: asked before a file is read; what it refuses is never in memory.
        tally: counts links and paths that leave the archive.

    Raises:
        OSError, EOFError, WrongSuffixError, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error,
        zstandard.ZstdError, NotImplementedError: the archive is damaged, encrypted, or of another kind.
    """
    with open_regular(file) as stream:
        head = stream.read(8)
        stream.seek(0)
        if head.startswith(_ZIP_MAGIC):
            yield from _zip_files(stream, takes, tally)
        elif file.suffix in _ZIP_SUFFIXES:
            raise WrongSuffixError(f"it ends in {file.suffix} but begins with {head[:4]!r}")
        elif head.startswith(_AR_MAGIC):
            yield from _tar_files(io.BytesIO(_debian_data(stream.read())), "data.tar", takes, tally)
        elif file.suffix == ".deb":
            raise WrongSuffixError("no ar header")
        else:
            yield from _tar_files(stream, file.name, takes, tally)


def read_package(file: Path, selection: Selection) -> dict[str, bytes]:
    """The files of a package that count, by path; members named `*.gz` come decompressed under the name without it.

    Raises:
        DataError: the archive is damaged or of another kind.
    """

    def takes(path: str, size: int) -> bool:
        return selection.takes(path.removesuffix(".gz"), size)

    found: dict[str, bytes] = {}
    try:
        for path, data in archive_files(file, takes, selection.tally):
            if path.endswith(".gz") and data.startswith(_GZIP_MAGIC):
                path, data = path.removesuffix(".gz"), _gunzipped(path, data, selection)
            if data and matches(path, selection.include):
                found[path] = data
    except (
        OSError,
        EOFError,
        WrongSuffixError,
        NotImplementedError,
        tarfile.TarError,
        zipfile.BadZipFile,
        lzma.LZMAError,
        zlib.error,
        zstandard.ZstdError,
    ) as error:
        raise DataError(
            f"{file} is not a readable archive: {error}. Delete it, so that it is fetched again."
        ) from error
    return dict(sorted(found.items()))


def _gunzipped(path: str, data: bytes, selection: Selection) -> bytes:
    """The content; empty if it is too long or broken (packages hold broken files on purpose, as tests)."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            text = stream.read(selection.max_file_bytes + 1)
    except (OSError, EOFError, zlib.error):
        selection.tally.leave_out("damaged gzip files", path)
        return b""
    return text if selection.takes_size(path, len(text)) else b""


def _inside(path: str, tally: Tally) -> str | None:
    """The path without leading `./`; None if it is absolute or climbs out of the archive."""
    pure = PurePosixPath(path.removeprefix("./"))
    if pure.is_absolute() or ".." in pure.parts or "\\" in path:
        tally.leave_out("paths that leave their archive", path)
        return None
    try:
        str(pure).encode("utf-8")
    except UnicodeEncodeError:
        tally.leave_out("files whose names are not UTF-8", ascii(path))
        return None
    return str(pure)


def _zip_files(stream: BinaryIO, takes: Takes, tally: Tally) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(stream) as archive:
        for item in archive.infolist():
            if item.is_dir():
                continue
            path = _inside(item.filename, tally)
            if path is None or not takes(path, item.file_size):
                continue
            if stat.S_ISLNK(item.external_attr >> 16):
                tally.leave_out("links", path)
            else:
                if item.flag_bits & _ENCRYPTED:
                    raise zipfile.BadZipFile(f"{path} in it is encrypted")
                yield path, archive.read(item)


def _tar_files(stream: BinaryIO, name: str, takes: Takes, tally: Tally) -> Iterator[tuple[str, bytes]]:
    with closing(decompressed(stream, name)) as plain, tarfile.open(fileobj=plain, mode="r|") as archive:
        for item in archive:
            is_link = item.issym() or item.islnk()
            path = _inside(item.name, tally) if item.isreg() or is_link else None
            if path is None or not takes(path, item.size):
                continue
            body = None if is_link else archive.extractfile(item)
            if body is None:
                tally.leave_out("links", path)
            else:
                yield path, body.read()
        if plain is stream:  # a compressed file has a checksum at its end, a plain one only this mark
            stream.seek(-_TAR_BLOCK, io.SEEK_END)
            if stream.read(_TAR_BLOCK).strip(b"\x00"):
                raise EOFError("no end mark; it seems to be cut")


def _debian_data(data: bytes) -> bytes:
    """The member `data.tar.*` of a .deb, which is an `ar` archive: 60-byte headers, bodies padded to even lengths."""
    place = len(_AR_MAGIC)
    while place + _AR_HEADER <= len(data):
        header = data[place : place + _AR_HEADER]
        if not header[48:58].strip().isdigit():
            break
        size = int(header[48:58])
        place += _AR_HEADER
        if header[:16].strip().startswith(b"data.tar"):
            return data[place : place + size]
        place += size + size % 2
    raise WrongSuffixError("no data.tar inside")
