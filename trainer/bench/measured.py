"""What one benchmark returns to the command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longspan.trainer.bench.result import OURS, Ratio, Row


@dataclass(frozen=True)
class Measured:
    """Rows in the order of the table, comparisons of them, and remarks for the reader."""

    rows: list[Row]
    ratios: list[Ratio]
    notes: list[str]


def by_key(rows: list[Row]) -> dict[tuple[str, str], float]:
    """Milliseconds of measured rows by (contender, case)."""
    return {(row.contender, row.case): row.ms for row in rows if row.ms is not None}


def speed_ratios(rows: list[Row], peers: Sequence[str]) -> list[Ratio]:
    """Our speed over each peer's, case by case, where both were measured."""
    ms = by_key(rows)
    return [
        Ratio(f"{case}: speed of longspan / of {peer}", ms[peer, case] / ms[OURS, case])
        for case in dict.fromkeys(row.case for row in rows)
        for peer in peers
        if (peer, case) in ms and (OURS, case) in ms
    ]
