"""The LaTeX text of one paper from its files: main file found, inputs resolved, comments stripped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from longspan.data_pipeline.sources.grouping import natural

_DECLARATION = re.compile(r"\\document(?:class|style)\b")
_BEGIN = re.compile(r"\\begin\s*\{document\}")
_END = re.compile(r"\\end\s*\{document\}")
_PLAIN_TEX = re.compile(r"\\(?:bye|magnification|input\s+(?:amstex|harvmac|phyzzx|lanlmac|revtex))\b")
_INPUT = re.compile(
    r"\\(?:input|include|subfile)\s*\{\s*(?P<braced>[^{}\n]+?)\s*\}|\\input\s+(?P<bare>[A-Za-z0-9_./-]+)"
)
# what may hold a percent sign that begins no comment, and the comments themselves
_COMMENT = re.compile(
    r"\\begin\s*\{(?P<verbatim>verbatim\*?|Verbatim|lstlisting|minted|alltt)\}.*?\\end\s*\{(?P=verbatim)\}"
    r"|\\verb\*?(?P<mark>[^\sA-Za-z*])[^\n]*?(?P=mark)"
    r"|\\(?:url|path|href)\s*\{[^{}\n]*\}"
    r"|\\begin\s*\{comment\}.*?\\end\s*\{comment\}[^\n]*\n?(?P<block>)"
    r"|\\."
    r"|(?P<line>(?:(?<=\n)|\A)[ \t]*%[^\n]*(?:\n|\Z))"
    r"|(?P<tail>[ \t]*%[^\n]*)",
    re.DOTALL,
)
_BLANK_LINES = re.compile(r"\n[ \t]*\n(?:[ \t]*\n)+")
_MOST_NESTED = 16
_LONGEST_PAPER = 2**25  # characters
_USUAL_NAMES = ("main", "ms", "paper", "article", "root", "manuscript")
_WITHDRAWN = re.compile(r"%\s*auto-ignore|\bwithdrawn\b", re.IGNORECASE)
_SHORTEST_PAPER = 2000  # characters; a notice of withdrawal is shorter


def strip_comments(source: str) -> str:
    """The source without its comments; `\\%`, verbatim text and addresses keep their percent signs."""

    def kept(found: re.Match[str]) -> str:
        return "" if found["line"] is not None or found["tail"] is not None or found["block"] is not None else found[0]

    return _COMMENT.sub(kept, source)


def main_file(files: Mapping[str, str]) -> str | None:
    """Path of the file that LaTeX would be run on; None if there is none.

    It declares a class and begins the document. Of several the one that no other reads in is taken, then one of a usual
    name, then the longest. Plain TeX has no such marks: there the only file, or the only one that ends a job.

    Args:
        files: LaTeX source by path.
    """
    bare = {path: strip_comments(text) for path, text in files.items()}
    candidates = [path for path, text in bare.items() if _DECLARATION.search(text) and _BEGIN.search(text)]
    candidates = candidates or [path for path, text in bare.items() if _DECLARATION.search(text) or _BEGIN.search(text)]
    candidates = candidates or [path for path, text in bare.items() if _PLAIN_TEX.search(text)]
    if not candidates:
        return next(iter(files)) if len(files) == 1 else None
    read_in = {
        target
        for path, text in bare.items()
        for found in _INPUT.finditer(text)
        if (target := _target(found, path, files)) and target != path
    }
    candidates = [path for path in candidates if path not in read_in] or candidates

    def rank(path: str) -> tuple[bool, int, list[tuple[int, str]]]:
        return PurePosixPath(path).stem.lower() not in _USUAL_NAMES, -len(bare[path]), natural(path)

    return min(candidates, key=rank)


def paper_text(files: Mapping[str, str]) -> tuple[str | None, str]:
    """The whole paper, from its preamble to the end of the document.

    Args:
        files: LaTeX source by path.

    Returns:
        The text and "", or None and why there is none, e.g. `papers that were withdrawn`.
    """
    if any(_WITHDRAWN.search(text[:200]) and len(text) < _SHORTEST_PAPER for text in files.values()):
        return None, "papers that were withdrawn"
    main = main_file(files)
    if main is None:
        return None, "papers without a main file"
    text = _resolved(main, main, files, _Budget(_LONGEST_PAPER), ())
    if text is None:
        return None, "papers whose inputs make them too long"
    if len(text) < _SHORTEST_PAPER and _WITHDRAWN.search(text):
        return None, "papers that were withdrawn"
    end = _END.search(text)
    text = text[: end.end()] if end else text
    return _BLANK_LINES.sub("\n\n", text).strip() + "\n", ""


class _Budget:
    """Characters that a paper may still grow by: files that read each other in twice would grow without end."""

    def __init__(self, characters: int) -> None:
        self.characters = characters


def _resolved(path: str, main: str, files: Mapping[str, str], budget: _Budget, above: tuple[str, ...]) -> str | None:
    """The file with every `\\input` replaced by its file; one that is not there stays as it is. None: too long."""
    budget.characters -= len(files[path])

    def replaced(found: re.Match[str]) -> str:
        target = _target(found, main, files)
        if target is None or target in (*above, path) or len(above) >= _MOST_NESTED or budget.characters < 0:
            return found[0]
        return (_resolved(target, main, files, budget, (*above, path)) or "").strip("\n")

    text = _INPUT.sub(replaced, strip_comments(files[path]))
    return None if budget.characters < 0 else text


def _target(found: re.Match[str], main: str, files: Mapping[str, str]) -> str | None:
    """The file that an `\\input` names, relative to the main file as for LaTeX itself."""
    name = (found["braced"] or found["bare"]).strip().strip('"')
    folder = PurePosixPath(main).parent
    parts: list[str] = []
    for part in (folder / name).parts:
        if part == ".." and parts:
            parts.pop()
        elif part != ".":
            parts.append(part)
    base = "/".join(parts)
    return next((path for path in (base, f"{base}.tex", f"{base}.TEX", f"{base}.ltx") if path in files), None)
