"""manifest.json says what a checkpoint holds; COMMITTED says which manifest, and is written last.

    step-00001000/
        manifest.json   step, world layout, size + sha256 + chunk checksums of every other file
        COMMITTED       sha256 of manifest.json, in the form that `sha256sum --check COMMITTED` reads

The manifest has no times and no paths: two checkpoints with the same contents have the same fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import PurePosixPath
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from longspan.errors import CheckpointError, UsageError
from longspan.trainer.checkpoint.files import FileEntry, UnreadableError, byte_range
from longspan.trainer.checkpoint.places import P, Place, children

FORMAT = "longspan-checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
COMMITTED = "COMMITTED"

_STEP_FOLDER = re.compile(r"^step-(\d{8,})$")
_COMMITTED_LINE = re.compile(rb"^([0-9a-f]{64})  manifest\.json\n$")


class Manifest(BaseModel):
    """Contents of manifest.json.

    Attributes:
        step: optimizer updates done; training goes on with this step number.
        config_sha256: of config.yaml.
        world_size: ranks that wrote it.
        lanes: [first, stop) of the carried state that each rank wrote; empty without carried state.
        tied: names of weights that are stored once, under the name on the right.
        counters: the trainer's counters (tokens, skips, ...).
        chunk_bytes: bytes that one checksum of `FileEntry.chunk_crc32` covers.
        files: every file but the manifest and COMMITTED, by path inside the checkpoint.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    step: int = Field(ge=0)
    config_sha256: str
    world_size: int = Field(ge=1)
    lanes: list[tuple[int, int]]
    tied: dict[str, str]
    counters: dict[str, Any]
    chunk_bytes: int = Field(ge=1)
    files: dict[str, FileEntry]

    def encoded(self) -> bytes:
        """The bytes of manifest.json; equal contents give equal bytes."""
        return (json.dumps(self.model_dump(), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def step_folder_name(step: int) -> str:
    """Folder of a step's checkpoint; names sort as steps do."""
    return f"step-{step:08d}"


def step_of(folder: Place) -> int | None:
    """The step in a checkpoint folder's name; None for any other folder."""
    match = _STEP_FOLDER.match(folder.name)
    return int(match[1]) if match else None


def committed_folders(root: P) -> list[P]:
    """Checkpoints below `root` (RUN/checkpoints) that were published, oldest first; not verified."""
    folders = [folder for folder in children(root) if step_of(folder) is not None and (folder / COMMITTED).is_file()]
    return sorted(cast(list[P], folders), key=lambda folder: step_of(folder) or 0)


def commit_line(manifest: bytes) -> bytes:
    """Contents of COMMITTED for a manifest with these bytes."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def read_manifest(folder: Place) -> tuple[Manifest, str]:
    """The manifest of a published checkpoint, checked against COMMITTED, and its sha256 (the fingerprint).

    Raises:
        UsageError: there is no COMMITTED, so this is no published checkpoint.
        CheckpointError: one of the two files is damaged or of a format that this version cannot read.
    """
    if not (folder / COMMITTED).is_file():
        raise UsageError(
            f"{folder} holds no {COMMITTED} file, so it is not a published checkpoint. "
            f"Name a folder like RUN/checkpoints/{step_folder_name(1000)}, or the run directory for its newest one."
        )
    committed, content = _read(folder, COMMITTED), _read(folder, MANIFEST)
    line = _COMMITTED_LINE.match(committed)
    if line is None:
        raise CheckpointError(f"{COMMITTED}, {byte_range(0, len(committed))}: not the line that was saved")
    fingerprint = hashlib.sha256(content).hexdigest()
    if fingerprint != line[1].decode():
        raise CheckpointError(
            f"{MANIFEST}, {byte_range(0, len(content))}: does not match its sha256 in {COMMITTED}, bytes 0-63"
        )
    return _parse(content, folder), fingerprint


def _read(folder: Place, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{name}, byte 0: missing") from error
    except OSError as error:
        raise UnreadableError(f"{name}, byte 0: unreadable ({error.strerror or error})") from error


def _parse(content: bytes, folder: Place) -> Manifest:
    try:
        raw = json.loads(content)
        version = raw["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{MANIFEST}: format version {version!r}, this version of Longspan reads {FORMAT_VERSION}. "
                f"Use the version of Longspan that wrote it, or a newer one."
            )
        manifest = Manifest.model_validate(raw)
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
        raise CheckpointError(f"{MANIFEST}: not a checkpoint's manifest ({error})") from error
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{MANIFEST}: lists {name!r}, which lies outside the checkpoint")
    if step_of(folder) not in (None, manifest.step):
        raise CheckpointError(f"{MANIFEST}: is of step {manifest.step}, in the folder {folder.name}")
    return manifest
