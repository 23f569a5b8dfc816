"""How a document lies in a shard: a WebDataset sample of two or three tar members, byte for byte determined.

`KEY.json` holds id, source and licence. A byte corpus has the UTF-8 text beside it in `KEY.txt`; any other corpus has
the token ids with bos and eos in `KEY.ids` (little-endian, dtype as in the manifest) and the bytes of text that each
of them stands for in `KEY.len` (uint16, little-endian). Members stand in order of their names, as WebDataset writes
them; the headers are the standard library's and the same bytes as WebDataset's.
"""

from __future__ import annotations

import json
import re
import tarfile
from typing import NamedTuple

_BLOCK_BYTES = 512
_RECORD_BYTES = 10_240  # an archive ends with two empty blocks and is filled up to a multiple of this
_KEY_CHARACTERS = 48


class Member(NamedTuple):
    """One file in a sample.

    Attributes:
        name: `KEY.EXTENSION`. start: offset of its header in the shard. size: of its content, in bytes.
        header: the 512 bytes before the content.
        content: if it follows from the manifest alone, else None.
    """

    name: str
    start: int
    size: int
    header: bytes
    content: bytes | None

    @property
    def extension(self) -> str:
        """`json`, `txt`, `ids` or `len`."""
        return self.name.rsplit(".", 1)[1]

    @property
    def offset(self) -> int:
        """Where its content begins in the shard."""
        return self.start + _BLOCK_BYTES

    @property
    def end(self) -> int:
        """Where the next member begins: after the content, filled up to whole blocks."""
        return self.offset + -(-self.size // _BLOCK_BYTES) * _BLOCK_BYTES


def sample_members(
    start: int, number: int, document_id: str, source: str, licence: str, sizes: dict[str, int]
) -> list[Member]:
    """The members of a document's sample, in order.

    Args:
        start: offset of the sample in its shard. number: of the document among those of the shard, from 0.
        document_id, source, licence: what its metadata say.
        sizes: bytes of each member but the metadata, by extension.
    """
    metadata = json.dumps({"id": document_id, "source": source, "licence": licence}, sort_keys=True).encode()
    # a key without dots (WebDataset cuts names at the first one), short enough for a tar header
    key = f"{number:08d}-{re.sub(r'[^A-Za-z0-9_]+', '-', document_id)[:_KEY_CHARACTERS]}"
    members: list[Member] = []
    for extension, size in sorted({**sizes, "json": len(metadata)}.items()):
        name = f"{key}.{extension}"
        content = metadata if extension == "json" else None
        members.append(Member(name, start, size, _header(name, size), content))
        start = members[-1].end
    return members


def archive_size(samples_end: int) -> int:
    """Bytes of an archive whose last sample ends at `samples_end`; all from there on are zero."""
    return -(-(samples_end + 2 * _BLOCK_BYTES) // _RECORD_BYTES) * _RECORD_BYTES


def _header(name: str, size: int) -> bytes:
    # fixed time, owner and mode: nothing of the machine or the moment gets into a shard
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode, info.uname, info.gname = size, 0, 0o444, "longspan", "longspan"
    return info.tobuf(tarfile.USTAR_FORMAT)
