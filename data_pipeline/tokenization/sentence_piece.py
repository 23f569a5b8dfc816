"""SentencePiece models, with the bytes of the original text that each piece stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from longspan.data_pipeline.regular_files import read_regular
from longspan.data_pipeline.tokenization.file_tokenizer import FileTokenizer
from longspan.data_pipeline.tokenization.offsets import OffsetEngine
from longspan.errors import UsageError

MODEL_NAME = "tokenizer.model"


class _SentencePieceEncoder:
    """`SentencePieceProcessor` with byte offsets."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.unknown: int | None = processor.unk_id()

    def encode_chunks(self, chunks: list[str], threads: int) -> list[tuple[list[int], np.ndarray]]:
        found = self._processor.encode(chunks, return_type="offset_mapping", return_bytes=True, num_threads=threads)
        return [
            (item["ids"], np.fromiter((end for _, end in item["offsets"]), dtype=np.int64, count=len(item["ids"])))
            for item in found
        ]

    def decode(self, ids: list[int]) -> str:
        return str(self._processor.decode(ids))


def read_sentence_piece(path: Path) -> dict[str, bytes]:
    """The model file, under the name that it is stored by.

    Args:
        path: the file, or a folder with one file whose name holds `.model`.

    Raises:
        UsageError: there is none, or more than one.
    """
    file = path
    if path.is_dir():
        found = sorted(item for item in path.iterdir() if ".model" in item.name and item.is_file())
        if len(found) != 1:
            names = ", ".join(item.name for item in found) or "none"
            raise UsageError(f"{path} must hold one SentencePiece model (*.model*), found: {names}. Name the file.")
        file = found[0]
    try:
        return {MODEL_NAME: read_regular(file)}
    except OSError as error:
        raise UsageError(f"no SentencePiece model at {file}: {error.strerror}. Name a *.model file.") from None


def sentence_piece_tokenizer(name: str, files: dict[str, bytes]) -> FileTokenizer:
    """The tokenizer of the model file in `files`.

    Raises:
        UsageError: sentencepiece is not installed, or the file is not a model.
    """
    try:
        import sentencepiece
    except ImportError:
        raise UsageError(
            "the package sentencepiece is not installed, and the tokenizer is a SentencePiece model. "
            "Install the extra that brings it: `pip install 'longspan[data]'`."
        ) from None
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(files[MODEL_NAME])
        num_ids = processor.piece_size()
    except (KeyError, RuntimeError) as error:
        raise UsageError(f"the tokenizer {name} is not a SentencePiece model: {error}. Name a *.model file.") from error
    specials = (processor.bos_id(), processor.eos_id(), processor.pad_id())
    bos, eos, pad = (special if special >= 0 else None for special in specials)
    engine = OffsetEngine(_SentencePieceEncoder(processor))
    return FileTokenizer(name, "sentencepiece", engine, (bos, eos, pad), num_ids, files)
