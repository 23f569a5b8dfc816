"""Compressed files as streams of their content, told by their first bytes and checked against their name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from pathlib import Path
from typing import IO, BinaryIO

import zstandard

from longspan.data_pipeline.regular_files import open_regular

_GZIP, _BZIP2, _XZ, _ZSTD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"
_SIGNATURES = {
    ".gz": _GZIP,
    ".tgz": _GZIP,
    ".bz2": _BZIP2,
    ".xz": _XZ,
    ".txz": _XZ,
    ".zst": _ZSTD,
    ".zstd": _ZSTD,
}
_CHUNK_BYTES = 2**18
_LARGEST_WINDOW = 2**31  # what `zstd --long=31` writes


class WrongSuffixError(Exception):
    """A file does not begin as its name says."""


def open_decompressed(path: Path) -> BinaryIO:
    """The content of a file as a stream that reads forward: decompressed if it begins as a compressed file does.

    Raises:
        WrongSuffixError: the name says compressed, the first bytes do not.
        OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError: while reading, of a damaged file.
    """
    stream = open_regular(path)
    try:
        return decompressed(stream, path.name)
    except BaseException:
        stream.close()
        raise


def decompressed(stream: BinaryIO, name: str) -> BinaryIO:
    """As `open_decompressed`, of a stream that can seek; WrongSuffixError if it does not begin as its name says."""
    head = stream.read(8)
    stream.seek(0)
    suffix = next((suffix for suffix in _SIGNATURES if name.lower().endswith(suffix)), None)
    if suffix is not None and not head.startswith(_SIGNATURES[suffix]):
        raise WrongSuffixError(f"it ends in {suffix} but begins with {head[:4]!r}" if head else "it is empty")
    if head.startswith(_GZIP):
        return _buffered(gzip.GzipFile(fileobj=stream))
    if head.startswith(_BZIP2):
        return _buffered(bz2.BZ2File(stream))
    if head.startswith(_XZ):
        return _buffered(lzma.LZMAFile(stream))
    if head.startswith(_ZSTD):
        return _buffered(_ZstdStream(stream))
    return stream


def read_limited(stream: IO[bytes], most_bytes: int) -> bytes | None:
    """All of the stream, None if it is longer than `most_bytes`; reads no more than one byte beyond."""
    data = stream.read(most_bytes + 1)
    return data if len(data) <= most_bytes else None


def _buffered(stream: io.BufferedIOBase | io.RawIOBase) -> BinaryIO:
    return io.BufferedReader(stream, _CHUNK_BYTES)  # type: ignore[arg-type]


class _ZstdStream(io.RawIOBase):
    """Frames of zstd one after another. The library's own stream takes a cut file for a whole one."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._waiting = memoryview(b"")
        self._unused = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        while not self._waiting:
            data = self._unused or self._stream.read(_CHUNK_BYTES)
            self._unused = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._waiting = memoryview(self._decompress(data))
        count = min(len(buffer), len(self._waiting))
        buffer[:count] = self._waiting[:count]
        self._waiting = self._waiting[count:]
        return count

    def _decompress(self, data: bytes) -> bytes:
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
        text = self._frame.decompress(data)
        if self._frame.eof:
            self._unused = self._frame.unused_data
            self._frame = None
        return text
