"""The tokenizer of the corpus that a run reads: what a checkpoint keeps of it, and whether it is still the same.

Every checkpoint has a copy, so that a model can be evaluated, exported and used without the corpus. Imports no torch.
"""

from __future__ import annotations

from longspan.data_pipeline.entries import VocabularyEntry
from longspan.data_pipeline.manifest import TOKENIZER_FOLDER, Manifest
from longspan.data_pipeline.tokenization import load_tokenizer
from longspan.data_pipeline.tokenization.base import Tokenizer
from longspan.data_pipeline.tokenization.byte_tokenizer import ByteTokenizer
from longspan.data_pipeline.tokenization.description import DESCRIPTION_NAME, read_description, read_files
from longspan.errors import UsageError


def corpus_tokenizer(manifest: Manifest) -> Tokenizer:
    """The tokenizer of the shards.

    Raises:
        UsageError: its files are missing or changed, or this machine or version cannot use it.
    """
    if manifest.vocabulary.kind == "bytes":
        return ByteTokenizer()
    return load_tokenizer(manifest.folder / TOKENIZER_FOLDER)


def tokenizer_files(manifest: Manifest) -> dict[str, bytes]:
    """The files of the tokenizer beside the shards, by name and verified; none for bytes, which need none.

    Raises:
        UsageError: files are missing or changed; names all of them.
    """
    if manifest.vocabulary.kind == "bytes":
        return {}
    folder = manifest.folder / TOKENIZER_FOLDER
    files = read_files(folder, read_description(folder))
    return {DESCRIPTION_NAME: (folder / DESCRIPTION_NAME).read_bytes(), **files}


def check_tokenizer(trained: str, vocabulary: VocabularyEntry, model: str, shards: str) -> None:
    """Compare the tokenizer that a model was trained with and that of shards.

    Args:
        trained: digest of the model's tokenizer. vocabulary: of the shards.
        model, shards: what to call the two in the message.

    Raises:
        UsageError: they differ; names both digests.
    """
    if trained != vocabulary.digest:
        raise UsageError(
            f"the tokenizer of {shards} does not match the model: {model} was trained with the tokenizer {trained}, "
            f"the shards hold tokens of {vocabulary.name} ({vocabulary.digest}). Use shards that were built with the "
            f"model's own tokenizer: `longspan data build` takes the folder of one as tokenizer.path."
        )
