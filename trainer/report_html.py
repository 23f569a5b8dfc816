"""Pieces of HTML for the report: escaped text, tables, sections, numbers as people read them."""

from __future__ import annotations

import re
from html import escape

from longspan.trainer.report_style import CSS

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_UNPRINTABLE = re.compile(r"[\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def text(value: object) -> str:
    """A value as escaped text; control characters, which a page may not hold, show as their pictures."""
    shown = _CONTROL.sub(lambda match: chr(0x2400 + ord(match[0])), str(value))
    return escape(_UNPRINTABLE.sub("\ufffd", shown), quote=True)


def document(title: str, body: str) -> str:
    """A whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{text(title)} - Longspan report</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(heading: str, *content: str, about: str = "") -> str:
    """A card with a heading and an explanation; content is HTML."""
    lead = f'<p class="about">{text(about)}</p>' if about else ""
    return f"<section>\n<h2>{text(heading)}</h2>\n{lead}\n{''.join(content)}\n</section>"


def figure(svg: str, caption: str = "") -> str:
    """A chart with a caption below."""
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f"<figure>{svg}{below}</figure>"


def empty(what: str) -> str:
    """Says what is not there yet."""
    return f'<p class="empty">{text(what)}</p>'


def table(head: list[str], rows: list[list[str]], numeric: tuple[int, ...] = ()) -> str:
    """A table; cells are HTML, columns in `numeric` stand right."""

    def cell(tag: str, column: int, content: str) -> str:
        return f"<{tag} class='number'>{content}</{tag}>" if column in numeric else f"<{tag}>{content}</{tag}>"

    top = "".join(cell("th", column, text(name)) for column, name in enumerate(head))
    body = "".join(
        "<tr>" + "".join(cell("td", column, content) for column, content in enumerate(row)) + "</tr>" for row in rows
    )
    return f"<div class='scroll'><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def details(summary: str, content: str) -> str:
    """Content that unfolds."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def digest(value: object) -> str:
    """A hash in full, in small letters of one width."""
    return f'<span class="hash">{text(value)}</span>'


def number(value: float | None, decimals: int = 3) -> str:
    """A number, or a dash for none."""
    return "–" if value is None else f"{value:,.{decimals}f}"


def signed(value: float | None, decimals: int = 4) -> str:
    """A difference with its sign, or a dash for none; one that the decimals would round to nothing as -3e-06."""
    if value is None:
        return "–"
    lost = value != 0 and abs(value) < 0.5 * 10**-decimals
    return f"{value:+.0e}" if lost else f"{value + 0.0:+.{decimals}f}"


def short(value: float | None) -> str:
    """A large number with a unit: 12.3k, 4.56M, 7.8G."""
    if value is None:
        return "–"
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.4g}"


def size(count: float) -> str:
    """Bytes with a binary unit."""
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """A time span: 48 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if seconds < 120:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes:.0f} min"
    if hours < 48:
        return f"{int(hours)} h {int(minutes % 60)} min"
    return f"{int(days)} d {int(hours % 24)} h"
