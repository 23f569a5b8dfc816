"""Results as a table in the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.table import Table

from longspan.trainer.bench.result import Result, Row

_WIDTH = 200
_Row = TypeVar("_Row")
Column = tuple[str, Callable[[_Row], str]]


class Run(Protocol):
    """What every result says of its run."""

    @property
    def benchmark(self) -> str:
        """Its name."""
        ...

    @property
    def command(self) -> str:
        """That asked for it."""
        ...

    @property
    def date(self) -> str:
        """ISO 8601."""
        ...

    @property
    def device(self) -> dict[str, Any]:
        """With its `name`."""
        ...


def _milliseconds(row: Row) -> str:
    if row.ms is None or row.low_ms is None or row.high_ms is None:
        return row.status
    digits = 3 if row.ms < 10 else 1
    return f"{row.ms:.{digits}f} ± {(row.high_ms - row.low_ms) / 2:.{digits}f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _times_floor(row: Row) -> str:
    return "" if not row.ms or not row.floor_ms else f"{row.ms / row.floor_ms:.1f}"


# a column is left out when no row has a value for it
COLUMNS: tuple[Column[Row], ...] = (
    ("contender", lambda row: row.contender),
    ("case", lambda row: row.case),
    ("ms", _milliseconds),
    ("tokens/s", lambda row: _number(row.tokens_per_second, 0)),
    ("of matrix rate", lambda row: _share(row.matrix_share)),
    ("6ND", lambda row: _share(row.share_6nd)),
    ("peak GiB", lambda row: _number(row.peak_gib, 2)),
    ("floor ms", lambda row: _number(row.floor_ms, 3 if (row.floor_ms or 0) < 10 else 1)),
    ("x floor", _times_floor),
    ("first call s", lambda row: _number(row.first_call_seconds)),
    ("note", lambda row: row.note),
)


def cells(rows: Sequence[_Row], columns: Sequence[Column[_Row]]) -> tuple[list[str], list[list[str]]]:
    """Names of the columns that have any value, and the text of each row under them."""
    texts = [[text(row) for _, text in columns] for row in rows]
    used = [index for index in range(len(columns)) if any(text[index] for text in texts)]
    return [columns[index][0] for index in used], [[text[index] for index in used] for text in texts]


def print_result(result: Result) -> None:
    """The table, comparisons and circumstances, to standard output."""
    print_table(result, *cells(result.rows, COLUMNS), summary(result))


def print_table(run: Run, names: list[str], texts: list[list[str]], lines: list[str]) -> None:
    """A table with these columns and rows, and lines under it, to standard output."""
    table = Table(title=f"longspan bench {run.benchmark}", title_justify="left")
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < 2 or name == "note" else "right", overflow="fold")
    for text in texts:
        table.add_row(*text)
    console = Console(width=None if Console().is_terminal else _WIDTH)
    console.print(table)
    for line in lines:
        console.print(line, highlight=False, markup=False)


def summary(result: Result) -> list[str]:
    """Lines under the table: comparisons, measured ceilings, remarks, device and versions."""
    ceilings = result.ceilings
    lines = [f"{ratio.what}: {ratio.value:.3f}" for ratio in result.ratios]
    lines.append(
        f"Measured here: {ceilings['matrix_flops'] / 1e12:.3g} TFLOP/s ({ceilings['matrix_side']} cubed, "
        f"{result.settings['precision']}), copies {ceilings['copy_bytes'] / 1e12:.3g} TB/s."
    )
    if result.first_step_seconds is not None:
        entries = result.compile_caches_at_start
        caches = ", ".join(f"{name} {count}" for name, count in entries.items())
        lines.append(
            f"Process start to the end of the first call: {result.first_step_seconds:.1f} s; entries in the compile "
            f"caches at start: {caches}."
        )
    lines += result.notes
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items() if version)
    lines.append(f"{result.device['name']}; {versions}.")
    return lines


def append_report(result: Result, path: Path) -> None:
    """Add a section about `result` to a Markdown page; a new page gets a title."""
    append_section(path, result, *cells(result.rows, COLUMNS), summary(result))


def append_section(path: Path, run: Run, names: list[str], texts: list[list[str]], remarks: list[str]) -> None:
    """Add a section with these columns, rows and remarks to a Markdown page; a new page gets a title."""
    lines = [] if path.exists() else [f"# Benchmarks on {run.device['name']}", ""]
    lines += [f"## {run.benchmark}, {run.date[:10]}", f"`{run.command}`", ""]
    lines += [_markdown_row(names), _markdown_row(["---"] * len(names)), *map(_markdown_row, texts), ""]
    lines += [f"- {line}" for line in remarks]
    with path.open("a", encoding="utf-8") as file:
        if file.tell():
            file.write("\n")
        file.write("\n".join(lines) + "\n")


def _markdown_row(texts: list[str]) -> str:
    return f"| {' | '.join(text.replace('|', '/') for text in texts)} |"
