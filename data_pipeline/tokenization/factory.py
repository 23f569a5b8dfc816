"""From a configuration or a saved folder to a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from longspan.data_pipeline.tokenization.base import Tokenizer
from longspan.data_pipeline.tokenization.bpe import VOCAB_SIZE, bpe_tokenizer, train_bpe
from longspan.data_pipeline.tokenization.byte_tokenizer import ByteTokenizer
from longspan.data_pipeline.tokenization.config import (
    BpeTokenizerConfig,
    BytesTokenizerConfig,
    SentencePieceTokenizerConfig,
    TokenizerConfig,
)
from longspan.data_pipeline.tokenization.description import Description, describe, read_description, read_files
from longspan.data_pipeline.tokenization.hugging_face import hugging_face_tokenizer, read_hugging_face
from longspan.data_pipeline.tokenization.sentence_piece import read_sentence_piece, sentence_piece_tokenizer
from longspan.errors import UsageError


def make(config: TokenizerConfig, texts: Iterable[bytes]) -> Tokenizer:
    """See `longspan.data_pipeline.tokenization.make_tokenizer`."""
    if isinstance(config, BytesTokenizerConfig):
        return ByteTokenizer()
    if isinstance(config, BpeTokenizerConfig):
        return (
            _saved_bpe(config) if config.path else train_bpe(texts, config.vocab_size or VOCAB_SIZE, config.train_bytes)
        )
    path = Path(config.path).expanduser()
    if isinstance(config, SentencePieceTokenizerConfig):
        return sentence_piece_tokenizer(_name(path), read_sentence_piece(path))
    return hugging_face_tokenizer(_name(path), "hugging_face", read_hugging_face(path))


def load(folder: Path) -> Tokenizer:
    """See `longspan.data_pipeline.tokenization.load_tokenizer`."""
    description = read_description(folder)
    files = read_files(folder, description)
    tokenizer = _from_files(description, files)
    found, expected = describe(tokenizer, files).model_dump(), description.model_dump()
    wrong = [f"{key} {found[key]}, described as {expected[key]}" for key in expected if found[key] != expected[key]]
    if wrong:
        raise UsageError(
            f"the tokenizer at {folder} does not match its description: {'; '.join(wrong)}. The description was "
            f"changed, or another version cuts texts differently. Build the corpus again."
        )
    return tokenizer


def _from_files(description: Description, files: dict[str, bytes]) -> Tokenizer:
    if description.kind == "bytes":
        return ByteTokenizer()
    if description.kind == "bpe":
        return bpe_tokenizer(files)
    if description.kind == "sentencepiece":
        return sentence_piece_tokenizer(description.name, files)
    return hugging_face_tokenizer(description.name, "hugging_face", files)


def _saved_bpe(config: BpeTokenizerConfig) -> Tokenizer:
    folder = Path(config.path or "").expanduser()
    tokenizer = load(folder)
    if tokenizer.kind != "bpe" or config.vocab_size not in (None, tokenizer.size):
        size = "" if config.vocab_size is None else f" with vocab_size {config.vocab_size}"
        raise UsageError(
            f"the recipe asks for bpe{size}, the tokenizer at {folder} is {tokenizer.kind} with {tokenizer.size} ids. "
            f"Change `vocab_size`, `kind` or `path`."
        )
    return tokenizer


def _name(path: Path) -> str:
    """For people: the file's or folder's own name."""
    return path.resolve().parent.name if path.name == "tokenizer.json" else path.resolve().name
