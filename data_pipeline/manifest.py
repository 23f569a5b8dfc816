"""The manifest of a corpus: every document's place and hash, every shard's size and hash. Imports no torch."""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from longspan.data_pipeline.vocabulary import ByteVocabulary
from longspan.errors import DataError, SecurityError, UsageError

MANIFEST_NAME = "manifest.json"
SCHEMA_NAME = "longspan-corpus"
SCHEMA_VERSION = 1

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Split = Literal["train", "held_out"]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _plain_file_name(url: str) -> str:
    """A shard lies beside its manifest; anything else could run a command or leave the folder."""
    if not url or "/" in url or "\\" in url or ":" in url or url.startswith("."):
        raise SecurityError(f"the manifest names the shard {url!r}; only plain file names beside it are allowed.")
    return url


class ShardEntry(_Entry):
    """One tar file. `url` is a file name beside the manifest; `size` in bytes."""

    url: Annotated[str, AfterValidator(_plain_file_name)]
    size: int = Field(ge=0)
    sha256: Sha256


class DocumentEntry(_Entry):
    """One document.

    Attributes:
        id: `source/name`, unique in the corpus.
        group: near-duplicates share a group; the document's own id if it has none.
        num_tokens: with bos and eos. num_bytes: of the UTF-8 text.
        shard: url of its shard. offset, size: of the text inside the shard, bytes. sha256: of the text.
    """

    id: str
    source: str
    group: str
    split: Split
    licence: str
    num_tokens: int = Field(ge=2)
    num_bytes: int = Field(ge=0)
    shard: str
    offset: int = Field(ge=0)
    size: int = Field(ge=0)
    sha256: Sha256


class SourceEntry(_Entry):
    """One source: its name, kind, licence and origin with version, e.g. `Python 3.11.7 standard library`."""

    name: str
    kind: str
    licence: str
    origin: str


class VocabularyEntry(_Entry):
    """The vocabulary that turns text into token ids."""

    name: str
    bos: int
    eos: int
    pad: int
    padded_size: int
    digest: Sha256


class Manifest(BaseModel):
    """A corpus as it lies on disk. `digest` is the sha256 of everything else here."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_name: Literal["longspan-corpus"] = "longspan-corpus"
    schema_version: Literal[1] = 1
    name: str
    vocabulary: VocabularyEntry
    sources: list[SourceEntry]
    shards: list[ShardEntry]
    documents: list[DocumentEntry]
    digest: str = ""

    _folder: Path = PrivateAttr(default=Path("."))

    @property
    def folder(self) -> Path:
        """Where the shards lie."""
        return self._folder

    @classmethod
    def create(
        cls,
        folder: Path,
        name: str,
        sources: list[SourceEntry],
        shards: list[ShardEntry],
        documents: list[DocumentEntry],
    ) -> Manifest:
        """A manifest of byte-level documents, with its digest."""
        vocabulary = VocabularyEntry(**ByteVocabulary.description(), digest=ByteVocabulary().digest)
        bare = cls(name=name, vocabulary=vocabulary, sources=sources, shards=shards, documents=documents)
        manifest = bare.model_copy(update={"digest": _digest(bare.model_dump(mode="json"))})
        manifest._folder = folder
        return manifest

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read and check `folder`/manifest.json; reads no shard.

        Raises:
            UsageError: there is no corpus in the folder.
            DataError: the manifest does not hold what it should.
            SecurityError: a shard's url leaves the folder.
        """
        folder = Path(folder)
        file = folder / MANIFEST_NAME
        try:
            raw = json.loads(file.read_bytes())
            manifest = cls.model_validate(raw)
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(
                f"no corpus at {folder}: {MANIFEST_NAME} is missing. "
                f"Build one with `longspan data build RECIPE --out {folder}`."
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{file}: {where}: {first['msg'].lower()}. {_REBUILD}") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{file} is not readable: {error}. {_REBUILD}") from None
        manifest._check(file, raw)
        manifest._folder = folder
        return manifest

    def _check(self, file: Path, raw: dict[str, Any]) -> None:
        if _digest(raw) != self.digest:
            raise DataError(f"{file}: its content does not match its digest {self.digest[:16]}. {_REBUILD}")
        if self.vocabulary.digest != ByteVocabulary().digest:
            raise DataError(
                f"{file}: vocabulary {self.vocabulary.name} is not this version's byte vocabulary. {_REBUILD}"
            )
        sizes = {shard.url: shard.size for shard in self.shards}
        for document in self.documents:
            if document.offset + document.size > sizes.get(document.shard, -1):
                raise DataError(f"{file}: document {document.id} lies outside its shard {document.shard}. {_REBUILD}")
        if len({document.id for document in self.documents}) != len(self.documents):
            raise DataError(f"{file}: two documents share an id. {_REBUILD}")

    def split(self, name: Split) -> list[DocumentEntry]:
        """The documents of `train` or `held_out`, in manifest order."""
        return [document for document in self.documents if document.split == name]

    def document(self, document_id: str) -> DocumentEntry:
        """The document with this id.

        Raises:
            UsageError: there is none; names the nearest ids.
        """
        for document in self.documents:
            if document.id == document_id:
                return document
        raise UsageError(f"no document {document_id}{did_you_mean(document_id, [d.id for d in self.documents])}")

    def to_json(self) -> str:
        """The text of manifest.json: one line a document, so that two manifests compare well."""
        raw = self.model_dump(mode="json")
        lines = []
        for key, value in raw.items():
            if isinstance(value, list):
                items = ",\n".join(f"    {json.dumps(item)}" for item in value)
                lines.append(f"  {json.dumps(key)}: [\n{items}\n  ]")
            else:
                lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
        return "{\n" + ",\n".join(lines) + "\n}\n"


_REBUILD = "Build the corpus again with `longspan data build RECIPE`."


def did_you_mean(name: str, known: list[str]) -> str:
    """`. Did you mean X, Y?` with the nearest of `known`; a full stop alone if nothing is near."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f". Did you mean {' or '.join(near)}?" if near else "."


def _digest(raw: dict[str, Any]) -> str:
    rest = {key: value for key, value in raw.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
