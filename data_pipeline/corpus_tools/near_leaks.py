"""Whether corpora that are to be merged train on what another of them holds out, but for small changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from longspan.data_pipeline.corpus_config import DedupeConfig
from longspan.data_pipeline.corpus_tools.contents import text_of
from longspan.data_pipeline.dedupe import near_duplicates, signature
from longspan.data_pipeline.manifest import TOKENIZER_FOLDER, Manifest
from longspan.data_pipeline.tokenization import load_tokenizer


def near_leaks(manifests: list[Manifest], progress: Callable[[str], None]) -> list[str]:
    """Documents in training in one corpus that are near-duplicates of ones held out in another, a line each.

    By the same rule as a build's groups: MinHash of word shingles, with the settings that recipes have by default.
    Reads every document, but none if no corpus holds any out.

    Raises:
        DataError: a document does not have its hash.
    """
    if not any(len(manifest.places("held_out")) for manifest in manifests):
        return []
    config = DedupeConfig()
    signatures, known = [], []  # known: (corpus, id, is held out)
    for manifest in manifests:
        progress(f"comparing the {len(manifest.documents):,} documents of {manifest.folder} with the others")
        tokenizer = None
        if manifest.vocabulary.kind != "bytes":
            tokenizer = load_tokenizer(manifest.folder / TOKENIZER_FOLDER)
        for entry in manifest.documents:
            signatures.append(signature(text_of(manifest.folder, entry, tokenizer), config))
            known.append((manifest.folder, entry.id, entry.split == "held_out"))
    problems = []
    for members in near_duplicates(np.stack(signatures), config):
        problems += _problems([known[place] for place in members])
    return problems


def _problems(group: list[tuple[Path, str, bool]]) -> list[str]:
    held_out = [(folder, name) for folder, name, is_held_out in group if is_held_out]
    problems = []
    for folder, name, is_held_out in group:
        other = next((row for row in held_out if row[0] != folder), None)
        if not is_held_out and other is not None:
            problems.append(f"document {name} of {folder} is a near-duplicate of {other[1]}, held out in {other[0]}")
    return problems
