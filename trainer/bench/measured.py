"""What one benchmark returns to the command."""

from __future__ import annotations

from dataclasses import dataclass

from longspan.trainer.bench.result import Ratio, Row


@dataclass(frozen=True)
class Measured:
    """Rows in the order of the table, comparisons of them, and remarks for the reader."""

    rows: list[Row]
    ratios: list[Ratio]
    notes: list[str]


def by_key(rows: list[Row]) -> dict[tuple[str, str], float]:
    """Milliseconds of measured rows by (contender, case)."""
    return {(row.contender, row.case): row.ms for row in rows if row.ms is not None}
