"""One JSON object a line, plain or compressed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from longspan.data_pipeline.source_config import JsonLinesConfig
from longspan.data_pipeline.sources.compressed import open_decompressed
from longspan.data_pipeline.sources.places import Place, find_places, local_file, without_suffix
from longspan.data_pipeline.sources.rows import Row, row_documents
from longspan.data_pipeline.sources.tally import Tally
from longspan.data_pipeline.sources.text import SourceText
from longspan.errors import UsageError

_SUFFIXES = tuple(
    f"{form}{packed}"
    for form in (".jsonl", ".ndjson", ".json")
    for packed in ("", ".gz", ".zst", ".zstd", ".xz", ".bz2")
)
_LONGEST_LINE_BYTES = 2**30


def read_json_lines(config: JsonLinesConfig) -> SourceText:
    """The rows of all files, in order; empty lines do not count. Ids: the recipe's field, else FILE/LINE.

    Raises:
        UsageError: a file is missing, damaged or does not answer, or a line is no JSON object with the recipe's fields.
    """
    tally = Tally(config.name)
    places = find_places(config.name, config.paths)
    return SourceText(row_documents(config, _rows(config, places), tally), f"{len(places)} jsonl files", tally)


def _rows(config: JsonLinesConfig, places: list[Place]) -> Iterator[Row]:
    for place in places:
        with local_file(config.name, place) as file:
            yield from _file_rows(config, place, file)


def _file_rows(config: JsonLinesConfig, place: Place, file: Path) -> Iterator[Row]:
    stem = without_suffix(place.name, _SUFFIXES)
    with open_decompressed(file) as stream:
        number = 0
        while line := stream.readline(_LONGEST_LINE_BYTES):
            number += 1
            where = f"{place.address}, line {number}"
            if not line.strip():
                continue
            try:
                fields = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                raise UsageError(
                    f"source {config.name}: {where}: not JSON: {error}. One object a line is expected; mend or remove "
                    f"the line."
                ) from error
            if not isinstance(fields, dict):
                raise UsageError(
                    f"source {config.name}: {where}: holds {type(fields).__name__}, not an object with fields. "
                    f"Write one object a line."
                )
            yield Row(f"{stem}/{number}", where, fields)
