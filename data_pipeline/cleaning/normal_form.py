"""Unicode normal form C."""

from __future__ import annotations

import unicodedata


def compose_unicode(name: str, text: bytes) -> bytes | None:
    """Composed characters (NFC) for decomposed ones: `e` and a combining accent become one character.

    Never a default: it changes what the bytes of a text are.
    """
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", text.decode("utf-8")).encode("utf-8")
