"""From a file of a package to plain text: HTML, JSON with a `text` field, R data."""

from __future__ import annotations

import html
import json
import re
import struct
import zlib

_DROPPED = re.compile(r"<(script|style|head)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_BLOCK_ENDS = re.compile(r"<br\s*/?>|</(p|div|h[1-6]|li|ul|ol|dl|dt|dd|tr|table|pre|blockquote)\s*>", re.IGNORECASE)
_TAG = re.compile(r"<[^>]*>")
_BLANK_LINES = re.compile(r"\n\s*\n\s*")

_R_STRINGS = b"\x00\x00\x00\x10"  # type 16 without attributes: a character vector
_R_STRING_TYPE = 9
_R_LENGTH_BYTES = 4


def html_text(data: bytes) -> str:
    """The text of an HTML page: no scripts, styles and head, ends of blocks as line ends, entities resolved."""
    source = _DROPPED.sub(" ", data.decode("utf-8"))
    text = html.unescape(_TAG.sub("", _BLOCK_ENDS.sub("\n", source)))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip()


def json_text(data: bytes) -> str:
    """The field `text` of a JSON object.

    Raises:
        ValueError: there is none.
    """
    text = json.loads(data).get("text")
    if not isinstance(text, str):
        raise ValueError("no field `text`")
    return text


def r_texts(data: bytes) -> list[str]:
    """Every character vector of an R lazy-load database (`Rdata.rdb`), its elements joined by line ends.

    The file is a run of records [4 bytes][zlib stream of R's XDR serialisation].
    """
    texts = []
    while len(data) > _R_LENGTH_BYTES:
        stream = zlib.decompressobj()
        texts += _character_vectors(stream.decompress(data[_R_LENGTH_BYTES:]))
        data = stream.unused_data
    return texts


def _character_vectors(record: bytes) -> list[str]:
    found, place = [], 0
    while (place := record.find(_R_STRINGS, place)) >= 0:
        strings, end = _strings(record, place + len(_R_STRINGS))
        if strings:
            found.append("\n".join(strings))
        place = max(end, place + 1)
    return found


def _strings(record: bytes, place: int) -> tuple[list[str], int]:
    """Elements of the vector whose count is at `place`, and where it ends; none if this is no vector of strings."""
    start = place
    if place + 4 > len(record):
        return [], start
    (count,) = struct.unpack_from(">i", record, place)
    place += 4
    strings = []
    for _ in range(max(count, 0)):
        if place + 8 > len(record):
            return [], start
        flags, length = struct.unpack_from(">Ii", record, place)
        if flags & 0xFF != _R_STRING_TYPE or place + 8 + length > len(record):
            return [], start
        place += 8
        strings.append(record[place : place + max(length, 0)].decode("utf-8", errors="replace"))
        place += max(length, 0)
    return strings, place
