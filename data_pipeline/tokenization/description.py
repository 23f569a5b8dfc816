"""`description.json` of a saved tokenizer: what it is, and the hashes of its files. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from longspan.data_pipeline.regular_files import read_regular
from longspan.data_pipeline.tokenization.base import Tokenizer, TokenizerKind
from longspan.errors import UsageError

DESCRIPTION_NAME = "description.json"
SCHEMA_VERSION = 1
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_PlainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


class Description(BaseModel):
    """A saved tokenizer. `files` maps the names of the files beside the description to their sha256."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_name: Literal["longspan-tokenizer"] = "longspan-tokenizer"
    schema_version: Literal[1] = 1
    name: str
    kind: TokenizerKind
    bos: int = Field(ge=0)
    eos: int = Field(ge=0)
    pad: int = Field(ge=0)
    size: int = Field(ge=1)
    padded_size: int = Field(ge=1)
    token_dtype: str = Field(pattern="^uint(16|32)$")
    digest: Sha256
    files: dict[_PlainName, Sha256]


def describe(tokenizer: Tokenizer, files: dict[str, bytes]) -> Description:
    """The description of `tokenizer`, which consists of `files` (name to content)."""
    return Description(
        name=tokenizer.name,
        kind=tokenizer.kind,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        pad=tokenizer.pad,
        size=tokenizer.size,
        padded_size=tokenizer.padded_size,
        token_dtype=tokenizer.token_dtype.name,
        digest=tokenizer.digest,
        files={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    )


def digest_of(
    kind: TokenizerKind, specials: tuple[int, int, int], size: int, rule: str, files: dict[str, bytes]
) -> str:
    """Hex sha256 over what decides ids and byte lengths.

    Args:
        kind: of the tokenizer. specials: bos, eos, pad. size: ids are below it.
        rule: name of the rule by which texts are cut before they are encoded.
        files: name to content of the files that it consists of.
    """
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    facts: dict[str, Any] = {"kind": kind, "specials": specials, "size": size, "rule": rule, "files": hashes}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def save_files(folder: Path, tokenizer: Tokenizer, files: dict[str, bytes]) -> None:
    """Write `files` and the description of `tokenizer` to `folder`; a description that is there must be the same one.

    Raises:
        UsageError: the folder holds another tokenizer, or cannot be written.
    """
    description = describe(tokenizer, files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / DESCRIPTION_NAME).exists() and read_description(folder) != description:
            raise UsageError(f"{folder} holds another tokenizer already. Choose an empty folder.")
        for name, content in files.items():
            (folder / name).write_bytes(content)
        # last, so that a folder with a description is complete
        (folder / DESCRIPTION_NAME).write_text(description.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write the tokenizer to {folder}: {error}. Choose another folder.") from error


def read_description(folder: Path) -> Description:
    """The description in `folder`; reads no other file.

    Raises:
        UsageError: there is none, a newer version wrote it, or it does not hold what it should.
    """
    file = folder / DESCRIPTION_NAME
    try:
        raw = json.loads(read_regular(file))
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise UsageError(
                f"{file} has schema version {version}, this Longspan reads up to {SCHEMA_VERSION}. Upgrade Longspan."
            )
        return Description.model_validate(raw)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"no tokenizer at {folder}: {DESCRIPTION_NAME} is missing. `longspan data build` writes one with each "
            f"corpus, in its folder `tokenizer`."
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{file} is damaged: {where}: {first['msg']}. Build the corpus again.") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}. Build the corpus again.") from error


def read_files(folder: Path, description: Description) -> dict[str, bytes]:
    """The content of each file of the description, verified against its sha256.

    Raises:
        UsageError: files are missing or changed; names all of them.
    """
    files, problems = {}, []
    for name, expected in description.files.items():
        try:
            files[name] = read_regular(folder / name)
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
            continue
        found = hashlib.sha256(files[name]).hexdigest()
        if found != expected:
            problems.append(f"{name}: sha256 {found[:16]}, expected {expected[:16]}")
    if problems:
        raise UsageError(
            f"the tokenizer at {folder} is not as it was saved:\n  " + "\n  ".join(problems) + "\n"
            "Put the files back, or build the corpus again."
        )
    return files
