"""Where a corpus that is made of others appears: in a folder of its own, all at once or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from longspan.data_pipeline.build.workplace import Workplace, publish, workplace, write_synced
from longspan.data_pipeline.corpus_tools.figures import corpus_figures
from longspan.data_pipeline.manifest import MANIFEST_NAME, TOKENIZER_FOLDER, Manifest
from longspan.data_pipeline.statistics import STATISTICS_NAME
from longspan.data_pipeline.tokenization import load_tokenizer
from longspan.errors import UsageError


@contextmanager
def new_corpus(out: Path, of: Sequence[Path]) -> Iterator[Workplace]:
    """A working folder that `finish` turns into the corpus at `out`; gone if anything fails.

    Args:
        of: folders of the corpora that it is made of; a corpus inside one of them would make that one foreign to us.

    Raises:
        UsageError: something is at `out`, which stays as it is, or `out` is one of the corpora or lies in one.
        DataError: the disk refused a write.
    """
    out = out.resolve()
    for folder in of:
        if out.is_relative_to(folder.resolve()):
            where = "is" if out == folder.resolve() else "lies inside"
            raise UsageError(
                f"{out} {where} the corpus at {folder}, which stays as it is. Choose a folder outside it for the new "
                f"corpus."
            )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists already and stays as it is. Choose another folder for the new corpus.")
    parent = next(folder for folder in out.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"cannot write to {parent}, where the corpus folder {out.name} should go. Choose another one.")
    with workplace(out) as place:
        yield place


def finish(place: Workplace, manifest: Manifest, tokenizer: Path) -> None:
    """Write the manifest, its statistics and the tokenizer beside the shards, and let the corpus appear.

    Args:
        place: of `new_corpus`, with all shards. tokenizer: the corpus's folder `tokenizer`; of no use for bytes.
    """
    if manifest.vocabulary.kind != "bytes":
        shutil.copytree(tokenizer, place.building / TOKENIZER_FOLDER)
    made_by = None if manifest.vocabulary.kind == "bytes" else load_tokenizer(tokenizer)
    figures = (json.dumps(corpus_figures(manifest, place.building, made_by), indent=2) + "\n").encode()
    write_synced(place.building / STATISTICS_NAME, figures)
    with (place.building / MANIFEST_NAME).open("wb") as stream:
        manifest.write(stream)
        stream.flush()
        os.fsync(stream.fileno())
    publish(place)
