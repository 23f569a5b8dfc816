"""Tokenizers in the form of the Hugging Face `tokenizers` library, read without `transformers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from longspan.data_pipeline.regular_files import read_regular
from longspan.data_pipeline.tokenization.base import TokenizerKind
from longspan.data_pipeline.tokenization.byte_level import byte_level_engine
from longspan.data_pipeline.tokenization.file_tokenizer import Engine, FileTokenizer
from longspan.data_pipeline.tokenization.offsets import OffsetEngine
from longspan.errors import UsageError

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAMES = ("tokenizer_config.json", "special_tokens_map.json")  # either may name bos, eos and pad


class _TokenizersEncoder:
    """`tokenizers.Tokenizer` with byte offsets."""

    def __init__(self, tokenizer: Any, unknown: int | None) -> None:
        self._tokenizer = tokenizer
        self.unknown = unknown

    def encode_chunks(self, chunks: list[str], threads: int) -> list[tuple[list[int], np.ndarray]]:
        try:
            if threads > 1:
                found = self._tokenizer.encode_batch(chunks, add_special_tokens=False)  # uses all cores
            else:
                found = [self._tokenizer.encode(chunk, add_special_tokens=False) for chunk in chunks]
        except Exception as error:  # what the library raises has no narrower type
            raise UsageError(
                f"the Hugging Face tokenizer cannot encode a text: {error}. Use one whose vocabulary has bytes or an "
                f"unknown token."
            ) from error
        return [(item.ids, _byte_ends(chunk, item.offsets)) for chunk, item in zip(chunks, found, strict=True)]

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


def read_hugging_face(path: Path) -> dict[str, bytes]:
    """The files of a tokenizer: tokenizer.json, and those beside it that name special tokens.

    Args:
        path: folder, or its tokenizer.json.

    Raises:
        UsageError: there is no tokenizer.json, or it cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    main = path / TOKENIZER_NAME if path.is_dir() else path
    try:
        files = {TOKENIZER_NAME: read_regular(main)}
        files.update({name: read_regular(folder / name) for name in CONFIG_NAMES if (folder / name).is_file()})
    except OSError as error:
        raise UsageError(
            f"no Hugging Face tokenizer at {path}: {main}: {error.strerror}. Give the folder that holds "
            f"{TOKENIZER_NAME}; a tokenizer without one is converted by loading it with transformers' AutoTokenizer "
            f"and calling save_pretrained."
        ) from None
    return files


def hugging_face_tokenizer(name: str, kind: TokenizerKind, files: dict[str, bytes]) -> FileTokenizer:
    """The tokenizer of `files`; byte-level BPE with GPT-2's pattern runs on tiktoken, the rest on `tokenizers`.

    Args:
        name: for people. kind: `hugging_face`, or `bpe` for one that was trained here.
        files: tokenizer.json, and tokenizer_config.json and special_tokens_map.json where they exist.

    Raises:
        UsageError: a file does not hold what it should.
    """
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(files[TOKENIZER_NAME].decode("utf-8"))
    except KeyError:
        raise UsageError(f"the tokenizer {name} has no {TOKENIZER_NAME}. Build the corpus again.") from None
    except Exception as error:  # what the library raises has no narrower type
        raise UsageError(
            f"{TOKENIZER_NAME} of {name} is not a tokenizer that `tokenizers` {tokenizers.__version__} reads: {error}. "
            f"Save it again with that version."
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # text that spells a special token is text
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None  # equal texts must give equal ids
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise UsageError(f"{TOKENIZER_NAME} of {name} has an empty vocabulary. Give a trained tokenizer.")
    engine: Engine | None = byte_level_engine(tokenizer)
    if engine is None:
        engine = OffsetEngine(_TokenizersEncoder(tokenizer, _unknown_id(tokenizer)))
    bos, eos, pad = (vocabulary.get(token) for token in _named_specials(name, files))
    return FileTokenizer(name, kind, engine, (bos, eos, pad), max(vocabulary.values()) + 1, files)


def _named_specials(name: str, files: dict[str, bytes]) -> list[str]:
    """The texts of bos, eos and pad, empty where no file names them."""
    named: dict[str, str] = {}
    for file in reversed(CONFIG_NAMES):
        try:
            content = json.loads(files.get(file, b"{}"))
            for key in ("bos_token", "eos_token", "pad_token"):
                token = content.get(key)
                text = token.get("content") if isinstance(token, dict) else token
                if isinstance(text, str):
                    named[key] = text
        except (ValueError, AttributeError) as error:
            raise UsageError(f"{file} of the tokenizer {name} is not a JSON object: {error}.") from error
    return [named.get(key, "") for key in ("bos_token", "eos_token", "pad_token")]


def _unknown_id(tokenizer: Any) -> int | None:
    model = json.loads(tokenizer.to_str())["model"]
    found = model.get("unk_id")  # Unigram's; the others name the token
    return found if found is not None else tokenizer.token_to_id(model.get("unk_token") or "")


def _byte_ends(chunk: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Where each token ends in the chunk's UTF-8 bytes, from ends in characters."""
    ends = np.fromiter((end for _, end in offsets), dtype=np.int64, count=len(offsets))
    if chunk.isascii():
        return ends
    code_points = np.frombuffer(chunk.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (code_points > 0x7F).astype(np.int64) + (code_points > 0x7FF) + (code_points > 0xFFFF)
    return np.concatenate([[0], np.cumsum(sizes)])[ends]
