"""The files inside a package archive, read in memory: wheels, npm and source tarballs, Debian packages."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from pathlib import Path

from longspan.errors import DataError

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60
_GZIP_MAGIC = b"\x1f\x8b"


def read_archive(file: Path) -> dict[str, bytes]:
    """Regular files by path, in order of the path; members named `*.gz` come decompressed under the name without it.

    Args:
        file: a .whl or .zip, a .tgz or .tar.gz, or a .deb.

    Raises:
        DataError: the archive is damaged or of another kind.
    """
    try:
        if file.suffix in (".whl", ".zip"):
            members = _zip_members(file)
        elif file.suffix == ".deb":
            members = _tar_members(_debian_data(file.read_bytes()))
        else:
            members = _tar_members(file.read_bytes())
        return dict(sorted(_gunzipped(name, data) for name, data in members))
    except (OSError, EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"{file} is not a readable archive: {error}. Delete it, so that it is fetched again."
        ) from error


def _zip_members(file: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(file) as archive:
        return [(item.filename, archive.read(item)) for item in archive.infolist() if not item.is_dir()]


def _tar_members(data: bytes) -> list[tuple[str, bytes]]:
    members = []
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:*") as archive:
        for item in archive:
            stream = archive.extractfile(item) if item.isreg() else None
            if stream is not None:
                members.append((item.name.removeprefix("./"), stream.read()))
    return members


def _debian_data(data: bytes) -> bytes:
    """The member `data.tar.*` of a .deb, which is an `ar` archive: 60-byte headers, bodies padded to even lengths."""
    if not data.startswith(_AR_MAGIC):
        raise ValueError("no ar header")
    place = len(_AR_MAGIC)
    while place + _AR_HEADER <= len(data):
        header = data[place : place + _AR_HEADER]
        size = int(header[48:58])
        place += _AR_HEADER
        if header[:16].strip().startswith(b"data.tar"):
            return data[place : place + size]
        place += size + size % 2
    raise ValueError("no data.tar inside")


def _gunzipped(name: str, data: bytes) -> tuple[str, bytes]:
    if not name.endswith(".gz") or not data.startswith(_GZIP_MAGIC):  # packages hold broken files on purpose, as tests
        return name, data
    return name.removesuffix(".gz"), gzip.decompress(data)
