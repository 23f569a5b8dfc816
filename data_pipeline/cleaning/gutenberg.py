"""What Project Gutenberg writes around a book: header, small print, licence."""

from __future__ import annotations

import re

_ANY = re.IGNORECASE | re.MULTILINE
# `*** START OF THIS PROJECT GUTENBERG EBOOK TITLE ***`, the title perhaps over several lines
_START = re.compile(
    rb"^[ \t]*\*{3}[ \t]*START OF (?:THE|THIS) PROJECT GUTENBERG (?:EBOOK|E-?TEXT)[^*]{0,400}\*{3}[^\n]*\n", _ANY
)
# until about 2003 the header ended with the small print
_SMALL_PRINT = re.compile(
    rb"^[ \t]*\*\s?END\s?\*\s?THE SMALL PRINT![^\n]*\n|^[ \t]*\*{3}[ \t]*END[ \t]*THE SMALL PRINT[^\n]*\n", _ANY
)
_END = re.compile(
    rb"^[ \t]*\*{3}[ \t]*END OF (?:THE|THIS) PROJECT GUTENBERG (?:EBOOK|E-?TEXT)"
    rb"|^[ \t]*(?:\*{3}[ \t]*)?END OF (?:THE |THIS )?PROJECT GUTENBERG(?:'S|\xe2\x80\x99S)? ?[^\n]*",
    _ANY,
)
_CREDIT = re.compile(
    rb"\s*(?:\[?(?:Produced by|E-?text prepared by|This e-?(?:text|book) was (?:produced|prepared|typed)|"
    rb"Transcribed (?:from|by)|Scanned (?:and|by)|HTML version by|\*{3} ?This file should be named)[^\n]*"
    rb"(?:\n[^\n]*\S[^\n]*)*\n*)+",
    re.IGNORECASE,
)
_FRONT_SHARE = 0.5  # a header that ends later than this is no header; the text only speaks of one


def strip_gutenberg(name: str, text: bytes) -> bytes | None:
    """The book alone: from behind the start marker and the producers' credits to the end marker.

    Text without markers comes back as it is; None if nothing lies between them.
    """
    start = next(
        (
            found.end()
            for pattern in (_START, _SMALL_PRINT)
            if (found := pattern.search(text)) and found.start() <= max(_FRONT_SHARE * len(text), 20_000)
        ),
        0,
    )
    end = next((found.start() for found in _END.finditer(text, start)), len(text))
    if start == 0 and end == len(text):
        return text
    body = text[start:end]
    credit = _CREDIT.match(body) if start else None
    body = (body[credit.end() :] if credit else body).strip(b"\r\n")
    return body.rstrip() + b"\n" if body.strip() else None
