"""Files that are no text."""

from __future__ import annotations

import codecs

_LOOKED_AT_BYTES = 8192
_SIGNATURES = (
    b"\x7fELF",
    b"MZ\x90\x00",
    b"\xca\xfe\xba\xbe",
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"\xff\xd8\xff",
    b"%PDF-",
    b"%!PS-Adobe-",
    b"PK\x03\x04",
    b"\x1f\x8b",
    b"BZh9",
    b"\xfd7zXZ\x00",
    b"\x28\xb5\x2f\xfd",
    b"!<arch>\n",
    b"SQLite format 3\x00",
)
_UTF16_OR_32 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
# control bytes that text does not hold; tab, line feed, form feed, carriage return and escape it may
_CONTROLS = bytes(byte for byte in range(32) if byte not in b"\t\n\f\r\x1b\x00") + b"\x7f"
_MOST_CONTROLS = 0.02


def looks_like_utf16(data: bytes) -> str | None:
    """`utf-16-le` or `utf-16-be` if nearly every second byte of the beginning is NUL, as in western text, else None."""
    head = data[: _LOOKED_AT_BYTES & ~1]
    pairs = len(head) // 2
    if pairs < 2 or len(data) % 2:
        return None
    even, odd = head[0 : 2 * pairs : 2].count(0), head[1 : 2 * pairs : 2].count(0)
    if odd >= 0.9 * pairs and even == 0:
        return "utf-16-le"
    return "utf-16-be" if even >= 0.9 * pairs and odd == 0 else None


def drop_binary(name: str, data: bytes) -> bytes | None:
    """None for images, archives, object code and the like, told by their first 8 KiB; text comes back as it is.

    Text is allowed to be UTF-16 or UTF-32 (`encoding` repairs that), and to hold a stray NUL.
    """
    head = data[:_LOOKED_AT_BYTES]
    if head.startswith(_SIGNATURES):
        return None
    if head.startswith(_UTF16_OR_32) or looks_like_utf16(data):
        return data
    most = _MOST_CONTROLS * len(head)
    if head.count(0) > max(most, 1) or len(head) - len(head.translate(None, _CONTROLS)) > max(most, 1):
        return None
    return data
