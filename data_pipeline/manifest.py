"""The manifest of a corpus: every document's place and hash, every shard's size and hash. Imports no torch."""

from __future__ import annotations

import difflib
import io
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from longspan.data_pipeline.document_table import DocumentTable
from longspan.data_pipeline.entries import DocumentEntry, ShardEntry, SourceEntry, Split, VocabularyEntry
from longspan.data_pipeline.manifest_checks import manifest_problems
from longspan.data_pipeline.manifest_file import (
    REBUILD,
    SCHEMA_NAME,
    SCHEMA_VERSION,
    Header,
    manifest_digest,
    manifest_lines,
    read_manifest,
)
from longspan.data_pipeline.regular_files import open_regular
from longspan.data_pipeline.tokenization.base import Tokenizer
from longspan.data_pipeline.tokenization.description import read_description
from longspan.data_pipeline.vocabulary import PAD, ByteVocabulary
from longspan.errors import DataError, UsageError

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA_NAME",
    "SCHEMA_VERSION",
    "TOKENIZER_FOLDER",
    "DocumentEntry",
    "DocumentTable",
    "Manifest",
    "ShardEntry",
    "SourceEntry",
    "Split",
    "VocabularyEntry",
    "byte_vocabulary",
    "did_you_mean",
    "vocabulary_entry",
]

MANIFEST_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
_MOST_COMPARED = 2_000  # names; each takes some 50 microseconds


@dataclass(frozen=True, eq=False)
class Manifest:
    """A corpus as it lies on disk.

    Attributes:
        folder: where the shards lie. name: of the corpus.
        documents: all of them, in order; entries are made when asked for.
        digest: sha256 of everything else in manifest.json.
    """

    folder: Path
    name: str
    vocabulary: VocabularyEntry
    sources: list[SourceEntry]
    shards: list[ShardEntry]
    documents: DocumentTable
    digest: str

    @classmethod
    def create(
        cls,
        folder: Path,
        name: str,
        sources: list[SourceEntry],
        shards: list[ShardEntry],
        documents: Iterable[DocumentEntry],
        vocabulary: VocabularyEntry | None = None,
    ) -> Manifest:
        """A manifest with its digest. `vocabulary`: of its tokens (`vocabulary_entry`); the byte vocabulary if None."""
        vocabulary = vocabulary or byte_vocabulary()
        header = Header(name=name, vocabulary=vocabulary, sources=sources, shards=shards)
        table = documents if isinstance(documents, DocumentTable) else DocumentTable.from_entries(documents)
        return cls(folder, name, vocabulary, sources, shards, table, manifest_digest(header, table))

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read and check `folder`/manifest.json and the description of its tokenizer; reads no shard.

        Raises:
            UsageError: there is no corpus in the folder, one of another schema version, or another tokenizer.
            DataError: the manifest does not hold what it should.
            SecurityError: a shard's url leaves the folder.
        """
        folder = Path(folder)
        file = folder / MANIFEST_NAME
        try:
            with open_regular(file) as stream:
                manifest = cls.read(stream, folder, str(file))
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(
                f"no corpus at {folder}: {MANIFEST_NAME} is missing. "
                f"Build one with `longspan data build RECIPE --out {folder}`."
            ) from None
        except OSError as error:
            raise DataError(f"{file} is not readable: {error}. {REBUILD}") from None
        if manifest.vocabulary.kind != "bytes":
            _check_tokenizer(manifest)
        return manifest

    @classmethod
    def read(cls, stream: BinaryIO, folder: Path, where: str) -> Manifest:
        """Read and check a manifest from a stream.

        Args:
            stream: of manifest.json. folder: where its shards lie. where: name of the stream in messages.

        Raises:
            As `load`; the tokenizer's folder is not looked at.
        """
        header, documents, digest = read_manifest(stream, where)
        if header.vocabulary.kind == "bytes" and header.vocabulary != byte_vocabulary():
            raise DataError(
                f"{where}: vocabulary {header.vocabulary.name} is not this version's byte vocabulary. {REBUILD}"
            )
        problems = manifest_problems(header, documents)
        if problems:
            raise DataError(f"{where}: {'; '.join(problems)}. {REBUILD}")
        return cls(folder, header.name, header.vocabulary, header.sources, header.shards, documents, digest)

    def split(self, name: Split) -> list[DocumentEntry]:
        """The documents of `train` or `held_out`, in manifest order."""
        return list(self.documents.take(self.places(name)))

    def places(self, name: Split) -> np.ndarray:
        """Places in `documents` of those of `train` or `held_out`: int64 [m]."""
        return np.flatnonzero(self.documents.is_train == (name == "train"))

    def document(self, document_id: str) -> DocumentEntry:
        """The document with this id.

        Raises:
            UsageError: there is none; names the nearest ids.
        """
        place = self.documents.find(document_id)
        if place is None:
            raise UsageError(f"no document {document_id}{did_you_mean(document_id, self.documents.strings('id'))}")
        return self.documents[place]

    def to_json(self) -> str:
        """The text of manifest.json."""
        buffer = io.BytesIO()
        self.write(buffer)
        return buffer.getvalue().decode()

    def write(self, stream: BinaryIO) -> None:
        """Write the text of manifest.json, line by line."""
        header = Header(name=self.name, vocabulary=self.vocabulary, sources=self.sources, shards=self.shards)
        stream.writelines(manifest_lines(header, self.documents, self.digest))


def byte_vocabulary() -> VocabularyEntry:
    """The entry of the byte vocabulary, whose corpora hold text and need no tokenizer folder."""
    more = {"digest": ByteVocabulary().digest, "kind": "bytes", "size": PAD + 1, "token_dtype": "uint8"}
    return VocabularyEntry.model_validate({**ByteVocabulary.description(), **more})


def vocabulary_entry(tokenizer: Tokenizer) -> VocabularyEntry:
    """The entry of a corpus whose documents `tokenizer` encodes."""
    if tokenizer.kind == "bytes":
        return byte_vocabulary()
    fields = {name: getattr(tokenizer, name) for name in VocabularyEntry.model_fields}
    return VocabularyEntry.model_validate({**fields, "token_dtype": tokenizer.token_dtype.name})


def did_you_mean(name: str, known: list[str]) -> str:
    """`. Did you mean X, Y?` with the nearest of `known`; a full stop alone if nothing is near.

    Of many, only some that begin as the first half of `name` does are compared, so that an answer takes no minutes.
    """
    if len(known) > _MOST_COMPARED:
        start = name[: len(name) // 2]
        known = list(itertools.islice((other for other in known if other.startswith(start)), _MOST_COMPARED))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f". Did you mean {' or '.join(near)}?" if near else "."


def _check_tokenizer(manifest: Manifest) -> None:
    """Compare the description of the tokenizer beside the shards; its files are hashed when they are loaded."""
    folder = manifest.folder / TOKENIZER_FOLDER
    found, expected = read_description(folder), manifest.vocabulary
    differing = [
        f"{name} {getattr(found, name)} instead of {value}" for name, value in expected if getattr(found, name) != value
    ]
    if differing:
        raise UsageError(
            f"the tokenizer at {folder} is not the one of the shards beside it: {', '.join(differing)}. "
            f"Put the folder back that was built with them, or build the corpus again."
        )
