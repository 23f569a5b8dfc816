"""Where a long text is cut before it is encoded.

Tokenizers take time or memory that grows faster than the text, and some fail outright on one huge line. So every text
is cut into chunks of limited length, each is encoded by itself, and the tokens are joined. Which places are searched
for, in which order, is part of what a tokenizer is: the rule's name goes into its digest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TAIL_CHARS = 512  # searched before the whole chunk is: in ordinary text it holds a place nearly always

_PUNCTUATION = "!-/:-@\\[-`{-~"
_MORE_PUNCTUATION = "‐-‧、-〃〈-】！-／：-＠"  # ranges that hold punctuation alone
_SPACE = " \\t\\n\\r"


@dataclass(frozen=True)
class CutRule:
    """How texts are cut.

    Attributes:
        name: goes into digests; changes whenever the places change.
        most_chars: characters of a chunk at most.
        places: patterns, each tried in turn over the whole chunk; the cut is after the last match of the first that
            matches. Where none does, the chunk is cut after `most_chars` characters.
    """

    name: str
    most_chars: int
    places: tuple[re.Pattern[str], ...]


# For GPT-2's pattern. Each place lies between two of its pieces whatever stands around it: no piece holds a letter or
# digit followed by anything that is not of the same class, or a visible character followed by white space; and a text
# that ends in a visible character, or starts after one, is split as it is inside a longer one (the pattern looks ahead
# from white space only, and never back). So the ids are those of the whole text unless `most_chars` characters in a row
# have no such place: letters, punctuation or white space alone.
BYTE_LEVEL = CutRule(
    "byte-level-1",
    65_536,
    (
        re.compile(
            f"[^\\W_](?=[{_SPACE}{_PUNCTUATION}{_MORE_PUNCTUATION}])|[A-Za-z](?=[0-9])|[0-9](?=[A-Za-z])"
            f"|[!-~{_MORE_PUNCTUATION}](?=[{_SPACE}])"
        ),
    ),
)
# For all others: before a single space between visible ASCII characters; if there is none, before a line end, or after
# white space.
# 16,383 characters are at most 65,532 bytes, so that a token that stands for a whole chunk fits into uint16.
WORDS = CutRule(
    "words-1",
    16_383,
    (re.compile(r"[!-~](?= [!-~])"), re.compile(r"[^\s](?=\r?\n)"), re.compile(r"\s(?!\s)")),
)


def cut(text: str, rule: CutRule) -> list[str]:
    """`text` in chunks of 1 to `rule.most_chars` characters; none for an empty text."""
    chunks, start = [], 0
    while len(text) - start > rule.most_chars:
        stop = _place(text, start, start + rule.most_chars, rule.places)
        chunks.append(text[start:stop])
        start = stop
    if start < len(text):
        chunks.append(text[start:])
    return chunks


def _place(text: str, start: int, limit: int, places: tuple[re.Pattern[str], ...]) -> int:
    for place in places:
        for low in (max(start, limit - _TAIL_CHARS), start):
            # two characters more: what a pattern looks ahead at
            ends = [found.end() for found in place.finditer(text, low, limit + 2) if found.end() <= limit]
            if ends:
                return ends[-1]
    return limit
