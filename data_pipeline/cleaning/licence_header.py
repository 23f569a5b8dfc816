"""The licence that stands at the top of so many files of code."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

_SLASHES = """
    .c .h .cc .cpp .cxx .hh .hpp .hxx .cs .java .js .jsx .mjs .ts .tsx .go .rs .swift .kt .kts .scala .groovy .dart
    .m .mm .cu .cuh .proto .php .v .sv .zig .css .scss .less .gradle .glsl .d
"""
_HASHES = """
    .py .pyi .pyx .pxd .sh .bash .zsh .rb .pl .pm .r .jl .yaml .yml .toml .cmake .mk .tcl .nix .ex .exs .cr .nim .bzl
    .ps1 .conf .cfg .awk
"""
_LINE_SIGNS = {
    **dict.fromkeys(_SLASHES.split(), b"//"),
    **dict.fromkeys(_HASHES.split(), b"#"),
    **dict.fromkeys((".lua", ".sql", ".hs", ".lhs", ".elm", ".adb", ".ads", ".vhd", ".vhdl"), b"--"),
    **dict.fromkeys((".lisp", ".lsp", ".el", ".clj", ".cljs", ".scm", ".rkt", ".asm", ".ini"), b";"),
    **dict.fromkeys((".tex", ".sty", ".cls", ".bib", ".erl", ".hrl"), b"%"),
    **dict.fromkeys((".f90", ".f95", ".f03"), b"!"),
    ".vim": b'"',
}
_BLOCK_SIGNS = {
    **dict.fromkeys((*_SLASHES.split(), ".sql"), (b"/*", b"*/")),
    **dict.fromkeys((".html", ".htm", ".xml", ".svg", ".md", ".vue", ".xsl"), (b"<!--", b"-->")),
    **dict.fromkeys((".ml", ".mli", ".pas", ".thy"), (b"(*", b"*)")),
    **dict.fromkeys((".hs", ".lhs", ".elm"), (b"{-", b"-}")),
}
_HASH_NAMES = {"makefile", "dockerfile", "cmakelists.txt", "rakefile", "gemfile"}
# lines that must stay first: interpreter, encoding, document type, opening tag
_PREAMBLE = re.compile(
    rb"(?:#![^\n]*\n|#[^\n]*coding[:=][^\n]*\n|<\?[^\n]*\n|<!DOCTYPE[^\n]*\n|[ \t]*\n)*", re.IGNORECASE
)
_LICENCE = re.compile(
    rb"copyright|\(c\)\s*\d{4}|\xc2\xa9|licen[cs]e|spdx-|all rights reserved|permission is hereby granted|"
    rb"redistribution and use|without warrant|provided [\"'`]*as is|distributed in the hope|public domain|"
    rb"free software|notice(?:s)? (?:shall|must|and this)|mozilla\.org/MPL|apache\.org/licenses|in no event shall",
    re.IGNORECASE,
)
_MOST_COMMENTS = 8  # separate comments that may form one header


def strip_licence_header(name: str, text: bytes) -> bytes | None:
    """The text without the paragraphs of its leading comments that state a licence; other comments stay.

    Comment signs follow the suffix of `name`; a file of another kind comes back as it is.
    """
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    line_sign = _LINE_SIGNS.get(suffix) or (b"#" if path.name.lower() in _HASH_NAMES else None)
    block_signs = _BLOCK_SIGNS.get(suffix)
    preamble = _PREAMBLE.match(text)
    place = preamble.end() if preamble else 0
    kept = []
    for _ in range(_MOST_COMMENTS):
        comment = _comment_at(text, place, line_sign, block_signs)
        if comment is None or not _LICENCE.search(comment):
            break
        place += len(comment)
        kept.append(_without_licence(comment, line_sign, block_signs))
        gap = len(text) - place - len(text[place:].lstrip(b"\n")) if text[place : place + 1] == b"\n" else 0
        place += gap
    if not kept:
        return text
    start = preamble.end() if preamble else 0
    rest = [part for part in kept if part.strip()]
    return text[:start] + b"\n".join([*rest, text[place:]])


def _comment_at(
    text: bytes, place: int, line_sign: bytes | None, block_signs: tuple[bytes, bytes] | None
) -> bytes | None:
    """The whole comment that begins at `place`, with its last line end; None if code or nothing begins there."""
    if block_signs and text.startswith(block_signs[0], place):
        end = text.find(block_signs[1], place + len(block_signs[0]))
        if end < 0:
            return None
        end += len(block_signs[1])
        line_end = text.find(b"\n", end)
        line_end = len(text) if line_end < 0 else line_end
        if text[end:line_end].strip():
            return None  # code follows on the same line
        return text[place : line_end + 1]
    if not line_sign or not text.startswith(line_sign, place):
        return None
    end = place
    while text.startswith(line_sign, end):
        line_end = text.find(b"\n", end)
        end = len(text) if line_end < 0 else line_end + 1
    return text[place:end]


def _without_licence(comment: bytes, line_sign: bytes | None, block_signs: tuple[bytes, bytes] | None) -> bytes:
    """The comment without its lines from the first to the last paragraph that speaks of the licence."""
    lines = comment.splitlines(keepends=True)
    words = [_words(line, line_sign, block_signs) for line in lines]
    paragraphs: list[list[int]] = [[]]
    for number, content in enumerate(words):
        if content:
            paragraphs[-1].append(number)
        elif paragraphs[-1]:
            paragraphs.append([])
    paragraphs = [paragraph for paragraph in paragraphs if paragraph]
    about = [i for i, paragraph in enumerate(paragraphs) if _LICENCE.search(b" ".join(words[n] for n in paragraph))]
    others = paragraphs[: about[0]] + paragraphs[about[-1] + 1 :] if about else paragraphs
    if not others:
        return b""
    if not about:
        return comment
    first, last = paragraphs[about[0]][0], paragraphs[about[-1]][-1]
    before, after = lines[:first], lines[last + 1 :]
    is_block = block_signs is not None and comment.startswith(block_signs[0])
    if block_signs and is_block:
        before = before or [block_signs[0] + b"\n"]
        after = after or [block_signs[1] + b"\n"]
    if not any(_words(line, line_sign, block_signs) for line in before):
        while len(after) > is_block and not _words(after[0], line_sign, block_signs):
            after = after[1:]  # the empty comment line between the licence and the rest
    return b"".join([*before, *after])


def _words(line: bytes, line_sign: bytes | None, block_signs: tuple[bytes, bytes] | None) -> bytes:
    """A comment line without its signs and frames of stars or dashes."""
    line = line.strip()
    for sign in (*(block_signs or ()), line_sign):
        if sign:
            line = line.removeprefix(sign).removesuffix(sign).strip()
    return line.strip(b"*#/-=;%!| \t~")
