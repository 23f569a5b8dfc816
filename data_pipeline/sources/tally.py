"""What a source left out, by reason: counted while its documents stream, told when they have been read."""

from __future__ import annotations

from longspan.errors import UsageError


class Tally:
    """Counts per reason with one example each, and free remarks; complete once the documents have been consumed."""

    def __init__(self, source: str) -> None:
        """Args: source: name of the source, which every note begins with."""
        self.source = source
        self._remarks: list[str] = []
        self._left_out: dict[str, tuple[int, str]] = {}

    def leave_out(self, what: str, name: str, count: int = 1) -> None:
        """Count `count` more of `what`, e.g. `empty files`; the first `name` is kept as the example."""
        number, example = self._left_out.get(what, (0, name))
        self._left_out[what] = (number + count, example)

    def remark(self, text: str) -> None:
        """Add a note that is not a count."""
        self._remarks.append(f"source {self.source}: {text}")

    @property
    def left_out(self) -> dict[str, tuple[int, str]]:
        """Count and example of each reason so far, in order of first appearance."""
        return dict(self._left_out)

    @property
    def notes(self) -> tuple[str, ...]:
        """One line per remark and per reason, in order of first appearance."""
        counts = (
            f"source {self.source}: left out {number:,} {what}, e.g. {example}"
            for what, (number, example) in self._left_out.items()
        )
        return (*self._remarks, *counts)

    def nothing_left(self, remedy: str) -> UsageError:
        """The error for a source without any document; says what was left out and why."""
        reasons = "; ".join(f"{number:,} {what}, e.g. {name}" for what, (number, name) in self._left_out.items())
        seen = f"left out: {reasons}" if reasons else "there was nothing in it"
        return UsageError(f"source {self.source}: no document is left; {seen}. {remedy}")
