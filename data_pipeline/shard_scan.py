"""What a damaged shard really holds: its bytes, its tar members, and which of them should not be there."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from longspan.data_pipeline.regular_files import open_descriptor

_BLOCK_BYTES = 512
_CHUNK_BYTES = 2**20
_PICKLED = (".pickle", ".pkl", ".pyd", ".pth", ".pt")


@dataclass(frozen=True)
class ShardFile:
    """An open shard, read by offset: a memory map would kill the process when the file shrinks under it."""

    descriptor: int
    size: int

    @classmethod
    def open(cls, file: Path) -> ShardFile:
        """Open `file` for reading; `close` it afterwards."""
        descriptor = open_descriptor(file)
        return cls(descriptor, os.fstat(descriptor).st_size)

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)

    def read(self, start: int, size: int) -> bytes:
        """As many of `size` bytes from `start` on as there are."""
        pieces, missing = [], size
        while missing > 0 and (piece := os.pread(self.descriptor, missing, start + size - missing)):
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def chunks(self, start: int, size: int) -> Iterator[bytes]:
        """The same in pieces of 1 MiB."""
        while size > 0 and (chunk := self.read(start, min(size, _CHUNK_BYTES))):
            yield chunk
            start, size = start + len(chunk), size - len(chunk)

    def sha256(self, *ranges: tuple[int, int]) -> str:
        """Hex sha256 of the ranges (start, size), one after another."""
        digest = hashlib.sha256()
        for start, size in ranges:
            for chunk in self.chunks(start, size):
                digest.update(chunk)
        return digest.hexdigest()


class Found(NamedTuple):
    """A tar member as it stands in the file: name, offset of its content, size."""

    name: str
    offset: int
    size: int


def scan_members(shard: ShardFile) -> list[Found]:
    """The members from the beginning of the file to its end mark or its first unreadable header."""
    found, start = [], 0
    while start + _BLOCK_BYTES <= shard.size:
        try:
            info = tarfile.TarInfo.frombuf(shard.read(start, _BLOCK_BYTES), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            break
        found.append(Found(info.name, start + _BLOCK_BYTES, info.size))
        start += _BLOCK_BYTES + -(-info.size // _BLOCK_BYTES) * _BLOCK_BYTES
    return found


def structure_problems(expected: list[str], found: list[Found]) -> list[str]:
    """Members that are unknown, there twice, missing between others, or out of order.

    Args:
        expected: names in order. Those behind the last one that was found are not missed: the shard is cut there.
    """
    places = {name: place for place, name in enumerate(expected)}
    counts = Counter(member.name for member in found)
    lines, seen, highest = [], set(), -1
    for member in found:
        name = ascii(member.name)[1:-1]
        if member.name not in places:
            pickled = ", pickled data that Longspan never reads" if member.name.endswith(_PICKLED) else ""
            lines.append(f"unknown member {name} at byte {member.offset - _BLOCK_BYTES}{pickled}")
        elif member.name in seen:
            lines.append(f"member {name} is there {counts[member.name]} times, again at byte {member.offset}")
        else:
            seen.add(member.name)
            if places[member.name] < highest:
                before = expected[highest]
                lines.append(f"member {name} at byte {member.offset} stands behind {before}, not before it")
            highest = max(highest, places[member.name])
    lines += [f"member {name} is missing" for name in expected[: highest + 1] if name not in seen]
    return lines
