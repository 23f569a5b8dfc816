"""Parquet tables, read one row group after another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from longspan.data_pipeline.source_config import ParquetConfig
from longspan.data_pipeline.sources.places import Place, find_places, local_file, without_suffix
from longspan.data_pipeline.sources.rows import Row, check_columns, row_documents, wanted_fields
from longspan.data_pipeline.sources.tally import Tally
from longspan.data_pipeline.sources.text import SourceText
from longspan.errors import UsageError

_ROWS_AT_ONCE = 16  # a row may hold a whole book


def read_parquet(config: ParquetConfig) -> SourceText:
    """The rows of all files, in order; only the recipe's columns are read. Ids: the recipe's column, else FILE/ROW.

    Raises:
        UsageError: a file is missing, no Parquet file, or lacks a column.
    """
    tally = Tally(config.name)
    places = find_places(config.name, config.paths)
    for place in places:
        if not place.is_url:  # a wrong column in the last file is told before the first is read
            with local_file(config.name, place) as file:
                _check(config, place, file)
    return SourceText(row_documents(config, _rows(config, places), tally), f"{len(places)} Parquet files", tally)


def _check(config: ParquetConfig, place: Place, file: Path) -> list[str]:
    """Top-level columns to read."""
    from pyarrow import ArrowException  # heavy, and only this kind of source needs it
    from pyarrow.parquet import read_schema

    try:
        known = read_schema(file).names
    except ArrowException as error:
        raise _not_readable(config, place, error) from error
    check_columns(config, known, place.address)
    return list(dict.fromkeys(name if name in known else name.split(".")[0] for name in wanted_fields(config)))


def _rows(config: ParquetConfig, places: list[Place]) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    for place in places:
        stem = without_suffix(place.name, (".parquet", ".parq", ".pq"))
        with local_file(config.name, place) as file:
            columns = _check(config, place, file)
            number = 0
            try:
                with ParquetFile(file, page_checksum_verification=True) as table:
                    for batch in table.iter_batches(_ROWS_AT_ONCE, columns=columns):
                        for fields in batch.to_pylist():
                            number += 1
                            yield Row(f"{stem}/{number}", f"{place.address}, row {number}", fields)
            except (ArrowException, UnicodeDecodeError) as error:
                raise _not_readable(config, place, error) from error


def _not_readable(config: ParquetConfig, place: Place, error: Exception) -> UsageError:
    return UsageError(
        f"source {config.name}: {place.address} is no whole Parquet file: {error}. Fetch it again, or take it off the "
        f"source."
    )
