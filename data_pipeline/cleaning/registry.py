"""The cleaning rules by name, and how a list of names is applied to one file."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from longspan.data_pipeline.cleaning.binary import drop_binary
from longspan.data_pipeline.cleaning.encoding import repair_encoding
from longspan.data_pipeline.cleaning.generated import drop_generated
from longspan.data_pipeline.cleaning.gutenberg import strip_gutenberg
from longspan.data_pipeline.cleaning.licence_header import strip_licence_header
from longspan.data_pipeline.cleaning.normal_form import compose_unicode
from longspan.errors import UsageError

Function = Callable[[str, bytes], bytes | None]


@dataclass(frozen=True)
class Rule:
    """A cleaning rule.

    Attributes:
        name: in recipes.
        function: pure: name of the file (its suffix tells the language) and its bytes to cleaned bytes, or None to
            drop the file.
        before_decoding: looks at bytes that may not be UTF-8 yet; such rules run first, wherever the recipe lists them.
    """

    name: str
    function: Function
    before_decoding: bool = False


RULES = {
    rule.name: rule
    for rule in (
        Rule("binary", drop_binary, before_decoding=True),
        Rule("encoding", repair_encoding, before_decoding=True),
        Rule("generated", drop_generated),
        Rule("gutenberg", strip_gutenberg),
        Rule("licence_header", strip_licence_header),
        Rule("unicode_nfc", compose_unicode),
    )
}


def rule_problem(name: str) -> str | None:
    """What is wrong with the name of a rule, with the nearest right one; None if there is such a rule."""
    if name in RULES:
        return None
    near = difflib.get_close_matches(name, RULES, n=1, cutoff=0.5)
    advice = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(RULES)}"
    return f"unknown cleaning rule {name} ({advice})"


class Cleaner:
    """A list of rules in the order in which they run: those before decoding first, else as listed."""

    def __init__(self, names: Iterable[str]) -> None:
        """Args: names: of rules.

        Raises:
            UsageError: there is no such rule; names the nearest.
        """
        names = tuple(names)
        problems = [problem for problem in map(rule_problem, names) if problem]
        if problems:
            raise UsageError("; ".join(problems) + ".")
        rules = [RULES[name] for name in names]
        self._before = [rule for rule in rules if rule.before_decoding]
        self._after = [rule for rule in rules if not rule.before_decoding]

    def before_decoding(self, name: str, data: bytes) -> tuple[bytes | None, str]:
        """The rules that look at raw bytes: the cleaned bytes, or None and the name of the rule that dropped them."""
        return _apply(self._before, name, data)

    def after_decoding(self, name: str, text: bytes) -> tuple[bytes | None, str]:
        """The rules that look at UTF-8 text: as `before_decoding`."""
        return _apply(self._after, name, text)


def _apply(rules: list[Rule], name: str, data: bytes) -> tuple[bytes | None, str]:
    for rule in rules:
        cleaned = rule.function(name, data)
        if cleaned is None:
            return None, rule.name
        data = cleaned
    return data, ""
