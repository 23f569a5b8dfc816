"""Tokenizers: text to ids and the bytes that each id stands for; bytes, own BPE, SentencePiece, Hugging Face files.

    make_tokenizer(config: TokenizerConfig, texts: Iterable[bytes] = ()) -> Tokenizer
    load_tokenizer(folder: str | Path) -> Tokenizer         # what `Tokenizer.save(folder)` wrote, verified
    Tokenizer.encode(text: bytes) -> Encoded(ids [n], num_bytes [n])    # bos first, eos last
    bpe.train_bpe(texts: Iterable[bytes], vocab_size: int, train_bytes: int = ...) -> BpeTokenizer

`TokenizerConfig` and its members live in `tokenization.config`, `Tokenizer` and `Encoded` in `tokenization.base`.
Importing this package is light: numpy and the tokenizer libraries are loaded by the calls that need them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longspan.data_pipeline.tokenization.base import Tokenizer
    from longspan.data_pipeline.tokenization.config import TokenizerConfig


def make_tokenizer(config: TokenizerConfig, texts: Iterable[bytes] = ()) -> Tokenizer:
    """The tokenizer that a recipe asks for.

    Args:
        config: kind and settings.
        texts: UTF-8 texts to train on, read once; only looked at by `bpe` without a `path`.

    Raises:
        UsageError: a file is missing or unreadable, settings do not fit it, or there is no text to train on.
    """
    from longspan.data_pipeline.tokenization.factory import make

    return make(config, texts)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote to `folder`, after checking its files against its description.

    Raises:
        UsageError: nothing was saved there, a file is missing or changed, or a newer version wrote it.
    """
    from longspan.data_pipeline.tokenization.factory import load

    return load(Path(folder))
