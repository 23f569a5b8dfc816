"""Rows with fields to documents: a row by itself, or all rows of a repository joined."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from longspan.data_pipeline.cleaning.registry import Cleaner
from longspan.data_pipeline.source_config import HuggingFaceConfig, JsonLinesConfig, ParquetConfig
from longspan.data_pipeline.sources.grouping import SourceFile, sorted_groups
from longspan.data_pipeline.sources.tally import Tally
from longspan.data_pipeline.sources.text import SourceDocument, cleaned_text
from longspan.errors import UsageError

RowsConfig = JsonLinesConfig | ParquetConfig | HuggingFaceConfig


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: its document's id where the recipe names no id field: file and row number.
        where: for messages, e.g. `books.jsonl, line 3`.
        fields: by name; a value may hold fields itself.
    """

    name: str
    where: str
    fields: Mapping[str, Any]


def wanted_fields(config: RowsConfig) -> list[str]:
    """The fields that the recipe names, as written there."""
    named = (config.text_field, config.id_field, config.licence_field, config.repository_field, config.path_field)
    return list(dict.fromkeys(name for name in named if name))


def check_columns(config: RowsConfig, known: Iterable[str], where: str) -> None:
    """Compare the recipe's fields with the columns of a table; all that are missing are named.

    Raises:
        UsageError: the table lacks one.
    """
    columns = list(known)
    missing = [name for name in wanted_fields(config) if name not in columns and name.split(".")[0] not in columns]
    if missing:
        listed = "; ".join(f"no column {name}{_advice(name, columns)}" for name in missing)
        raise UsageError(f"source {config.name}: {where}: {listed}")


def row_documents(config: RowsConfig, rows: Iterable[Row], tally: Tally) -> Iterator[SourceDocument]:
    """The documents of rows: one a row, in their order, or one a repository, by name.

    Rows whose text is null or not UTF-8 are left out and counted.

    Raises:
        UsageError: a row lacks a field that the recipe names, or it holds no text; names the row.
    """
    if config.repository_field is None:
        yield from (SourceDocument(name, text, licence) for name, text, licence, _ in _texts(config, rows, tally))
    else:
        yield from sorted_groups(_files(config, rows, tally), True, tally)


def _files(config: RowsConfig, rows: Iterable[Row], tally: Tally) -> Iterator[SourceFile]:
    for path, text, licence, row in _texts(config, rows, tally):
        repository = _value(config, row, config.repository_field or "")
        if repository is None:
            tally.leave_out("rows without a repository", row.where)
        else:
            yield SourceFile(_word(config, row, config.repository_field or "", repository), path, text, licence)


def _texts(config: RowsConfig, rows: Iterable[Row], tally: Tally) -> Iterator[tuple[str, bytes, str | None, Row]]:
    """Name (or path, for files of a repository), cleaned text and licence of each row."""
    cleaner = Cleaner(config.clean)
    named_by = config.path_field or config.id_field
    for row in rows:
        value = _value(config, row, config.text_field)
        if value is None:
            tally.leave_out("rows whose text is null", row.where)
            continue
        if not isinstance(value, str):
            raise UsageError(
                f"source {config.name}: {row.where}: the field {config.text_field} holds {type(value).__name__}, not "
                f"text. Set the source's `text_field`."
            )
        name = row.name if named_by is None else _word(config, row, named_by, _value(config, row, named_by))
        licence = None if config.licence_field is None else _licence(_value(config, row, config.licence_field))
        try:
            text = cleaned_text(cleaner, name, value.encode("utf-8"), tally)
        except UnicodeEncodeError:
            tally.leave_out("rows with half of a surrogate pair", row.where)
            continue
        if text is not None:
            yield name, text, licence, row


def _value(config: RowsConfig, row: Row, field: str) -> Any:
    """A field of the row; `a.b` is looked for by its whole name first, then as b inside a; None if a itself is null."""
    if field in row.fields:
        return row.fields[field]
    value: Any = row.fields
    for part in field.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or part not in value:
            known = list(value) if isinstance(value, Mapping) else list(row.fields)
            raise UsageError(f"source {config.name}: {row.where}: no field {field}{_advice(field, known)}")
        value = value[part]
    return value


def _word(config: RowsConfig, row: Row, field: str, value: Any) -> str:
    """An id, path or repository: text or a whole number, not empty."""
    if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip():
        try:
            str(value).encode("utf-8")
            return str(value)
        except UnicodeEncodeError:
            pass
    raise UsageError(
        f"source {config.name}: {row.where}: the field {field} = {value!r} cannot name a document. "
        f"Take a field of text or whole numbers."
    )


def _licence(value: Any) -> str | None:
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or None
    return str(value) if value else None


def _advice(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    there = f" There are: {', '.join(sorted(map(str, known)))}." if known else ""
    return (f". Did you mean {near[0]}?" if near else ".") + there
