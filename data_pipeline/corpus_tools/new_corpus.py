"""Where a corpus that is made of others appears: in a folder of its own, all at once or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longspan.data_pipeline.build.workplace import Workplace, publish, workplace
from longspan.data_pipeline.manifest import MANIFEST_NAME, TOKENIZER_FOLDER, Manifest
from longspan.errors import UsageError


@contextmanager
def new_corpus(out: Path) -> Iterator[Workplace]:
    """A working folder that `finish` turns into the corpus at `out`; gone if anything fails.

    Raises:
        UsageError: something is at `out`; it stays as it is.
        DataError: the disk refused a write.
    """
    out = out.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists already and stays as it is. Choose another folder for the new corpus.")
    parent = next(folder for folder in out.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"cannot write to {parent}, where the corpus folder {out.name} should go. Choose another one.")
    with workplace(out) as place:
        yield place


def finish(place: Workplace, manifest: Manifest, tokenizer: Path) -> None:
    """Write the manifest and the tokenizer beside the shards, and let the corpus appear.

    Args:
        place: of `new_corpus`, with all shards. tokenizer: the corpus's folder `tokenizer`; of no use for bytes.
    """
    if manifest.vocabulary.kind != "bytes":
        shutil.copytree(tokenizer, place.building / TOKENIZER_FOLDER)
    with (place.building / MANIFEST_NAME).open("wb") as stream:
        manifest.write(stream)
        stream.flush()
        os.fsync(stream.fileno())
    publish(place)
