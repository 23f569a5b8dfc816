"""The text of manifest.json, written and read as a stream: one line a document, its digest last.

The form is fixed to the byte, so that two manifests compare well, the digest is one hash over what stands before it,
and a million documents are read in seconds without a Python object for each.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Literal, NamedTuple

import pyarrow as pa
import pyarrow.json
from pydantic import BaseModel, ConfigDict, ValidationError

from longspan.data_pipeline.document_table import ROW_SCHEMA, DocumentTable
from longspan.data_pipeline.entries import DocumentEntry, ShardEntry, SourceEntry, VocabularyEntry
from longspan.errors import DataError, UsageError

SCHEMA_NAME = "longspan-corpus"
SCHEMA_VERSION = 2
REBUILD = "Build the corpus again with `longspan data build RECIPE`, or copy it anew."

_DOCUMENTS = b'  "documents": [\n'
_END = b"  ],\n"
_TAIL = re.compile(rb'  "digest": "([0-9a-f]{64})"\n\}\n')
_VERSION = re.compile(rb'"schema_version": *(\d{1,9})\b')
_ROWS_AT_ONCE = 32_768
_LONGEST_LINE = 2**26


class Header(BaseModel):
    """Everything in a manifest but its documents and its digest."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_name: Literal["longspan-corpus"] = "longspan-corpus"
    schema_version: Literal[2] = 2
    name: str
    vocabulary: VocabularyEntry
    sources: list[SourceEntry]
    shards: list[ShardEntry]


class ManifestText(NamedTuple):
    """What a manifest's text says; `digest` was compared with it."""

    header: Header
    documents: DocumentTable
    digest: str


def manifest_digest(header: Header, documents: DocumentTable) -> str:
    """Hex sha256 of everything that stands before the digest in the text."""
    digest = hashlib.sha256()
    for line in _lines_before_digest(header, documents):
        digest.update(line)
    return digest.hexdigest()


def manifest_lines(header: Header, documents: DocumentTable, digest: str) -> Iterator[bytes]:
    """The text of manifest.json, line by line."""
    yield from _lines_before_digest(header, documents)
    yield f'  "digest": "{digest}"\n}}\n'.encode()


def read_manifest(stream: BinaryIO, where: str) -> ManifestText:
    """Read the text of a manifest and check its form, its fields and its digest.

    Args:
        stream: of manifest.json. where: its name in messages.

    Raises:
        UsageError: it has another schema version. SecurityError: it names a file outside its folder.
        DataError: it is damaged; names the field or the document.
    """
    digest = hashlib.sha256()
    header = _read_header(stream, where, digest)
    tables: list[pa.Table] = []
    waiting: list[bytes] = []
    first = 0
    while (line := stream.readline(_LONGEST_LINE)) != _END:
        if not line:
            raise DataError(f"{where} is cut off in its documents. {REBUILD}")
        if len(waiting) == _ROWS_AT_ONCE:
            tables.append(_read_rows(waiting, first, where, digest, last=False))
            first += len(waiting)
            waiting = []
        waiting.append(line)
    if waiting:
        tables.append(_read_rows(waiting, first, where, digest, last=True))
    digest.update(_END)
    tail = _TAIL.fullmatch(stream.read(4096))
    if tail is None:
        raise DataError(f"{where}: digest: field required at the end of the file. {REBUILD}")
    if digest.hexdigest() != tail[1].decode():
        raise DataError(f"{where}: its content does not match its digest {tail[1].decode()[:16]}. {REBUILD}")
    rows = pa.concat_tables(tables) if tables else ROW_SCHEMA.empty_table()
    return ManifestText(header, DocumentTable(rows), tail[1].decode())


def _lines_before_digest(header: Header, documents: DocumentTable) -> Iterator[bytes]:
    yield b"{\n"
    for name, value in header.model_dump(mode="json").items():
        if isinstance(value, list):
            yield f"  {json.dumps(name)}: [\n".encode()
            yield from _list_lines(value)
        else:
            yield f"  {json.dumps(name)}: {json.dumps(value)},\n".encode()
    yield _DOCUMENTS
    yield from _list_lines(documents.fields())


def _list_lines(items: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    previous = None
    for item in items:
        if previous is not None:
            yield f"    {previous},\n".encode()
        previous = json.dumps(item)
    if previous is not None:
        yield f"    {previous}\n".encode()
    yield _END


def _read_header(stream: BinaryIO, where: str, digest: hashlib._Hash) -> Header:
    lines = []
    while (line := stream.readline(_LONGEST_LINE)) and line != _DOCUMENTS:
        lines.append(line)
    text = b"".join(lines)
    _check_version(text, where)
    digest.update(text + line)
    try:
        raw = json.loads(text.rstrip().rstrip(b",") + b"}" if line else text)
        if line:
            return Header.model_validate(raw)
        if not isinstance(raw, dict):
            raise ValueError(f"it holds {type(raw).__name__}, not an object with fields")
        # other damage of the header is told of first
        Header.model_validate({key: value for key, value in raw.items() if key in Header.model_fields})
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise DataError(f"{where}: {place}: {problem['msg'].lower()}. {REBUILD}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not readable: {error}. {REBUILD}") from None
    raise DataError(f"{where}: documents: field required, one line a document as Longspan writes them. {REBUILD}")


def _check_version(text: bytes, where: str) -> None:
    found = _VERSION.search(text)
    version = SCHEMA_VERSION if found is None else int(found[1])
    if version > SCHEMA_VERSION:
        raise UsageError(
            f"{where} has schema version {version}; this version of Longspan reads {SCHEMA_VERSION}. "
            f"Upgrade Longspan, or build the corpus again with this version."
        )
    if version < SCHEMA_VERSION:
        raise UsageError(
            f"{where} has schema version {version}, of an earlier Longspan; this one reads {SCHEMA_VERSION}. "
            f"Build the corpus again with `longspan data build RECIPE`."
        )


def _read_rows(lines: list[bytes], first: int, where: str, digest: hashlib._Hash, last: bool) -> pa.Table:
    """Documents `first` on, as columns. `last`: no comma after the last of them."""
    text = b"".join(lines)
    digest.update(text)
    problem = "not one object a line"
    rows = text.replace(b"},\n", b"}\n")
    if len(text) - len(rows) == len(lines) - last:
        try:
            table = pyarrow.json.read_json(
                io.BytesIO(rows),
                read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(rows) + 1),
                parse_options=pyarrow.json.ParseOptions(explicit_schema=ROW_SCHEMA, unexpected_field_behavior="error"),
            )
            if table.num_rows == len(lines) and not any(column.null_count for column in table.columns):
                return DocumentTable(table.select(ROW_SCHEMA.names)).rows
        except pa.ArrowInvalid as error:
            problem = str(error)
    for place, line in enumerate(lines, first):
        try:
            entry = DocumentEntry.model_validate_json(line.strip().removesuffix(b","))
        except ValidationError as error:
            what = error.errors()[0]
            field = ".".join(str(part) for part in what["loc"])
            raise DataError(f"{where}: documents.{place}.{field}: {what['msg'].lower()}. {REBUILD}") from None
        if missing := set(ROW_SCHEMA.names) - entry.model_fields_set:
            raise DataError(f"{where}: documents.{place}.{min(missing)}: field required. {REBUILD}")
    raise DataError(f"{where}: documents from {first} on are not readable: {problem}. {REBUILD}")
