"""The result as a table in the terminal and as Markdown."""

from __future__ import annotations

from pathlib import Path

from longspan.trainer.bench import table
from longspan.trainer.bench.data.result import Result, Row


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _seconds(row: Row) -> str:
    if row.seconds is None:
        return row.status
    return f"{row.seconds:.2f} ({row.low_seconds:.2f} to {row.high_seconds:.2f})"


def _bar(row: Row) -> str:
    return "" if row.is_met is None else f"{row.bar}: {'met' if row.is_met else 'MISSED'}"


COLUMNS: tuple[table.Column[Row], ...] = (
    ("contender", lambda row: row.contender),
    ("case", lambda row: row.case),
    ("tokens/s", lambda row: _number(row.tokens_per_second)),
    ("MB/s", lambda row: _number(row.megabytes_per_second, 1)),
    ("seconds", _seconds),
    ("CPU s", lambda row: _number(row.cpu_seconds, 2)),
    ("peak GiB", lambda row: _number(row.peak_gib, 2)),
    ("bar", _bar),
    ("note", lambda row: row.note),
)


def print_result(result: Result) -> None:
    """The table, comparisons and circumstances, to standard output."""
    table.print_table(result, *table.cells(result.rows, COLUMNS), summary(result))


def append_report(result: Result, path: Path) -> None:
    """Add a section about `result` to a Markdown page; a new page gets a title."""
    table.append_section(path, result, *table.cells(result.rows, COLUMNS), summary(result))


def summary(result: Result) -> list[str]:
    """Lines under the table: bars that were missed, comparisons, remarks, load, device and versions."""
    missed = [f"{row.case} ({row.bar})" for row in result.rows if row.is_met is False]
    before, after = result.load
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items() if version)
    return [
        *([f"Bars missed: {'; '.join(missed)}."] if missed else []),
        *(f"{ratio.what}: {ratio.value:.2f}" for ratio in result.ratios),
        *result.notes,
        "Seconds are of a pass: median (fastest to slowest). CPU seconds are of all threads of the process.",
        f"Load of the machine in the minute before: {before:.1f}, and in the last minute: {after:.1f}.",
        f"{result.device['cores']} cores of {result.device['name']}; {versions}.",
    ]
