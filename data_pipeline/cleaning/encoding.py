"""Text in another encoding than UTF-8, told apart and repaired where that is safe."""

from __future__ import annotations

import codecs
import re

from longspan.data_pipeline.cleaning.binary import looks_like_utf16

# longest first: the mark of UTF-32 begins with that of UTF-16
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# the bytes that cp1252 leaves undefined stand for the control characters of Latin-1
_CP1252 = "".join(
    bytes([byte]).decode("cp1252") if byte not in b"\x81\x8d\x8f\x90\x9d" else chr(byte) for byte in range(256)
)
# the way back, for text that was read as cp1252 or as Latin-1, whose control characters stand where cp1252 has letters
_CP1252_BYTES = {byte: byte for byte in range(256)} | {ord(character): byte for byte, character in enumerate(_CP1252)}
_ASCII = bytes(range(0x80))
_LATIN1_TO_CP1252 = dict(enumerate(map(ord, _CP1252)))
# what the first byte of a UTF-8 sequence and one that continues it look like when read so
_TWICE_ENCODED = re.compile(
    f"[{re.escape(''.join(_CP1252[0xC2:0xF5]))}][{re.escape(''.join(_CP1252[0x80:0xC0]))}\x80-\x9f]",
)
# two of the sequences that western text has most, or many of any: a word such as CAFÉ before an ellipsis is one, too
_WESTERN = "ÂÃâ"
_FEWEST_WESTERN, _FEWEST_OF_ANY = 2, 16
_NOT_TWICE = "à\xa0"  # French before a guillemet; as UTF-8 it would begin a script that nobody writes
_FALLBACK = "longspan-cp1252"


def _as_cp1252(error: UnicodeError) -> tuple[str, int]:
    """Decode the bytes that are no UTF-8 one by one, the rest stays UTF-8."""
    assert isinstance(error, UnicodeDecodeError)
    return "".join(_CP1252[byte] for byte in error.object[error.start : error.end]), error.end


codecs.register_error(_FALLBACK, _as_cp1252)


def repair_encoding(name: str, data: bytes) -> bytes | None:
    """UTF-8 without byte order mark, NUL and carriage returns, whatever the text came in.

    UTF-16 and UTF-32 are told by their mark, UTF-16 also by its NULs. Bytes that are no UTF-8 are read as cp1252:
    single ones if the text is UTF-8 otherwise, all if most of what is not ASCII is wrong. Text that was encoded twice
    is decoded once more only if the whole of it survives that. Unicode is not normalised.
    """
    text = _untwice(_decoded(data))
    text = text.replace("\x00", "")
    if "\r" in text:
        # carriage returns alone are line ends only where there are no others
        text = text.replace("\r\n", "\n") if "\n" in text else text.replace("\r", "\n")
    return text.encode("utf-8", errors="replace")  # half of a surrogate pair, from UTF-16, becomes a question mark


def _decoded(data: bytes) -> str:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return _decoded_as(data[len(mark) :], encoding)
    encoding = looks_like_utf16(data) or "utf-8"
    return _decoded_as(data, encoding)


def _decoded_as(data: bytes, encoding: str) -> str:
    if encoding != "utf-8":
        return data.decode(encoding, errors="replace")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        mixed = data.decode("utf-8", errors=_FALLBACK)
        high = len(data.translate(None, _ASCII))
        valid = len(data.decode("utf-8", errors="ignore").encode("utf-8")) - (len(data) - high)
        # bytes in valid sequences against bytes outside of any
        return mixed if valid > high - valid else data.decode("latin-1").translate(_LATIN1_TO_CP1252)


def _untwice(text: str) -> str:
    """The text before its second encoding, if it had one: all of it must decode, and enough sequences must show it."""
    if text.isascii() or _NOT_TWICE in text:
        return text
    found = _TWICE_ENCODED.findall(text)
    if sum(pair[0] in _WESTERN for pair in found) < _FEWEST_WESTERN and len(found) < _FEWEST_OF_ANY:
        return text
    try:
        return bytes(_CP1252_BYTES[ord(character)] for character in text).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return text
